/** Tuning on the device of the visitor (nn-JIT.web, 2023): chooses micro-kernels by measuring, once, while nobody waits. */

import { addToTeam } from "./beside.js";
import { breathe, cores, digest, isNode } from "./platform.js";
import { Bench, trial } from "./trials.js";

/** Milliseconds that nothing is asked for before it begins, and that a call may have to wait. */
const IDLE = 200;
const SLICE = 12;

/** @typedef {import("./model.d.ts").Tuned} Tuned @typedef {import("./trials.js").Problem} Problem */

/**
 * @param {{engine: import("./engine.js").Engine, files: import("./files.js").Files, facts: any}} model
 * @param {number} seconds @param {Promise<void>} served the first call of the model was
 * @param {<T>(work: () => Promise<T>) => Promise<T>} turn between calls
 * @returns {Promise<{found: Tuned, keep?: [string, Uint8Array]}>} with what the next load may begin with
 */
export async function tune(model, seconds, served, turn) {
  const tuning = new Tuning(model, seconds, turn);
  try {
    if (await tuning.recall()) return { found: tuning.found };
    await served;
    await new Promise((next) => setTimeout(next, IDLE));
    await tuning.measure();
    return { found: tuning.found, keep: await tuning.keep() };
  } catch (error) {
    tuning.found.notes.push(`tuning ended early: ${error?.message ?? error}`);
    return { found: tuning.found };
  }
}

class Tuning {
  constructor({ engine, files, facts }, seconds, turn) {
    this.engine = engine;
    this.files = files;
    this.facts = facts;
    this.budget = seconds;
    this.turn = turn;
    /** @type {Tuned} */
    this.found = { seconds: 0, remembered: false, shapes: [], notes: [] };
    /** @type {{problem: Problem, number: number}[]} Problems with another kernel than the default. */
    this.chosen = [];
    /** @type {Map<string, number>} The table of chosen kernels of a format. */
    this.choices = new Map();
    /** @type {Map<string, number>} Where the candidates of a module begin; without one it cannot be used. */
    this.modules = new Map();
  }

  spec(end) {
    const file = `code/tuning/${this.facts.isa}${end}`;
    const found = this.engine.manifest.files[file];
    return found && { file, ...found };
  }

  /** Times every problem, the most worthwhile first, until the time is up. */
  async measure() {
    const spec = this.spec(".json");
    if (!spec) return void this.found.notes.push("this model has no kernels to choose from");
    const { problems } = JSON.parse(new TextDecoder().decode(await this.files.whole(spec)));
    for (const problem of problems) {
      const first = await this.install(problem.module);
      if (first === undefined) continue;
      const result = await this.solve(problem, first);
      if (result) this.take(problem, result, first);
      else this.found.notes.push(`the time was up: ${title(problem)} keeps the default`);
    }
  }

  /** In slices between calls of the model. @returns {Promise<any>} */
  async solve(problem, first) {
    const steps = attempt(this.engine, problem, first);
    while (this.found.seconds < this.budget) {
      const { done, value } = await this.turn(async () => this.slice(steps));
      if (done) return value;
      await breathe();
    }
    steps.return(undefined);
    return undefined;
  }

  slice(steps) {
    const start = performance.now();
    let step, passed;
    do {
      step = steps.next();
      passed = performance.now() - start;
    } while (!step.done && passed < SLICE);
    this.found.seconds += passed / 1e3;
    return step;
  }

  /** @param {any} result */
  take(problem, result, first) {
    const { kernel, wrong, ...shape } = result;
    const name = title(problem);
    this.found.shapes.push({ name, ...shape });
    if (wrong.length) this.found.notes.push(`${name}: ${wrong.join(", ")} give other results and are not used`);
    if (!kernel) return;
    this.choose(problem, kernel);
    this.chosen.push({ problem, number: kernel - first });
  }

  /** From now on all threads run this kernel: they read its place from the memory that they share. */
  choose({ format, rows, depth, group }, kernel) {
    const { code, heap } = this.engine;
    if (!this.choices.has(format)) {
      const bytes = code.sv_choices_bytes();
      this.choices.set(format, heap.alloc(bytes));
      heap.view(Uint8Array, this.choices.get(format), bytes).fill(0);
    }
    code[`sv_choose_${format}`](this.choices.get(format), kernel, rows, depth, group);
  }

  /** The candidates of a module, on all threads; nothing where it cannot be had. */
  async install(name) {
    if (!this.modules.has(name)) this.modules.set(name, await this.add(name));
    return this.modules.get(name);
  }

  async add(name) {
    const spec = this.spec(`-${name}.wasm`);
    let module;
    try {
      if (!spec) throw new Error("the manifest does not list it");
      module = await WebAssembly.compile(await this.files.whole(spec));
    } catch (error) {
      this.found.notes.push(`${name} keeps the defaults, the module of its candidates cannot be had: ${error.message}`);
      return undefined;
    }
    return this.turn(() => addToTeam(this.engine.team, module));
  }

  /** What has to be the same for choices to hold: the code, the engine and the device. */
  async key() {
    const { isa, threads } = this.facts;
    const files = Object.entries(this.engine.manifest.files).filter(([name]) => name.startsWith("code/"));
    const engine = isNode ? `${process.versions.v8} ${process.arch}` : navigator.userAgent;
    return JSON.stringify([files.map(([, { sha256 }]) => sha256), engine, isa, threads, await cores()]);
  }

  async name() {
    return `tuning-${await digest(new TextEncoder().encode(this.files.base))}`;
  }

  /** Takes over what an earlier visit found, if it holds here. */
  async recall() {
    const stored = await this.stored();
    if (!stored || stored.key !== (await this.key())) return false;
    for (const { problem } of stored.chosen) await this.install(problem.module);
    await this.turn(async () => {
      for (const { problem, number } of stored.chosen) {
        const first = this.modules.get(problem.module);
        if (first !== undefined) this.choose(problem, first + number);
      }
    });
    const { notes } = this.found;
    this.found = { ...stored.found, remembered: true, notes: [...stored.found.notes, ...notes] };
    return true;
  }

  async stored() {
    try {
      return JSON.parse(await (await this.files.storage.read(await this.name())).text());
    } catch {
      return undefined;
    }
  }

  /** @returns {Promise<[string, Uint8Array]>} */
  async keep() {
    const { found, chosen } = this;
    const bytes = new TextEncoder().encode(JSON.stringify({ key: await this.key(), found, chosen }));
    const name = await this.name();
    await this.files.storage.write(name, bytes).catch(({ message }) => void found.notes.push(`not kept: ${message}`));
    return [name, bytes];
  }
}

function* attempt(engine, problem, first) {
  const bench = new Bench(engine, problem);
  try {
    return yield* trial(bench, first);
  } finally {
    bench.end();
  }
}

function title({ format, group, depth, rows }) {
  return `${format}${group ? `/${group}` : ""}, k ${depth}, ${rows} ${rows > 1 ? "rows" : "row"}`;
}
