/** A loaded model: weights and caches in one memory, and calls of its entries. */

import { asked, bind, complete } from "./binding.js";
import { firstInstance } from "./code.js";
import { InputError, SylvesterError, UnsupportedError } from "./errors.js";
import { evaluate } from "./sizes.js";
import { Team } from "./team.js";
import { bytesOf, count, TYPES } from "./tensors.js";

const OUT_OF_RANGE = 1;
const OVERFLOW = 2;
const ZERO_DIVISOR = 3;
const NO_MEMORY = -1;

/**
 * @typedef {object} Call one entry at fixed sizes: where everything lies in the block of inputs and outputs
 * @property {number[]} inputs @property {number[]} outputs @property {number[][]} shapes
 * @property {number} sizes @property {number} table @property {number} arena @property {number} bytes
 * @property {number} scratch
 *
 * @typedef {{places: Record<string, number>, position: number}} State caches of one batch of sequences
 */

export class Engine {
  /**
   * @param {any} manifest @param {import("./heap.js").Heap} heap @param {any} code the first instance
   * @param {Team} team @param {Map<string, number>} weights where each tensor lies
   */
  constructor(manifest, heap, code, team, weights) {
    this.manifest = manifest;
    this.heap = heap;
    this.code = code;
    this.team = team;
    this.weights = weights;
    /** @type {Map<string, Call>} */
    this.calls = new Map();
    /** What a call reads and writes besides weights and caches. */
    this.block = 0;
    this.room = 0;
    /** @type {State | undefined} */
    this.owner = undefined;
    this.stateRoom = 0;
    this.stateBlock = 0;
    this.current = "";
  }

  /** @param {any} manifest @param {import("./heap.js").Heap} heap @param {WebAssembly.Module} module @param {any} code */
  static async start(manifest, heap, module, code, threads, weights) {
    const team = new Team(heap, module, code, threads);
    await team.start();
    return new Engine(manifest, heap, code, team, weights);
  }

  entry(name) {
    const entry = this.manifest.entries[name];
    if (entry) return entry;
    throw new InputError(`no entry named ${name}`, { hint: `there are ${Object.keys(this.manifest.entries).join(", ")}` });
  }

  /** Empty caches for a batch of `rows`; those of an earlier batch are gone. @returns {State} */
  newState(values) {
    const places = {};
    let bytes = 0;
    for (const [name, { dtype, shape }] of Object.entries(this.manifest.state)) {
      places[name] = bytes;
      bytes += Math.ceil(bytesOf(dtype, shape.map((size) => evaluate(size, values))) / 64) * 64;
    }
    if (bytes > this.stateRoom) {
      this.stateBlock = this.heap.replace(this.stateBlock, bytes);
      this.stateRoom = bytes;
    }
    for (const name in places) places[name] += this.stateBlock;
    this.current = "";
    this.owner = { places, position: 0 };
    return this.owner;
  }

  /**
   * One call. Outputs are views of the memory, good until the next call.
   * @param {string} name @param {Record<string, any>} inputs
   * @param {State} [state] for an entry with caches; a fresh one by default
   * @returns {Promise<Record<string, import("./tensors.js").Tensor>>}
   */
  async run(name, inputs, state) {
    const entry = this.entry(name);
    const tensors = complete(entry, inputs, state?.position ?? 0);
    const values = bind(entry, tensors);
    const caches = entry.states.length ? (state ?? this.newState(values)) : undefined;
    if (caches && caches !== this.owner) throw new InputError("these caches were given up for those of a later call");
    const call = await this.prepare(name, entry, values);
    tensors.forEach((tensor, index) => {
      this.heap.view(TYPES[tensor.dtype], this.block + call.inputs[index], tensor.data.length).set(tensor.data);
    });
    const { code, team, block } = this;
    const status = Number(code[`sv_run_${name}`](team.at, block + call.sizes, block + call.table));
    if (status) throw failure(status, code.sv_team_error_value(team.at), entry, tensors);
    return Object.fromEntries(entry.outputs.map((spec, index) => [spec.name, this.output(spec, call, index)]));
  }

  output(spec, call, index) {
    const shape = call.shapes[index];
    const at = this.block + call.outputs[index];
    return { dtype: spec.dtype, shape, data: this.heap.view(TYPES[spec.dtype], at, count(shape)) };
  }

