/** Times the candidates of one problem beside the kernel of the module, on the weights of the model. */

import { isNode } from "./platform.js";

/** Milliseconds of a timed batch: short ones are seldom disturbed, but clocks are coarse where a page is not isolated. */
const BATCH = isNode || globalThis.crossOriginIsolated ? 2 : 10;
/** Batches of every candidate at least, of the best after that, and of the last one and the default in turn. */
const ROUNDS = 4;
const MORE = 6;
const PAIRS = 15;
/** Milliseconds without a change after which code counts as compiled for good. */
const SETTLED = 250;
/** Candidates that get more batches. */
const BEST = 3;
/** So much slower than the default, a candidate is given up. */
const SLOW = 1.5;
/** Less of a gain may be noise: the default stays. */
const GAIN = 1.03;
/** Panels whose results lie side by side, and values of a block of rows at most. */
const WINDOW = 64;
const ROW_VALUES = 1 << 20;
const TOLERANCE = 1e-4;
const SHORT = 17;

/**
 * @typedef {object} Problem
 * @property {string} format @property {number} group @property {string} module @property {number} depth
 * @property {number} rows @property {Record<string, number>} candidates @property {Record<string, number>} weights
 */

/** Operands in the memory of the model: its own weights, random rows, and room for results. */
export class Bench {
  /** @param {import("./engine.js").Engine} engine @param {Problem} problem */
  constructor(engine, problem) {
    const { format, group, depth, rows } = problem;
    const { heap, code } = engine;
    this.code = code;
    this.heap = heap;
    this.problem = problem;
    this.rows = rows > WINDOW ? Math.max(WINDOW, Math.min(rows, Math.floor(ROW_VALUES / depth))) : rows;
    this.weights = Object.entries(problem.weights).map(([name, panels]) => ({ at: engine.weights.get(name), panels }));
    this.panels = this.weights.reduce((sum, { panels }) => sum + panels, 0);
    this.width = 32 * Math.min(WINDOW, Math.max(...this.weights.map(({ panels }) => panels)));
    this.turn = 0;
    const x = heap.alloc(4 * this.rows * depth);
    this.packed = heap.alloc(this.rows * code[`sv_trial_rows_${format}`](0, x, 1, depth, group));
    this.results = heap.alloc(4 * this.rows * this.width);
    const values = heap.view(Float32Array, x, this.rows * depth);
    for (let n = 0; n < values.length; n++) values[n] = 2 * Math.random() - 1;
    code[`sv_trial_rows_${format}`](this.packed, x, this.rows, depth, group);
    heap.release(x);
  }

  end() {
    this.heap.release(this.packed);
    this.heap.release(this.results);
  }

  /** @param {number} kernel its place in the table, 0 is the default */
  multiply(kernel, { at, panels }, count, rows = this.rows, columns = 32, width = this.width) {
    const { format, depth, group } = this.problem;
    const run = this.code[`sv_trial_${format}`];
    run(kernel, this.packed, at, this.results, rows, depth, group, columns, width, panels, 0, count);
  }

  /** Milliseconds of `count` panels, of one weight after another as in a call of the model. */
  time(kernel, count) {
    const start = performance.now();
    for (let left = count; left > 0; ) {
      const weight = this.weights[this.turn++ % this.weights.length];
      const some = Math.min(left, weight.panels);
      this.multiply(kernel, weight, some);
      left -= some;
    }
    return performance.now() - start;
  }

  /** Whether a candidate gives the results of the default: to the bit, where they are made of whole numbers. */
  agrees(kernel) {
    const whole = this.problem.format !== "f32";
    return [[this.rows, 32], [this.rows, SHORT], [Math.max(1, this.rows - 1), 32]].every(([rows, columns]) => {
      const [expected, found] = [0, kernel].map((one) => this.sample(one, rows, columns));
      const near = (value, n) => Math.abs(value - found[n]) <= TOLERANCE * Math.max(1, Math.abs(value));
      return expected.every((value, n) => Object.is(value, found[n]) || (!whole && near(value, n)));
    });
  }

  sample(kernel, rows, columns) {
    const results = this.heap.view(Float32Array, this.results, rows * 32);
    results.fill(NaN);
    this.multiply(kernel, this.weights[0], 1, rows, columns, 32);
    return results.slice();
  }
}

/**
 * Yields between batches, so that calls of the model can come between.
 * @param {Bench} bench @param {number} first the place of c0 in the table
 * @returns {Generator<void, {default: number, tuned: number, candidate: string, kernel: number, wrong: string[]}>}
 */
export function* trial(bench, first) {
  const wrong = [];
  /** @type {{name: string, kernel: number, times: number[]}[]} */
  let field = [{ name: "default", kernel: 0, times: [] }];
  for (const [name, number] of Object.entries(bench.problem.candidates)) {
    if (bench.agrees(first + number)) field.push({ name, kernel: first + number, times: [] });
    else wrong.push(name);
    yield;
  }
  const count = yield* calibrated(bench, field);
  const best = (entry) => Math.min(...entry.times);
  const round = function* () {
    for (const entry of field) {
      entry.times.push(bench.time(entry.kernel, count));
      yield;
    }
  };
  for (let n = 0; n < ROUNDS; n++) {
    yield* round();
    if (n) field = field.filter((entry) => best(entry) <= SLOW * best(field[0]));
  }
  const [own, ...others] = field;
  field = [own, ...others.sort((a, b) => best(a) - best(b)).slice(0, BEST)];
  for (let n = 0; n < MORE; n++) yield* round();
  const winner = field.slice(1).sort((a, b) => best(a) - best(b))[0];
  const whole = (time) => (time * bench.panels) / count;
  if (!winner || best(own) < GAIN * best(winner))
    return { default: whole(best(own)), tuned: whole(best(own)), candidate: own.name, kernel: 0, wrong };
  field = [own, winner];
  for (const entry of field) entry.times = [];
  for (let n = 0; n < PAIRS; n++) yield* round();
  const pairs = own.times.map((time, n) => time / winner.times[n]).sort((a, b) => a - b);
  const sure = best(own) >= GAIN * best(winner) && pairs[PAIRS >> 1] >= 1;
  const chosen = sure ? winner : own;
  return { default: whole(best(own)), tuned: whole(best(chosen)), candidate: chosen.name, kernel: chosen.kernel, wrong };
}

/** Panels that fill a batch, once the engine has made fast code of all of the field. */
function* calibrated(bench, field) {
  let count = 1;
  const doubled = function* () {
    while (bench.time(0, count) < BATCH) {
      count *= 2;
      yield;
    }
  };
  yield* doubled();
  yield* settled(bench, field, Math.ceil(count / 4));
  yield* doubled();
  return count;
}

/** Runs the field until nothing became much faster for a while: engines compile what runs often once more. */
function* settled(bench, field, count) {
  const start = performance.now();
  const best = field.map(() => Infinity);
  for (let changed = start; performance.now() < Math.min(changed + SETTLED, start + 6 * SETTLED); ) {
    for (const [n, { kernel }] of field.entries()) {
      const time = bench.time(kernel, count);
      if (time < 0.8 * best[n]) changed = performance.now();
      best[n] = Math.min(best[n], time);
      yield;
    }
  }
}
