/** Text that streams from a language model. */

import { AbortError } from "../model.js";
import { field, make, megabytes, slider, stats, time } from "./dom.js";

const EXAMPLE = "It was a dark night, and the old house";

/** @param {import("../model.js").Model} model @param {(error: unknown) => void} show */
export function generateView(model, show) {
  const words = model.facts.text;
  const prompt = /** @type {HTMLTextAreaElement} */ (make("textarea", { rows: 3, spellcheck: "false" }));
  prompt.value = words ? EXAMPLE : "1 2 3";
  const length = model.manifest.generation.max_length;
  const count = slider("Tokens", { min: 8, max: length, step: 8, value: Math.min(200, Math.floor(length / 2)) });
  const heat = slider("Temperature", { min: 0, max: 1.5, step: 0.05, value: 0.8 });
  const mass = slider("Top p", { min: 0.05, max: 1, step: 0.05, value: 0.95 });
  const seed = /** @type {HTMLInputElement} */ (make("input", { type: "number", min: 0, placeholder: "any" }));
  const text = make("span", { class: "text" });
  const given = make("span", { class: "given" });
  const out = make("div", { class: "card out", "aria-live": "polite", "aria-busy": "false", hidden: true }, given, text);
  const numbers = stats(["Tokens per second", "First token", "Tokens", "Memory"]);
  numbers.set({ Memory: megabytes(model.facts.memory) });
  const button = /** @type {HTMLButtonElement} */ (make("button", {}, "Generate"));
  const hint = words ? "Prompt" : "Prompt, as token ids: this bundle reads no text";
  let stop = /** @type {AbortController | undefined} */ (undefined);

  async function go() {
    if (stop) return stop.abort();
    stop = new AbortController();
    button.textContent = "Stop";
    show(undefined);
    out.hidden = false;
    out.classList.add("busy");
    out.setAttribute("aria-busy", "true");
    given.textContent = prompt.value;
    text.textContent = "";
    try {
      finish(await run(stop.signal));
    } catch (error) {
      if (error instanceof AbortError) finish(error.partial);
      else show(error);
    }
    stop = undefined;
    button.textContent = "Generate";
    out.classList.remove("busy");
    out.setAttribute("aria-busy", "false");
  }

  function run(signal) {
    const start = performance.now();
    let first = 0;
    let made = 0;
    const onToken = ({ id, text: piece }) => {
      first ||= performance.now();
      text.append(words ? piece : ` ${id}`);
      numbers.set({ Tokens: String(++made), "First token": time((first - start) / 1e3) });
      if (made > 1) numbers.set({ "Tokens per second": rate((made - 1) / ((performance.now() - first) / 1e3)) });
    };
    const ids = prompt.value.split(/\D+/).filter(Boolean).map(Number);
    const chosen = { temperature: heat.value(), topP: mass.value(), seed: seed.value ? Number(seed.value) : undefined };
    return model.generate(words ? prompt.value : ids, { maxNewTokens: count.value(), ...chosen, onToken, signal });
  }

  function finish(made) {
    if (made?.tokensPerSecond) numbers.set({ "Tokens per second": rate(made.tokensPerSecond) });
    numbers.set({ Memory: megabytes(model.facts.memory) });
  }

  button.onclick = go;
  prompt.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
  };
  const settings = make("div", { class: "settings" }, count.label, heat.label, mass.label, field("Seed", seed));
  const form = make("div", { class: "card" }, field(hint, prompt), button, settings);
  return make("div", {}, form, numbers.list, out);
}

const rate = (/** @type {number} */ n) => (n < 10 ? n.toFixed(1) : n.toFixed(0));
