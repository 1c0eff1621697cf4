/** Models that `sylvester compile --target wasm` wrote, in a page, a worker, or Node. */

import { Client } from "./client.js";
import { InputError } from "./errors.js";
import { folderUrl } from "./platform.js";

export {
  AbortError, ArtefactError, InputError, NetworkError, QuotaError, SylvesterError, UnsupportedError,
} from "./errors.js";

/** What downloads that broke off left, where there is no storage. @type {Map<string, Uint8Array>} */
const kept = new Map();

/**
 * @param {string | URL | (import("./model.d.ts").LoadOptions & {url: string | URL})} given
 * @param {import("./model.d.ts").LoadOptions} [more]
 */
export async function load(given, more = {}) {
  const plain = typeof given === "string" || given instanceof URL;
  const options = plain ? { ...more, url: given } : given;
  const { url, signal, onProgress, ...wanted } = options;
  if (!url) throw new InputError("load() was given no url", { hint: "load('./bundle/')" });
  const client = await Client.start();
  client.remember = ([name, bytes]) => kept.set(name, bytes);
  const onEvent = (event) => (event.kept ? event.kept.forEach((part, name) => kept.set(name, part)) : onProgress?.(event));
  try {
    const argument = { ...wanted, url: await folderUrl(url), kept };
    return new Model(client, await client.call("load", argument, { signal, onEvent }));
  } catch (error) {
    client.end();
    throw error;
  }
}

export class Model {
  #client;
  #loaded;

  constructor(client, loaded) {
    this.#client = client;
    this.#loaded = loaded;
  }

  get manifest() {
    return this.#loaded.manifest;
  }

  get facts() {
    return { ...this.#loaded.facts, text: this.#loaded.text, memory: this.#client.memory, tuned: this.#client.found };
  }

  /** What tuning found, which begins after the first call. */
  get tuned() {
    return this.#client.call("found", {});
  }

  /** @param {Record<string, any>} inputs @param {{entry?: string}} [options] */
  async run(inputs, { entry } = {}) {
    return this.#client.call("run", { inputs, entry });
  }

  /** @param {string | ArrayLike<number>} prompt @param {import("./model.d.ts").GenerateOptions} [options] */
  async generate(prompt, { onToken, signal, ...options } = {}) {
    const onEvent = (/** @type {any[]} */ tokens) => tokens.forEach((token) => queueMicrotask(() => onToken(token)));
    return this.#client.call("generate", { prompt, options, listening: !!onToken }, { signal, onEvent });
  }

  /** @param {string | string[]} texts @param {{normalize?: boolean}} [options] */
  async embed(texts, options = {}) {
    const vectors = await this.#client.call("embed", { texts: [texts].flat(), options });
    return Array.isArray(texts) ? vectors : vectors[0];
  }

  dispose() {
    this.#client.end();
  }
}
