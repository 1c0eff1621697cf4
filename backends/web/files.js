/** The files of a model, each checked by its hash, from storage or the network. */

import { ArtefactError, NetworkError, QuotaError, throwIfAborted } from "./errors.js";
import { fetchFrom, fetchWhole } from "./fetching.js";
import { digest } from "./platform.js";
import { locked, openStorage, room } from "./storage.js";

/** @typedef {{file: string, bytes: number, sha256: string}} FileSpec */

export class Files {
  /**
   * @param {string} base @param {import("./storage.js").Storage} storage
   * @param {{signal: AbortSignal, retries: {count: number, delay: number}, report: (event: object) => void,
   *   strict: boolean}} options `strict`: no room is an error
   */
  constructor(base, storage, options) {
    this.base = base;
    this.storage = storage;
    this.options = options;
    /** @type {string[]} What the caller should know. */
    this.notes = [];
    this.loaded = 0;
    this.total = 0;
  }

  /** manifest.json, which says how the other files hash; what is stored serves without a network. */
  async manifest() {
    const url = `${this.base}manifest.json`;
    const name = `manifest-${await digest(new TextEncoder().encode(this.base))}`;
    const stored = await this.storedManifest(name);
    const { signal, retries } = this.options;
    const once = { ...retries, count: stored ? 0 : retries.count };
    try {
      const bytes = await fetchWhole(url, { signal, retries: once, cache: "no-cache" });
      const manifest = parse(url, new TextDecoder().decode(bytes));
      await locked(name, () => this.renew(name, manifest, stored, bytes), signal);
      return manifest;
    } catch (error) {
      if (!stored || !(error instanceof NetworkError)) throw error;
      this.notes.push("offline: the stored model is used");
      return stored;
    }
  }

  async storedManifest(name) {
    const text = await (await this.storage.read(name))?.text();
    try {
      return text && parse("the stored manifest", text);
    } catch {
      return undefined;
    }
  }

  /** Drops what only the stored model had. */
  async renew(name, manifest, stored, bytes) {
    const used = new Set(Object.values(manifest.files).map((spec) => spec.sha256));
    for (const spec of Object.values(stored?.files ?? {}))
      if (!used.has(spec.sha256)) await this.storage.remove(spec.sha256);
    await this.keep(name, bytes);
  }

  /** Looks whether what is missing may be stored. @param {FileSpec[]} specs */
  async expect(specs) {
    this.total = specs.reduce((sum, spec) => sum + spec.bytes, 0);
    if (this.storage.kind === "memory") return;
    let missing = 0;
    for (const spec of specs) if (!(await this.storage.read(spec.sha256))) missing += spec.bytes;
    const free = await room();
    if (missing > free) await this.refuse(`${missing} bytes do not fit the ${Math.floor(free)} that are free`);
  }

  /** @param {FileSpec} spec */
  async whole(spec) {
    const bytes = new Uint8Array(spec.bytes);
    await this.into(spec, bytes);
    return bytes;
  }

  /** Fills `target`, which has the size of the file. @param {FileSpec} spec @param {Uint8Array} target */
  async into(spec, target) {
    const { signal } = this.options;
    try {
      await locked(spec.sha256, async () => {
        if (await this.restore(spec, target)) return;
        await this.download(spec, target);
        await this.keep(spec.sha256, target);
      }, signal);
    } catch (error) {
      throwIfAborted(signal);
      throw error;
    }
  }

  async restore(spec, target) {
    const blob = await this.storage.read(spec.sha256);
    if (blob?.size === spec.bytes) {
      await pour(blob, target);
      if ((await digest(target)) === spec.sha256) {
        this.report("stored", spec.file, target.length);
        return true;
      }
    }
    if (blob) await this.storage.remove(spec.sha256);
    return false;
  }

  async download(spec, target) {
    const part = `${spec.sha256}.part`;
    const begun = await this.storage.read(part);
    let from = begun && begun.size <= spec.bytes ? await pour(begun, target) : 0;
    // What is stored here need not lie in the browser's own cache too.
    const usual = this.storage.kind === "memory" ? "default" : "no-store";
    for (const cache of /** @type {const} */ ([usual, "reload"])) {
      await this.fetch(spec, target, from, cache, part);
      await this.storage.remove(part);
      const found = await digest(target);
      if (found === spec.sha256) return;
      if (cache === "reload") throw broken(spec, found);
      this.report("broken", spec.file, -target.length);
      from = 0;
    }
  }

  async fetch(spec, target, from, cache, part) {
    const { signal, retries } = this.options;
    let at = from;
    this.report("download", spec.file, from);
    try {
      await fetchFrom(this.base + spec.file, from, (start, chunk) => {
        target.set(chunk, start);
        this.report("download", spec.file, start + chunk.length - at);
        at = start + chunk.length;
      }, { signal, retries, size: spec.bytes, cache });
    } catch (error) {
      if (at) await this.storage.write(part, target.subarray(0, at)).catch(() => {});
      throw error;
    }
  }

  async keep(name, bytes) {
    try {
      await this.storage.write(name, bytes);
    } catch (error) {
      await this.refuse(error?.message ?? String(error), error);
    }
  }

  /** Goes on without storage, unless the caller asked for it. */
  async refuse(reason, cause) {
    if (this.options.strict) throw new QuotaError(`cannot store the model: ${reason}`, { cause });
    this.notes.push(`the model is not stored for the next visit: ${reason}`);
    this.storage = await openStorage("memory", new Map());
  }

  report(status, file, more) {
    this.loaded += more;
    this.options.report({ status, file, loaded: this.loaded, total: this.total });
  }
}

/** Copies a stored file without holding it twice. @param {Blob} blob @param {Uint8Array} target */
async function pour(blob, target) {
  const reader = blob.stream().getReader();
  for (let at = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return at;
    target.set(value, at);
    at += value.length;
  }
}

function parse(url, text) {
  const hint = "give the address of a folder that `sylvester compile --target wasm` wrote";
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new ArtefactError(`${url} is not JSON: ${error.message}`, { hint });
  }
  if (manifest?.producer !== "sylvester" || manifest.target !== "wasm")
    throw new ArtefactError(`${url} describes no model for the web`, { hint });
  if (manifest.format !== 1)
    throw new ArtefactError(`${url} has format ${manifest.format}, this version reads format 1`, {
      hint: "compile the model again; model.js lies beside the manifest it fits",
    });
  return manifest;
}

function broken(spec, found) {
  return new ArtefactError(`${spec.file} has the sha256 ${found}, expected ${spec.sha256}`, {
    hint: "the server has a broken copy: upload the whole folder again",
  });
}
