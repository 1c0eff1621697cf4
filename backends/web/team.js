/** The threads that run a plan together: a worker for each but the first, all over one memory. */

import { furtherInstance, localBytes } from "./code.js";
import { SylvesterError } from "./errors.js";
import { spawn } from "./platform.js";

const STACK = 524288;

export class Team {
  /**
   * @param {import("./heap.js").Heap} heap @param {WebAssembly.Module} module @param {any} code its first instance
   * @param {number} threads
   */
  constructor(heap, module, code, threads) {
    this.heap = heap;
    this.code = code;
    this.threads = threads;
    this.scratch = -1;
    /** Where it lies; 0 before `place`. */
    this.at = 0;
    this.helpers = Array.from({ length: threads - 1 }, () => new Helper(heap, module, localBytes(code)));
  }

  /** Starts the workers. */
  async start() {
    await Promise.all(this.helpers.map((helper) => helper.start()));
  }

  /** Makes room for the scratch space that a call needs on every thread. @param {number} scratch */
  async place(scratch) {
    if (scratch <= this.scratch) return;
    await this.rest();
    this.at = this.heap.replace(this.at, this.code.sv_team_bytes(this.threads, scratch));
    this.scratch = scratch;
    this.begin();
  }

  /** Starts the work of the helpers. */
  begin() {
    this.code.sv_team_place(this.at, this.threads, this.scratch);
    this.helpers.forEach((helper, index) => helper.work(this.at, index + 1));
  }

  /** Ends the work of the helpers, which then wait for more. */
  async rest() {
    if (!this.at || !this.helpers.length) return;
    this.code.sv_team_stop(this.at);
    await Promise.all(this.helpers.map((helper) => helper.idle));
  }

  end() {
    this.helpers.forEach((helper) => helper.end());
  }
}

class Helper {
  constructor(heap, module, local) {
    this.module = module;
    this.memory = heap.memory;
    this.stack = heap.alloc(STACK) + STACK;
    this.local = local ? heap.alloc(local) : 0;
    this.idle = Promise.resolve();
    /** @type {(result?: any) => void} What becomes of the last message. */
    this.answered = this.failed = (result) => {};
  }

  async start() {
    this.worker = await spawn(new URL("./thread.js", import.meta.url));
    this.worker.listen(({ failed }) => {
      if (failed) this.failed(new SylvesterError(`a thread did not start: ${failed}`));
      else this.answered();
    }, (error) => this.failed(error));
    const { module, memory, stack, local } = this;
    await this.ask({ module, memory, stack, local });
    this.worker.hold(false);
  }

  /** The worker answers every message once. */
  ask(message) {
    return new Promise((/** @type {(value?: any) => void} */ answered, failed) => {
      Object.assign(this, { answered, failed });
      this.worker.post(message);
    });
  }

  work(team, index) {
    this.idle = this.ask({ team, index });
  }

  end() {
    this.worker?.end();
  }
}

/** What the worker of a helper does with a message. */
export function helping(post) {
  let code, shared;
  const answer = async ({ module, memory, stack, local, beside, team, index }) => {
    if (module) code = await furtherInstance(module, (shared = memory), stack, local);
    else if (beside) await (await import("./beside.js")).addFunctions(code, beside, shared, stack);
    else code.sv_team_work(team, index);
  };
  return (message) => answer(message).then(() => post({}), (error) => post({ failed: String(error) }));
}
