/** What runs beside the page: one model, and the calls of it one after another. */

import { embed } from "./embed.js";
import { InputError, toPlain, UnsupportedError } from "./errors.js";
import { generate } from "./generate.js";
import { loadModel } from "./loading.js";
import { BREATH } from "./platform.js";
import { Session } from "./session.js";

/** Tokens on their way to the page, several in a message where they come faster than anyone sees. */
class Stream {
  /** @param {(tokens: object[]) => void} send */
  constructor(send) {
    this.send = send;
    /** @type {object[]} */
    this.waiting = [];
    this.sent = -Infinity;
  }

  push(token) {
    this.waiting.push(token);
    if (performance.now() - this.sent >= BREATH) this.flush();
  }

  flush() {
    if (this.waiting.length) this.send(this.waiting);
    this.waiting = [];
    this.sent = performance.now();
  }
}

const NOTHING = { seconds: 0, remembered: false, shapes: [] };

export class Host {
  /** @param {(message: object, transfer?: ArrayBuffer[]) => void} post */
  constructor(post) {
    this.post = post;
    /** @type {Map<number, AbortController>} */
    this.running = new Map();
    this.last = Promise.resolve();
    /** @type {{engine: import("./engine.js").Engine, files: import("./files.js").Files, tokenizer?: any, facts: any}} */
    this.model = undefined;
    /** Set off by the first call that was answered. */
    this.served = new Promise((/** @type {(value?: any) => void} */ serve) => (this.serve = serve));
    /** @type {Session} */
    this.session = undefined;
  }

  hear({ id, method, argument, abort }) {
    if (abort !== undefined) {
      this.running.get(abort)?.abort();
      return;
    }
    const controller = new AbortController();
    this.running.set(id, controller);
    const event = (/** @type {object} */ value) => this.post({ id, event: value });
    const work = () => this.answer(id, () => this[method](argument, controller.signal, event));
    if (method === "found") work();
    else this.turn(work).then(() => method !== "load" && this.serve());
  }

  /** After all that was asked before. @template T @param {() => Promise<T>} work */
  turn(work) {
    const done = this.last.then(work);
    this.last = done.then(() => {}, () => {});
    return done;
  }

  async answer(id, work) {
    try {
      const { value, transfer } = await work();
      this.post({ id, value, memory: this.model?.engine.heap.bytes }, transfer);
    } catch (error) {
      this.post({ id, error: toPlain(error) });
    }
    this.running.delete(id);
  }

  /** @param {any} argument @param {AbortSignal} signal @param {(event: object) => void} report */
  async load({ kept, tune = 30, ...wanted }, signal, report) {
    if (!(tune >= 0)) throw new InputError(`tune is ${tune}, expected seconds or false`);
    try {
      this.model = await loadModel(wanted, kept, { signal, report });
    } catch (error) {
      report({ kept });
      throw error;
    }
    const { engine, facts } = this.model;
    const { files, ...manifest } = engine.manifest;
    this.tuned = this.tune(tune).catch(({ message }) => ({ ...NOTHING, notes: [`not tuned: ${message}`] }));
    return { value: { facts, manifest, text: this.hasText } };
  }

  /** Seconds, or false. What it found is told once, also to whoever does not ask. */
  async tune(seconds) {
    if (!seconds) return { ...NOTHING, notes: ["tuning is switched off"] };
    const { tune } = await import("./tuning.js");
    const told = await tune(this.model, seconds, this.served, (work) => this.turn(work));
    this.post(told);
    return told.found;
  }

  /** Does not take turns: it waits for what calls of others set off. */
  async found() {
    return { value: await this.tuned };
  }

  async run({ inputs, entry }) {
    const { engine } = this.model;
    const { entries } = engine.manifest;
    const name = entry ?? ["forward", "prefill"].find((known) => known in entries) ?? Object.keys(entries)[0];
    const outputs = await engine.run(name, inputs);
    const value = Object.fromEntries(
      Object.entries(outputs).map(([key, { data, ...rest }]) => [key, { ...rest, data: data.slice() }]),
    );
    return { value, transfer: Object.values(value).map(({ data }) => data.buffer) };
  }

  async generate({ prompt, options, listening }, signal, event) {
    const text = typeof prompt === "string";
    if (!text && !(Array.isArray(prompt) || ArrayBuffer.isView(prompt)))
      throw new InputError(`the prompt is a ${typeof prompt}, expected a text or token ids`);
    this.session ??= new Session(this.model.engine);
    const ids = text ? this.tokenizer.encode(prompt) : Array.from(/** @type {any} */ (prompt), Number);
    const decode = this.hasText ? this.tokenizer.decode : undefined;
    const stream = new Stream(listening ? event : () => {});
    try {
      const onToken = (/** @type {object} */ token) => stream.push(token);
      return { value: await generate(this.session, ids, options, decode, { signal, onToken }) };
    } finally {
      stream.flush();
    }
  }

  async embed({ texts, options }) {
    const vectors = [];
    for (const text of texts) vectors.push(await embed(this.model.engine, this.tokenizer.encode, text, options));
    return { value: vectors, transfer: vectors.map((vector) => vector.buffer) };
  }

  get hasText() {
    return !!this.model.tokenizer && !this.model.tokenizer.error;
  }

  get tokenizer() {
    const { tokenizer } = this.model;
    if (tokenizer?.error) throw tokenizer.error;
    if (tokenizer) return tokenizer;
    throw new UnsupportedError("this model has no tokenizer, so that texts cannot be read", {
      hint: "give token ids, or compile a model folder that has a tokenizer.json",
    });
  }
}
