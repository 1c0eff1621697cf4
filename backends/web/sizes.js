/** Dimensions such as "2*s0 + 1": evaluated from the values of symbols, and solved for one symbol. */

import { ArtefactError } from "./errors.js";

/** @typedef {number | string} Size */
/** @typedef {Record<string, number>} Values */

const floorMod = (/** @type {number} */ a, /** @type {number} */ b) => a - Math.floor(a / b) * b;
const FUNCTIONS = {
  Max: Math.max, Min: Math.min, Mod: floorMod,
  FloorDiv: (/** @type {number} */ a, /** @type {number} */ b) => Math.floor(a / b),
};
const SUMS = { "+": (a, b) => a + b, "-": (a, b) => a - b };
const PRODUCTS = { "*": (a, b) => a * b, "//": FUNCTIONS.FloorDiv, "%": floorMod };

/** @typedef {{symbols: Set<string>, value: (values: Values) => number}} Expression */
/** @type {Map<string, Expression>} */
const parsed = new Map();

/** The number a dimension stands for. @param {Size} size @param {Values} values */
export const evaluate = (size, values) => (typeof size === "number" ? size : parse(size).value(values));

/** @param {Size} size */
export const symbols = (size) => (typeof size === "number" ? new Set() : parse(size).symbols);

/** The value of `name` that makes a dimension linear in it equal `found`; undefined when there is none. */
export function solve(/** @type {string} */ size, /** @type {string} */ name, /** @type {number} */ found) {
  const zero = evaluate(size, { [name]: 0 });
  const value = (found - zero) / (evaluate(size, { [name]: 1 }) - zero);
  return Number.isInteger(value) && evaluate(size, { [name]: value }) === found ? value : undefined;
}

/** @param {string} text @returns {Expression} */
function parse(text) {
  const known = parsed.get(text);
  if (known) return known;
  const made = new Parser(text).whole();
  parsed.set(text, made);
  return made;
}

class Parser {
  constructor(text) {
    this.text = text;
    this.words = text.match(/\/\/|\w+|[^\s\w]/g) ?? [];
    this.symbols = new Set();
  }

  whole() {
    const value = this.sum();
    if (this.words.length) this.fail();
    return { symbols: this.symbols, value };
  }

  sum() {
    return this.chain(SUMS, () => this.chain(PRODUCTS, () => this.atom()));
  }

  chain(operators, part) {
    let left = part();
    while (this.words[0] in operators) {
      const apply = operators[this.words.shift()];
      const [a, b] = [left, part()];
      left = (values) => apply(a(values), b(values));
    }
    return left;
  }

  atom() {
    const word = this.words.shift() ?? this.fail();
    if (word === "-") return ((part) => (values) => -part(values))(this.atom());
    if (word === "(") return this.closed(this.sum());
    if (/^\d+$/.test(word)) return () => Number(word);
    if (!/^[A-Za-z_]/.test(word)) this.fail();
    if (this.words[0] === "(") return this.call(FUNCTIONS[word] ?? this.fail());
    this.symbols.add(word);
    return (values) => values[word];
  }

  call(apply) {
    const given = [];
    do {
      this.words.shift();
      given.push(this.sum());
    } while (this.words[0] === ",");
    return this.closed((values) => apply(...given.map((part) => part(values))));
  }

  closed(value) {
    return this.words.shift() === ")" ? value : this.fail();
  }

  /** @returns {never} */
  fail() {
    throw new ArtefactError(`${this.text} is not a dimension`, { hint: "compile the model again" });
  }
}
