/** Arrays of the caller as the typed arrays that the compiled code reads. */

import { InputError } from "./errors.js";

/** How each dtype lies in memory; bfloat16 and float16 by their bits. */
export const TYPES = {
  float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, int16: Int16Array,
  int8: Int8Array, uint8: Uint8Array, bool: Uint8Array, bfloat16: Uint16Array, float16: Uint16Array,
};
/** 64-byte alignment holds for every tensor. */
export const bytesOf = (dtype, shape) => count(shape) * TYPES[dtype].BYTES_PER_ELEMENT;
export const count = (/** @type {number[]} */ shape) => shape.reduce((product, n) => product * n, 1);

/** @typedef {{dtype: string, shape: number[], data: any}} Tensor */

/**
 * A tensor with the dtype of `spec`: from `{data, shape}`, a nested array, or a number.
 * @param {{name: string, dtype: string, shape: (number | string)[]}} spec @param {any} given @returns {Tensor}
 */
export function toTensor(spec, given) {
  const plain = Array.isArray(given) || typeof given === "number" || typeof given === "bigint";
  const { data, shape } = plain ? flatten(spec, given) : given ?? {};
  if (!data || !Array.isArray(shape))
    throw new InputError(`input ${spec.name} is ${describe(given)}, expected {data, shape} or a nested array`);
  const typed = convert(spec, data);
  if (typed.length !== count(shape))
    throw new InputError(`input ${spec.name} has ${typed.length} values, its shape [${shape}] has ${count(shape)}`);
  return { dtype: spec.dtype, shape, data: typed };
}

function convert(spec, data) {
  const Type = TYPES[spec.dtype];
  if (data instanceof Type) return data;
  const whole = Type === BigInt64Array;
  try {
    if (Array.isArray(data)) return whole ? BigInt64Array.from(data, BigInt) : Type.from(data, Number);
    if (whole && data instanceof Int32Array) return BigInt64Array.from(data, BigInt);
  } catch (error) {
    throw new InputError(`input ${spec.name} has values that are no ${spec.dtype}: ${error.message}`);
  }
  throw new InputError(`input ${spec.name} is a ${describe(data)}, expected a ${Type.name} of ${spec.dtype}`, {
    hint: "give typed arrays of the input's own type, or a plain array",
  });
}

function flatten(spec, nested) {
  const shape = [];
  for (let part = nested; Array.isArray(part); part = part[0]) shape.push(part.length);
  const even = (part, depth) =>
    Array.isArray(part)
      ? part.length === shape[depth] && part.every((inner) => even(inner, depth + 1))
      : depth === shape.length;
  if (!even(nested, 0)) throw new InputError(`input ${spec.name} is an array of arrays of different lengths`);
  return { data: [nested].flat(Infinity), shape };
}

const describe = (value) => (value === null ? "null" : (value?.constructor?.name ?? typeof value));

/** The numbers that bits of bfloat16 mean, or the array itself. @param {any} data @param {string} dtype */
export function floats(data, dtype) {
  if (dtype === "float32") return /** @type {Float32Array} */ (data);
  if (dtype !== "bfloat16") return Float32Array.from(data, Number);
  return new Float32Array(Uint32Array.from(data, (bits) => bits << 16).buffer);
}
