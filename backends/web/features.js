/** Which build of the code this engine can run, and why not a faster one. */

import { InputError, UnsupportedError } from "./errors.js";
import { cores, isNode } from "./platform.js";

const HEADER = [0, 97, 115, 109, 1, 0, 0, 0];
const RETURNS_VECTOR = [1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0];
/** Modules of one function each: a splat, a dot product of bytes -1 and 1, an atomic load. */
const PROBES = {
  simd: [...RETURNS_VECTOR, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11],
  relaxed: [
    1, 5, 1, 96, 0, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0,
    10, 22, 1, 20, 0, 65, 127, 253, 15, 65, 1, 253, 15, 65, 0, 253, 17, 253, 147, 2, 253, 27, 0, 11,
  ],
  atomics: [1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 5, 4, 1, 3, 1, 1, 10, 11, 1, 9, 0, 65, 0, 254, 16, 2, 0, 26, 11],
};
/** More threads than this rarely pay: the bandwidth of memory is used up. One core is left to the page. */
const MOST_THREADS = 8;

/** V8 11.3 lets a thread pass a barrier when a loop that waits becomes optimised code. */
const SAFE_NODE = 22;
const NOT_ISOLATED =
  "the page is not cross-origin isolated; serve it with the headers Cross-Origin-Opener-Policy: same-origin and " +
  "Cross-Origin-Embedder-Policy: require-corp";

const bytes = (/** @type {keyof typeof PROBES} */ name) => new Uint8Array([...HEADER, ...PROBES[name]]);
const has = (/** @type {keyof typeof PROBES} */ name) => WebAssembly.validate(bytes(name));

/** V8 11.3 takes the first bytes as unsigned. */
function multipliesBytes() {
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(bytes("relaxed")));
  return /** @type {any} */ (exports).f() === -4;
}

/** From the best build down. */
const ORDER = ["relaxed-threads", "simd128-threads", "relaxed", "simd128"];

/**
 * @param {string[]} carried the builds of the artefact
 * @param {{threads?: number, isa?: string}} wanted
 * @returns {Promise<{isa: string, threads: number, notes: string[]}>}
 */
export async function choose(carried, { threads: asked, isa: forced }) {
  if (asked !== undefined && !(Number.isInteger(asked) && asked > 0))
    throw new InputError(`threads is ${asked}, expected a whole number, 1 or more`);
  const least = forced?.endsWith("-threads") ? 2 : 1;
  const most = asked ?? Math.max(least, Math.min(MOST_THREADS, (await cores()) - 1));
  const notes = [];
  for (const isa of ORDER) {
    if (forced && isa !== forced) continue;
    const reason = refusal(isa, carried, most);
    if (!reason) return { isa, threads: isa.endsWith("-threads") ? most : 1, notes };
    notes.push(`${isa} is not used: ${reason}`);
  }
  const hint = forced ? "leave out `isa`" : "update the browser, or compile for every build";
  throw new UnsupportedError(notes.join("; ") || `no build is named ${forced}, there are ${ORDER.join(", ")}`, { hint });
}

/** @param {string} isa @param {string[]} carried @param {number} threads */
function refusal(isa, carried, threads) {
  if (!carried.includes(isa)) return "the model was compiled without it";
  if (!has("simd")) return "this engine has no SIMD128";
  if (isa.startsWith("relaxed") && !has("relaxed")) return "this engine has no relaxed SIMD";
  if (isa.startsWith("relaxed") && !multipliesBytes()) return "this engine's dot product of bytes is wrong";
  if (!isa.endsWith("-threads")) return "";
  if (threads < 2) return "one thread was asked for, or there are two cores, of which the page needs one";
  if (typeof SharedArrayBuffer === "undefined" || !(isNode || globalThis.crossOriginIsolated)) return NOT_ISOLATED;
  if (isNode && parseInt(process.versions.node) < SAFE_NODE)
    return `threads need Node ${SAFE_NODE}: older engines leave loops early when they optimise them`;
  return has("atomics") ? "" : "this engine has no atomics";
}
