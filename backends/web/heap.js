/** The memory of a model: blocks of 64-byte alignment above what the compiled code lays out itself. */

import { UnsupportedError } from "./errors.js";

const PAGE = 65536;
const ALIGNMENT = 64;
const MOST_PAGES = 65535;
/** Room for the data and the stack of the code; blocks begin behind it. */
const CODE_PAGES = 16;

const aligned = (/** @type {number} */ n) => Math.ceil(n / ALIGNMENT) * ALIGNMENT;

export class Heap {
  /** @param {boolean} shared @param {number} needed bytes that will surely be used */
  constructor(shared, needed) {
    this.memory = shared ? sharedMemory(CODE_PAGES + Math.ceil(needed / PAGE)) : new WebAssembly.Memory({
      initial: CODE_PAGES,
    });
    this.end = CODE_PAGES * PAGE;
    /** @type {{at: number, bytes: number}[]} Given back, in rising order. */
    this.free = [];
    /** @type {Map<number, number>} */
    this.sizes = new Map();
  }

  get bytes() {
    return this.memory.buffer.byteLength;
  }

  /** Keeps blocks away from what the code lays out. @param {number} base */
  reserve(base) {
    this.end = Math.max(this.end, aligned(base));
    this.grow(this.end);
  }

  /** @param {number} bytes @returns {number} where the block begins; its content is not cleared */
  alloc(bytes) {
    const size = aligned(Math.max(bytes, 1));
    const spare = this.free.findIndex((block) => block.bytes >= size);
    const at = spare < 0 ? this.extend(size) : this.carve(spare, size);
    this.sizes.set(at, size);
    return at;
  }

  /** A block in place of one whose content is no longer needed. */
  replace(at, bytes) {
    if (at) this.release(at);
    return this.alloc(bytes);
  }

  release(at) {
    const bytes = this.sizes.get(at);
    this.sizes.delete(at);
    this.free.push({ at, bytes });
    this.free.sort((a, b) => a.at - b.at);
    this.free = this.free.reduce((merged, block) => {
      const last = merged.at(-1);
      if (last && last.at + last.bytes === block.at) last.bytes += block.bytes;
      else merged.push({ ...block });
      return merged;
    }, /** @type {{at: number, bytes: number}[]} */ ([]));
    const last = this.free.at(-1);
    if (last && last.at + last.bytes === this.end) this.end = this.free.pop().at;
  }

  carve(index, size) {
    const block = this.free[index];
    const at = block.at;
    block.at += size;
    block.bytes -= size;
    if (!block.bytes) this.free.splice(index, 1);
    return at;
  }

  extend(size) {
    const at = this.end;
    this.grow(at + size);
    this.end = at + size;
    return at;
  }

  grow(end) {
    const missing = Math.ceil(end / PAGE) - this.memory.buffer.byteLength / PAGE;
    if (missing <= 0) return;
    try {
      this.memory.grow(missing);
    } catch {
      throw outOfMemory(end);
    }
  }

  /** A view, until the memory grows. @template T @param {new (b: any, at: number, n: number) => T} type */
  view(type, at, count) {
    return new type(this.memory.buffer, at, count);
  }
}

/** Shared memory reserves its maximum, which small devices refuse: then half of it, and so on. */
function sharedMemory(least) {
  for (let maximum = MOST_PAGES; maximum >= least; maximum = Math.floor(maximum / 2)) {
    try {
      return new WebAssembly.Memory({ initial: CODE_PAGES, maximum, shared: true });
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
    }
  }
  throw outOfMemory(least * PAGE);
}

function outOfMemory(bytes) {
  return new UnsupportedError(`this engine gives no memory of ${(bytes / 1e6).toFixed(0)} MB`, {
    hint: "give shorter inputs, or compile with fewer bits or a smaller max_length",
  });
}
