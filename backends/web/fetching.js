/** A file from the network as a stream of chunks: goes on where it broke off, tries again a few times. */

import { AbortError, ArtefactError, NetworkError, SylvesterError, throwIfAborted } from "./errors.js";
import { request } from "./platform.js";

/**
 * @typedef {object} Fetching
 * @property {AbortSignal} [signal]
 * @property {{count: number, delay: number}} retries attempts after the last one that brought bytes; milliseconds
 * @property {number} [size] bytes that the file has
 * @property {RequestCache} [cache]
 */

/** For good: another attempt would say the same. */
const FINAL = [400, 401, 403, 404, 405, 410, 451];

/**
 * Gives every chunk and where it begins to `take`; returns the number of bytes of the file. Where the server sends the
 * file from its beginning although a part was asked for, so does `take` get it.
 * @param {string} url @param {number} from @param {(at: number, chunk: Uint8Array) => void} take
 * @param {Fetching} options
 */
export async function fetchFrom(url, from, take, options) {
  let at = from;
  for (let attempt = 0; ; attempt++) {
    try {
      const before = at;
      at = await stream(url, at, options, (start, chunk) => {
        if (start + chunk.length > options.size) throw tooLong(url, options.size);
        take(start, chunk);
        at = start + chunk.length;
        if (at > before) attempt = 0;
      });
      if (at < options.size) throw new Error(`it ended after ${at} of ${options.size} bytes`);
      return at;
    } catch (error) {
      throwIfAborted(options.signal);
      if (error?.final || attempt >= options.retries.count) throw asNetwork(url, error);
    }
    await pause(options.retries.delay * 2 ** attempt, options.signal);
  }
}

/** @param {string} url @param {number} from @param {Fetching} options @param {Function} take */
async function stream(url, from, { signal, cache }, take) {
  const response = await request(url, { from, signal, cache });
  if (response.status === 416) return from;
  if (!response.ok) throw failure(`${url} answered ${response.status}`, FINAL.includes(response.status));
  let at = response.status === 206 ? from : 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return at;
    take(at, value);
    at += value.length;
  }
}

/** The whole file. @param {string} url @param {Fetching} options */
export async function fetchWhole(url, options) {
  /** @type {Uint8Array[]} */
  let parts = [];
  await fetchFrom(url, 0, (at, chunk) => {
    if (!at) parts = [];
    parts.push(chunk);
  }, options);
  return new Uint8Array(await new Blob(/** @type {BlobPart[]} */ (parts)).arrayBuffer());
}

function failure(message, final) {
  return Object.assign(new NetworkError(message, { hint: "check the address and the network" }), { final });
}

function tooLong(url, size) {
  const hint = "upload the whole folder again";
  return Object.assign(new ArtefactError(`${url} has more than the ${size} bytes of the manifest`, { hint }), {
    final: true,
  });
}

function asNetwork(url, error) {
  if (error instanceof SylvesterError) return error;
  return new NetworkError(`cannot fetch ${url}: ${error?.message ?? error}`, {
    cause: error,
    hint: "check the network; loading again goes on where it broke off",
  });
}

/** @param {number} milliseconds @param {AbortSignal} [signal] */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    const stop = () => (clearTimeout(timer), reject(new AbortError("cancelled by the caller")));
    signal?.addEventListener("abort", stop, { once: true });
  });
}
