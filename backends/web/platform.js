/** What differs between a page, a worker and Node: workers, local files, cores, hashes. */

import { NetworkError } from "./errors.js";
import { sha256 } from "./sha256.js";

export const isNode = typeof process === "object" && !!process.versions?.node;

/** A worker with one way to talk to it. @param {URL} url */
export async function spawn(url) {
  if (!isNode) return pageWorker(url);
  const { Worker } = await import("node:worker_threads");
  // Workers inherit the options of Node, among which that of a script on the command line would refuse a file.
  const typed = process.execArgv.some((option) => option.startsWith("--input-type"));
  const worker = new Worker(url, typed ? { execArgv: [] } : {});
  return {
    post: (message, transfer) => worker.postMessage(message, transfer),
    listen: (heard, failed) => worker.on("message", heard).on("error", failed),
    /** Whether the process waits for it. */
    hold: (held) => (held ? worker.ref() : worker.unref()),
    end: () => void worker.terminate(),
  };
}

function pageWorker(url) {
  const worker = new Worker(url, { type: "module" });
  return {
    post: (message, transfer = []) => worker.postMessage(message, transfer),
    listen(heard, failed) {
      worker.onmessage = (event) => heard(event.data);
      worker.onerror = (event) => failed(new Error(event.message || `cannot start the worker ${url}`));
    },
    hold: () => {},
    end: () => worker.terminate(),
  };
}

/** Inside a worker: the way to who started it. @param {(message: any) => void} heard */
export async function parent(heard) {
  if (!isNode) {
    self.onmessage = (event) => heard(event.data);
    return (message, transfer = []) => self.postMessage(message, { transfer });
  }
  const { parentPort } = await import("node:worker_threads");
  parentPort.on("message", heard);
  return (message, transfer) => parentPort.postMessage(message, transfer);
}

/** How long, in ms, work goes on without looking at messages. */
export const BREATH = 8;

/** Lets messages in: when it is first asked, and after every breath of work. @returns {() => Promise<void>} */
export function breather() {
  let last = -Infinity;
  return async () => {
    if (performance.now() - last < BREATH) return;
    await breathe();
    last = performance.now();
  };
}

/** Lets messages in. */
export const breathe = isNode ? () => new Promise((next) => setImmediate(next)) : pageBreath();

function pageBreath() {
  const { port1, port2 } = new MessageChannel();
  const waiting = [];
  port1.onmessage = () => waiting.shift()();
  return () => new Promise((next) => (waiting.push(next), port2.postMessage(0)));
}

/** As `fetch`, for local files as well. @param {string} url @param {RequestInit & {from?: number}} options */
export async function request(url, { from = 0, ...options } = {}) {
  if (isNode && url.startsWith("file:")) return localFile(new URL(url), from);
  return fetch(url, from ? { ...options, headers: { Range: `bytes=${from}-` } } : options);
}

async function localFile(url, from) {
  const { createReadStream, existsSync } = await import("node:fs");
  const { Readable } = await import("node:stream");
  if (!existsSync(url)) {
    const missing = new NetworkError(`no file ${url.pathname}`, { hint: "give the folder of the model" });
    throw Object.assign(missing, { final: true });
  }
  const body = Readable.toWeb(createReadStream(url, { start: from }));
  return new Response(/** @type {any} */ (body), { status: from ? 206 : 200 });
}

/** The folder of a model as a URL that ends in a slash. @param {string | URL} given */
export async function folderUrl(given) {
  const text = String(given);
  if (isNode && !/^[a-z]+:\/\//i.test(text)) {
    const { pathToFileURL } = await import("node:url");
    return pathToFileURL(`${text.replace(/\/$/, "")}/`).href;
  }
  const url = new URL(text, globalThis.location?.href);
  return url.href.endsWith("/") ? url.href : `${url.href}/`;
}

export async function cores() {
  return isNode ? (await import("node:os")).availableParallelism() : navigator.hardwareConcurrency || 1;
}

/** In hexadecimal. Engines hash plain memory only. @param {Uint8Array} bytes */
export async function digest(bytes) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) return sha256(bytes);
  const plain = bytes.buffer instanceof ArrayBuffer ? bytes : bytes.slice();
  const hash = new Uint8Array(await subtle.digest("SHA-256", /** @type {BufferSource} */ (plain)));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
