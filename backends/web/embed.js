/** Texts as vectors: an encoder's states averaged over the tokens, at length 1. */

import { asked } from "./binding.js";
import { UnsupportedError } from "./errors.js";
import { floats } from "./tensors.js";

/** What an encoder's inputs are filled with, by name: ids, and a number for every token and for padding. */
const FILLS = { input_ids: undefined, attention_mask: [1, 0], token_type_ids: [0, 0] };

/**
 * @param {import("./engine.js").Engine} engine @param {(text: string) => number[]} encode @param {string} text
 * @param {{normalize?: boolean}} options
 * @returns {Promise<Float32Array>}
 */
export async function embed(engine, encode, text, { normalize = true }) {
  const name = "forward" in engine.manifest.entries ? "forward" : Object.keys(engine.manifest.entries)[0];
  const entry = engine.entry(name);
  const specs = asked(entry);
  const odd = specs.find((spec) => !(spec.name in FILLS) || spec.shape.length !== 2);
  if (odd || !specs.length || entry.states.length)
    throw new UnsupportedError(`this model does not embed texts: ${odd ? `its input is ${odd.name}` : "it generates"}`, {
      hint: "call run() with the inputs it takes",
    });
  const { length, most } = lengths(entry, specs[0]);
  const ids = encode(text).slice(0, most);
  const inputs = Object.fromEntries(specs.map((spec) => [spec.name, filled(spec, ids, length ?? ids.length)]));
  const outputs = await engine.run(name, inputs);
  const vector = pooled(outputs, ids.length);
  return normalize ? normalized(vector) : vector;
}

/** The fixed length of the inputs, if they have one, and the most tokens that fit. */
function lengths(entry, { shape: [, size] }) {
  if (typeof size === "number") return { length: size, most: size };
  const max = entry.symbols.find((symbol) => symbol.name === size)?.max;
  return { length: undefined, most: max ?? Infinity };
}

function filled(spec, ids, length) {
  const [token, padding] = FILLS[spec.name] ?? [];
  const values = Array.from({ length }, (_, at) => (at < ids.length ? (token ?? ids[at]) : (padding ?? 0)));
  return { data: values, shape: [1, length] };
}

/** A sentence's own vector where the model has one, else the mean over the tokens [1, length, width]. */
function pooled(outputs, tokens) {
  const { sentence_embedding: own, last_hidden_state: states = Object.values(outputs)[0] } = outputs;
  const { data, dtype, shape } = own ?? states;
  const values = floats(data, dtype);
  const width = shape.at(-1);
  if (shape.length === 2) return values.slice(0, width);
  const mean = new Float32Array(width);
  for (let at = 0; at < tokens * width; at++) mean[at % width] += values[at] / tokens;
  return mean;
}

function normalized(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((x) => x / length);
}
