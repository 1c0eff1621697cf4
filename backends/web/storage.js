/** Files kept between visits, by name: in the origin's private file system, else the Cache API, else memory. */

import { QuotaError, UnsupportedError } from "./errors.js";

/**
 * @typedef {object} Storage
 * @property {"opfs" | "cache" | "memory"} kind
 * @property {(name: string) => Promise<Blob | null>} read
 * @property {(name: string, bytes: Uint8Array) => Promise<void>} write whole or not at all
 * @property {(name: string) => Promise<void>} remove
 */

const FOLDER = "sylvester";

/** @param {string | undefined} asked @param {Map<string, Uint8Array>} kept @returns {Promise<Storage>} */
export async function openStorage(asked, kept) {
  const makers = { opfs: openFiles, cache: openCache, memory: async () => openMemory(kept) };
  if (asked !== undefined) {
    if (!(asked in makers)) throw new UnsupportedError(`no storage is named ${asked}; there are opfs, cache, memory`);
    const found = await makers[asked]();
    if (!found) throw new UnsupportedError(`this engine has no storage ${asked}`, { hint: "leave out `storage`" });
    return found;
  }
  return (await openFiles()) ?? (await openCache()) ?? openMemory(kept);
}

/** Bytes that may still be stored; infinite where the engine does not say. */
export async function room() {
  const found = await globalThis.navigator?.storage?.estimate?.().catch(() => undefined);
  return found?.quota === undefined ? Infinity : found.quota - (found.usage ?? 0);
}

/** One tab at a time works on a file. @template T @param {string} name @param {() => Promise<T>} work */
export async function locked(name, work, signal) {
  const locks = globalThis.navigator?.locks;
  return locks ? locks.request(`${FOLDER}/${name}`, { signal }, work) : work();
}

async function openFiles() {
  let folder;
  try {
    folder = await (await navigator.storage.getDirectory()).getDirectoryHandle(FOLDER, { create: true });
  } catch {
    return null;
  }
  const file = (/** @type {string} */ name, create = false) => folder.getFileHandle(name, { create });
  return /** @type {Storage} */ ({
    kind: "opfs",
    read: (name) => file(name).then((found) => found.getFile(), () => null),
    remove: (name) => folder.removeEntry(name).catch(() => {}),
    async write(name, bytes) {
      const draft = `${name}.${Math.random().toString(36).slice(2)}`;
      const handle = await file(draft, true);
      try {
        await fill(handle, bytes);
        if (handle.move) await handle.move(name);
        else await fill(await file(name, true), bytes);
      } catch (error) {
        throw asQuota(error);
      } finally {
        if (!handle.move || handle.name === draft) await folder.removeEntry(draft).catch(() => {});
      }
    },
  });
}

async function fill(handle, bytes) {
  const access = await handle.createSyncAccessHandle();
  try {
    access.truncate(0);
    for (let at = 0; at < bytes.length; ) at += access.write(bytes.subarray(at), { at });
    access.flush();
  } finally {
    access.close();
  }
}

async function openCache() {
  if (typeof caches === "undefined") return null;
  const cache = await caches.open(FOLDER).catch(() => null);
  const key = (/** @type {string} */ name) => `/${FOLDER}/${encodeURIComponent(name)}`;
  return (
    cache &&
    /** @type {Storage} */ ({
      kind: "cache",
      read: async (name) => (await (await cache.match(key(name)))?.blob()) ?? null,
      remove: async (name) => void (await cache.delete(key(name))),
      write: (name, bytes) =>
        cache.put(key(name), new Response(new Blob([plain(bytes)]))).catch((error) => {
          throw asQuota(error);
        }),
    })
  );
}

/** @param {Map<string, Uint8Array>} kept @returns {Storage} */
function openMemory(kept) {
  return {
    kind: "memory",
    read: async (name) => (kept.has(name) ? new Blob([/** @type {BlobPart} */ (kept.get(name))]) : null),
    remove: async (name) => void kept.delete(name),
    // Whole files live in the model's own memory: only what is needed to go on after a break is kept here.
    write: async (name, bytes) => void (name.endsWith(".part") && kept.set(name, plain(bytes))),
  };
}

/** Not shared with threads: stores take no other. @param {Uint8Array} bytes */
const plain = (bytes) => /** @type {Uint8Array<ArrayBuffer>} */ (bytes.slice());

function asQuota(error) {
  if (error?.name !== "QuotaExceededError") return error;
  return new QuotaError("the storage of this site is full", { cause: error, hint: "free some space" });
}
