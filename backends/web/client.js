/** The page's side of the worker that a model runs in: calls, their events, and their cancelling. */

import { AbortError, fromPlain, NetworkError, SylvesterError } from "./errors.js";
import { spawn } from "./platform.js";

export class Client {
  constructor(worker) {
    this.worker = worker;
    /** @type {Map<number, {resolve: Function, reject: Function, onEvent?: Function}>} */
    this.calls = new Map();
    this.count = 0;
    this.memory = 0;
    this.closed = false;
    /** @type {SylvesterError | undefined} */
    this.failure = undefined;
    /** @type {any} What tuning found. */
    this.found = undefined;
    /** @param {[string, Uint8Array]} keep what the next load may begin with */
    this.remember = (keep) => {};
    worker.listen((message) => this.hear(message), (error) => this.fail(error));
  }

  static async start() {
    return new Client(await spawn(new URL("./worker.js", import.meta.url)));
  }

  /**
   * @param {string} method @param {object} argument
   * @param {{signal?: AbortSignal, onEvent?: (event: any) => void}} [options]
   * @returns {Promise<any>}
   */
  call(method, argument, { signal, onEvent } = {}) {
    if (this.failure) throw this.failure;
    if (this.closed) throw new SylvesterError("the model is disposed", { hint: "load it again" });
    if (signal?.aborted) throw new AbortError("cancelled by the caller");
    const id = this.count++;
    const stop = () => this.worker.post({ abort: id });
    signal?.addEventListener("abort", stop);
    this.worker.hold(true);
    return new Promise((resolve, reject) => {
      this.calls.set(id, { resolve, reject, onEvent });
      this.worker.post({ id, method, argument });
    }).finally(() => {
      signal?.removeEventListener("abort", stop);
      this.calls.delete(id);
      if (!this.calls.size) this.worker.hold(false);
    });
  }

  hear({ id, event, value, error, memory, found, keep }) {
    const call = this.calls.get(id);
    if (found) {
      this.found = found;
      if (keep) this.remember(keep);
    }
    if (!call) return;
    if (event) call.onEvent?.(event);
    else if (error) call.reject(fromPlain(error));
    else {
      this.memory = memory;
      call.resolve(value);
    }
  }

  fail(cause) {
    this.failure = new NetworkError(`the worker of the model failed: ${cause?.message ?? cause}`, {
      cause,
      hint: "worker.js and the files it imports must lie beside model.js",
    });
    for (const call of this.calls.values()) call.reject(this.failure);
  }

  end() {
    this.closed = true;
    this.worker.end();
    for (const call of this.calls.values()) call.reject(new AbortError("the model was disposed"));
  }
}