  /** The layout of a call, in place and with its sizes and pointers written. @returns {Promise<Call>} */
  async prepare(name, entry, values) {
    const sizes = entry.symbols.map((symbol) => values[symbol.name]);
    const key = `${name} ${sizes}`;
    const call = this.calls.get(key) ?? this.layout(name, entry, values, sizes);
    this.calls.set(key, call);
    if (key === this.current) return call;
    if (call.bytes > this.room) {
      this.block = this.heap.replace(this.block, call.bytes);
      this.room = call.bytes;
    }
    await this.team.place(call.scratch);
    this.point(entry, call, sizes);
    this.current = key;
    return call;
  }

  /** @returns {Call} */
  layout(name, entry, values, sizes) {
    const { code } = this;
    const specs = [...entry.inputs, ...entry.outputs, ...entry.states.map((slot) => this.manifest.state[slot])];
    const ranks = specs.map((spec) => spec.shape.length);
    const asking = this.heap.alloc(8 * (sizes.length + ranks.reduce((sum, rank) => sum + rank, 0)));
    this.heap.view(BigInt64Array, asking, sizes.length).set(sizes.map(BigInt));
    const dims = asking + 8 * sizes.length;
    code[`sv_shapes_${name}`](asking, dims);
    const shapes = this.shapes(dims, ranks);
    const [arena, scratch] = ["arena", "scratch"].map((what) => Number(code[`sv_${what}_${name}`](asking)));
    this.heap.release(asking);
    const outputs = shapes.slice(entry.inputs.length, entry.inputs.length + entry.outputs.length);
    return { ...this.places(entry, shapes, outputs, arena), shapes: outputs, scratch };
  }

  places(entry, shapes, outputs, arena) {
    let bytes = 0;
    const take = (/** @type {number} */ size) => {
      const at = bytes;
      bytes += Math.ceil(size / 64) * 64;
      return at;
    };
    return {
      inputs: entry.inputs.map((spec, index) => take(bytesOf(spec.dtype, shapes[index]))),
      outputs: entry.outputs.map((spec, index) => take(bytesOf(spec.dtype, outputs[index]))),
      sizes: take(8 * entry.symbols.length),
      table: take(4 * (entry.inputs.length + entry.weights.length + entry.states.length + entry.outputs.length + 1)),
      arena: take(arena),
      bytes,
    };
  }

  shapes(at, ranks) {
    const all = Array.from(this.heap.view(BigInt64Array, at, ranks.reduce((sum, rank) => sum + rank, 0)), Number);
    let taken = 0;
    return ranks.map((rank) => all.slice(taken, (taken += rank)));
  }

  point(entry, call, sizes) {
    const { block, heap, weights } = this;
    heap.view(BigInt64Array, block + call.sizes, sizes.length).set(sizes.map(BigInt));
    const pointers = [
      ...call.inputs.map((at) => block + at),
      ...entry.weights.map((name) => weights.get(name)),
      ...entry.states.map((name) => this.owner.places[name]),
      ...call.outputs.map((at) => block + at),
      block + call.arena,
    ];
    heap.view(Uint32Array, block + call.table, pointers.length).set(pointers);
  }

  end() {
    this.team.end();
  }
}

function failure(status, value, entry, tensors) {
  if (status === OVERFLOW) return overflow(value);
  if (status === OUT_OF_RANGE) return outOfRange(value, entry, tensors);
  if (status === ZERO_DIVISOR)
    return new InputError("an integer was divided by zero", { hint: "look for zeros among the integer inputs" });
  if (status === NO_MEMORY) return new UnsupportedError("no memory for the scratch space of the threads");
  return new SylvesterError(`the compiled code failed with status ${status} and value ${value}`);
}

function overflow(position) {
  return new InputError(`no room in the caches at position ${position}`, { hint: "compile with a larger max_length" });
}

function outOfRange(value, entry, tensors) {
  const given = asked(entry).find((spec) => {
    const { data } = tensors[entry.inputs.indexOf(spec)];
    return data instanceof BigInt64Array && data.includes(value);
  });
  if (!given && entry.states.length) return overflow(value);
  return new InputError(`index ${value}${given ? ` in input ${given.name}` : ""} is out of range`, {
    hint: "token ids must be smaller than the vocabulary",
  });
}
