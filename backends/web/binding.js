/** Checks the tensors of a call against an entry's signature and reads the symbols off their shapes. */

import { InputError } from "./errors.js";
import { evaluate, solve, symbols } from "./sizes.js";
import { toTensor } from "./tensors.js";

/** Whether an input is the number of positions that the state holds. */
export const isPosition = (spec, entry) =>
  entry.states.length > 0 && spec.shape.length === 0 && spec.dtype.startsWith("int");

/** The inputs that a caller gives. */
export const asked = (entry) => entry.inputs.filter((spec) => !isPosition(spec, entry));

/** The tensors in the entry's order, the position filled in. @returns {import("./tensors.js").Tensor[]} */
export function complete(entry, inputs, position) {
  if (inputs === null || typeof inputs !== "object" || Array.isArray(inputs))
    throw new InputError("inputs are given by name", { hint: `run({${asked(entry).map((s) => s.name).join(", ")}})` });
  checkNames(asked(entry).map((spec) => spec.name), Object.keys(inputs));
  return entry.inputs.map((spec) => toTensor(spec, isPosition(spec, entry) ? position : inputs[spec.name])).map(ranked(entry));
}

function checkNames(expected, found) {
  const listed = expected.join(", ");
  const unknown = found.find((name) => !expected.includes(name));
  if (unknown) throw new InputError(`unexpected input ${unknown}, expected ${listed}`);
  const missing = expected.find((name) => !found.includes(name));
  if (missing) throw new InputError(`missing input ${missing}, expected ${listed}`);
}

const ranked = (entry) => (tensor, index) => {
  const spec = entry.inputs[index];
  if (tensor.shape.length === spec.shape.length) return tensor;
  throw new InputError(`input ${spec.name} has shape [${tensor.shape}], expected [${spec.shape}]`, {
    hint: `it has ${tensor.shape.length} dimensions, give ${spec.shape.length}; the first is usually the batch`,
  });
};

/** Values of the symbols, after every dimension and range is checked. @returns {Record<string, number>} */
export function bind(entry, tensors) {
  const values = {};
  const given = entry.inputs.map((spec, index) => ({ spec, shape: tensors[index].shape }));
  for (const { spec, shape } of given)
    spec.shape.forEach((size, axis) => typeof size === "string" && read(spec, axis, shape, values));
  for (const { spec, shape } of given) checkShape(spec, shape, values);
  for (const symbol of entry.symbols) checkRange(symbol, values, given);
  return values;
}

function read(spec, axis, shape, values) {
  const size = spec.shape[axis];
  const [name, ...others] = symbols(size);
  if (!name || others.length || name in values) return;
  const value = solve(size, name, shape[axis]);
  if (value === undefined)
    throw new InputError(`input ${spec.name} has ${shape[axis]} in dimension ${axis}, expected the form ${size}`);
  values[name] = value;
}

function checkShape(spec, shape, values) {
  const expected = spec.shape.map((size) => evaluate(size, values));
  if (expected.every((size, axis) => size === shape[axis])) return;
  throw new InputError(`input ${spec.name} has shape [${shape}], expected [${expected}] (${spec.shape.join(", ")})`, {
    hint: "numbers are fixed, equal names are equal sizes; to change them, compile with other examples",
  });
}

function checkRange({ name, min, max }, values, given) {
  const value = values[name];
  if (value >= min && (max === null || value <= max)) return;
  const holder = given.find(({ spec }) => spec.shape.includes(name));
  const place = holder
    ? `input ${holder.spec.name} has ${value} in dimension ${holder.spec.shape.indexOf(name)}`
    : `size ${name} is ${value}`;
  if (value < min)
    throw new InputError(`${place}, below the compiled minimum of ${min}`, { hint: "give more, or pad the input" });
  throw new InputError(`${place}, above the compiled maximum of ${max}`, {
    hint: "compile with a larger maximum length",
  });
}
