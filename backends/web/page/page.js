/** The page of a model: loads it, then shows what it can do, and what its compilation did. */

import { load } from "../model.js";
import { at, make, megabytes, time } from "./dom.js";
import { generateView } from "./generate.js";
import { reportView } from "./report.js";
import { searchView } from "./search.js";
import { callView } from "./call.js";
import { imageInput, visionView } from "./vision.js";

/** Options in the address, as in `?threads=1&isa=simd128&storage=memory`. */
const asked = Object.fromEntries(new URLSearchParams(location.search));
const base = new URL("../", import.meta.url);

/** @type {import("../model.d.ts").Model | undefined} */
let model;

function show(error) {
  at("problem").textContent = error ? error.message : "";
  at("problem").hidden = !error;
}

async function start() {
  const stop = new AbortController();
  const button = at("load-stop");
  show(undefined);
  button.textContent = "Cancel";
  button.onclick = () => stop.abort();
  const threads = asked.threads ? Number(asked.threads) : undefined;
  try {
    const { isa, storage } = /** @type {any} */ (asked);
    const tune = asked.tune ? Number(asked.tune) : undefined;
    model = await load({ url: base, isa, storage, threads, tune, signal: stop.signal, onProgress: progress });
    at("loading").hidden = true;
    present();
    model.tuned.then(report, () => {});
  } catch (error) {
    show(error);
    at("load-text").textContent = "Not loaded";
    button.textContent = "Try again";
    button.onclick = start;
  }
}

function progress({ status, loaded, total }) {
  const verb = status === "stored" ? "Reading the stored model" : "Downloading";
  at("load-text").textContent = total ? `${verb}: ${megabytes(loaded)} of ${megabytes(total)}` : verb;
  if (total) at("load-bar").value = loaded / total;
}

function present() {
  const { manifest, facts } = model;
  const entry = manifest.entries[Object.keys(manifest.entries)[0]];
  const reads = entry.inputs.some((spec) => spec.name === "input_ids");
  /** @type {[(model: any, show: (error: unknown) => void) => HTMLElement, string]} */
  let chosen = [callView, "A model in this page"];
  if (manifest.generation) chosen = [generateView, "A language model in this page"];
  else if (reads && facts.text) chosen = [searchView, "Search by meaning"];
  else if (imageInput(entry)) chosen = [visionView, "An image model in this page"];
  const [view, title] = chosen;
  at("title").textContent = document.title = title;
  at("work").replaceChildren(view(model, show));
  const threads = facts.threads === 1 ? "1 thread" : `${facts.threads} threads`;
  const line = `${facts.isa}, ${threads}, ${megabytes(facts.memory)} of memory, loaded in ${time(facts.seconds)}, ` +
    `kept in ${{ opfs: "this site's files", cache: "this site's cache", memory: "memory only" }[facts.storage]}`;
  const notes = make("ul", {}, ...facts.notes.map((note) => make("li", {}, note)));
  at("facts").replaceChildren(facts.notes.length ? make("details", {}, make("summary", {}, line), notes) : line);
  at("facts").hidden = false;
}

function select(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    /** @type {HTMLElement} */ (tab).tabIndex = chosen ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (name === "report" && !at("view-report").childElementCount) draw();
}

/** Once it is open, it also shows what was tuned meanwhile. */
function report() {
  if (at("view-report").childElementCount) draw();
}

function draw() {
  reportView(base, model?.facts.tuned).then((view) => at("view-report").replaceChildren(view), show);
}

for (const name of ["run", "report"]) {
  at(`tab-${name}`).onclick = () => select(name);
  at(`tab-${name}`).onkeydown = ({ key }) => {
    if (key !== "ArrowLeft" && key !== "ArrowRight") return;
    const other = name === "run" ? "report" : "run";
    select(other);
    at(`tab-${other}`).focus();
  };
}

// Pages of plain HTTP, and browsers that keep nothing, have no service workers: then the page needs the network.
navigator.serviceWorker?.register(new URL("offline.js", base)).catch(() => {});
start();
