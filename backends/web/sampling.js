/** The next token from the logits: greedy, or drawn at a temperature from the top k or the top-p nucleus. */

import { InputError } from "./errors.js";

/** How many of the best tokens are sorted first to find a nucleus. */
const FEW = 64;

/** @typedef {{temperature?: number, topK?: number, topP?: number, seed?: number}} Sampling */

/** @param {Sampling} options @returns {(logits: Float32Array) => number} */
export function sampler({ temperature = 0, topK, topP, seed }) {
  require("temperature", temperature, temperature >= 0 && temperature < Infinity, "0 (greedy) or more");
  require("topK", topK, topK === undefined || (Number.isInteger(topK) && topK >= 1), "a whole number, 1 or more");
  require("topP", topP, topP === undefined || (topP > 0 && topP <= 1), "more than 0 and at most 1");
  require("seed", seed, seed === undefined || (Number.isInteger(seed) && seed >= 0), "a whole number, 0 or more");
  const random = generator(seed ?? Math.floor(Math.random() * 2 ** 32));
  return (logits) => {
    const best = argmax(logits);
    if (!Number.isFinite(logits[best]))
      throw new InputError(`the best logit is ${logits[best]}, expected a finite number`, {
        hint: "look for NaN or infinity in the weights of the model",
      });
    return temperature ? draw(logits, logits[best], temperature, topK, topP, random()) : best;
  };
}

function require(name, value, fits, expected) {
  if (!fits) throw new InputError(`${name} is ${value}, expected ${expected}`);
}

/** Where the highest score is, or the first that is no number. @param {Float32Array} scores */
export function argmax(scores) {
  let best = 0;
  let highest = -Infinity;
  for (let i = 0; i < scores.length; i++) {
    const score = scores[i];
    if (score > highest) [best, highest] = [i, score];
    else if (score !== score) return i;
  }
  return best;
}

function draw(scores, highest, temperature, topK, topP, uniform) {
  const weigh = (/** @type {number} */ id) => Math.exp((scores[id] - highest) / temperature);
  const ids = topK === undefined ? undefined : bestOf(scores, topK);
  if (topP === undefined) return pick(ids ?? scores.keys(), weigh, sum(ids ?? scores.keys(), weigh) * uniform);
  const mass = sum(ids ?? scores.keys(), weigh) * topP;
  const kept = nucleus(scores, weigh, mass, ids?.length ?? scores.length);
  return pick(kept, weigh, sum(kept, weigh) * uniform);
}

function sum(ids, weigh) {
  let total = 0;
  for (const id of ids) total += weigh(id);
  return total;
}

/** The first id up to which the weights make up `wanted`. */
function pick(ids, weigh, wanted) {
  let last = 0;
  for (const id of ids) {
    last = id;
    wanted -= weigh(id);
    if (wanted < 0) break;
  }
  return last;
}

/** The first ids in falling order of weight that together reach `mass`, of the `most` best ones. */
function nucleus(scores, weigh, mass, most) {
  for (let count = FEW; ; count *= 8) {
    const ranked = bestOf(scores, Math.min(count, most));
    let reached = 0;
    const end = ranked.findIndex((id) => (reached += weigh(id)) >= mass);
    if (end >= 0) return ranked.slice(0, end + 1);
    if (count >= most) return ranked;
  }
}

/** Ids of the `count` best scores, the best first; of equal ones the lower id. @param {Float32Array} scores */
export function bestOf(scores, count) {
  const better = (/** @type {number} */ a, /** @type {number} */ b) => scores[b] - scores[a] || a - b;
  if (count >= scores.length) return Array.from(scores.keys()).sort(better);
  const heap = Array.from({ length: count }, (_, id) => id).sort((a, b) => better(b, a));
  for (let id = count; id < scores.length; id++) if (scores[id] > scores[heap[0]]) sink(heap, id, better);
  return heap.sort(better);
}

/** Replaces the worst of a heap that has the worst on top. */
function sink(heap, id, better) {
  let at = 0;
  for (;;) {
    let child = 2 * at + 1;
    if (child >= heap.length) break;
    if (child + 1 < heap.length && better(heap[child + 1], heap[child]) > 0) child++;
    if (better(heap[child], id) <= 0) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = id;
}

/** Numbers in [0, 1) that a seed decides: SplitMix32 (after Steele et al., 2014), two words a number. */
function generator(seed) {
  let state = (seed ^ Math.floor(seed / 2 ** 32)) >>> 0;
  const word = () => {
    state = (state + 0x9e3779b9) | 0;
    let z = state ^ (state >>> 16);
    z = Math.imul(z, 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  };
  return () => (word() * 2 ** 21 + (word() >>> 11)) / 2 ** 53;
}
