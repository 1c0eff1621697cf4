/** Search by meaning over pasted lines. */

import { field, make, megabytes, stats, time } from "./dom.js";

const LINES = [
  "The train to the coast leaves at seven.", "Whisk the eggs with sugar until pale.", "Her violin needs new strings.",
  "The recipe asks for two cups of flour.", "Rails were closed because of snow.", "An orchestra tunes to the oboe.",
];
const SHOWN = 10;

/** @param {import("../model.js").Model} model @param {(error: unknown) => void} show */
export function searchView(model, show) {
  const lines = /** @type {HTMLTextAreaElement} */ (make("textarea", { rows: 7 }));
  lines.value = LINES.join("\n");
  const query = /** @type {HTMLInputElement} */ (make("input", { type: "search", value: "baking a cake" }));
  const button = /** @type {HTMLButtonElement} */ (make("button", {}, "Search"));
  const found = make("ol", { class: "found", "aria-live": "polite" });
  const numbers = stats(["Time", "Lines", "Memory"]);
  /** @type {Map<string, Float32Array>} */
  const known = new Map();

  async function go() {
    show(undefined);
    button.disabled = true;
    try {
      const start = performance.now();
      const all = [...new Set(lines.value.split("\n").map((line) => line.trim()).filter(Boolean))];
      const fresh = all.filter((line) => !known.has(line));
      (await model.embed(fresh)).forEach((vector, index) => known.set(fresh[index], vector));
      const target = await model.embed(query.value);
      const ranked = all.map((line) => ({ line, score: dot(known.get(line), target) })).sort((a, b) => b.score - a.score);
      const items = ranked.slice(0, SHOWN).map(({ line, score }) => make("li", {}, make("b", {}, score.toFixed(2)), line));
      found.replaceChildren(...items);
      const spent = time((performance.now() - start) / 1e3);
      numbers.set({ Time: spent, Lines: String(all.length), Memory: megabytes(model.facts.memory) });
    } catch (error) {
      show(error);
    }
    button.disabled = false;
  }

  const form = make("form", { class: "card" }, field("Lines to search", lines), field("Search for", query),
    make("p", {}, button));
  form.onsubmit = (event) => (event.preventDefault(), go());
  return make("div", {}, form, numbers.list, make("div", { class: "card" }, found));
}

const dot = (/** @type {Float32Array} */ a, /** @type {Float32Array} */ b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
