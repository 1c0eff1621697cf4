/** A folder on a server -> an engine: choose the code, fill the memory with the weights, start the threads. */

import { firstInstance } from "./code.js";
import { Engine } from "./engine.js";
import { ArtefactError } from "./errors.js";
import { choose } from "./features.js";
import { Files } from "./files.js";
import { Heap } from "./heap.js";
import { folderUrl } from "./platform.js";
import { openStorage } from "./storage.js";
import { loadTokenizer } from "./text.js";

/** Shards that are on their way at once. */
const STREAMS = 3;

/**
 * @param {{url: string, threads?: number, isa?: string, storage?: string, retries?: {count: number, delay: number}}} wanted
 * @param {Map<string, Uint8Array>} kept what broken downloads left in memory
 * @param {{signal: AbortSignal, report: (event: object) => void}} caller
 */
export async function loadModel(wanted, kept, { signal, report }) {
  const start = performance.now();
  const store = await openStorage(wanted.storage, kept);
  const retries = wanted.retries ?? { count: 4, delay: 300 };
  const strict = wanted.storage !== undefined && wanted.storage !== "memory";
  const files = new Files(await folderUrl(wanted.url), store, { signal, retries, report, strict });
  const manifest = await files.manifest();
  const spec = (/** @type {string} */ file) => specOf(manifest, file);
  const chosen = await choose(manifest.isas, wanted);
  const index = JSON.parse(new TextDecoder().decode(await files.whole(spec("weights.json"))));
  const code = spec(`code/${chosen.isa}.wasm`);
  const text = "tokenizer.json" in manifest.files ? [spec("tokenizer.json")] : [];
  await files.expect([spec("weights.json"), code, ...text, ...index.shards]);
  const module = await WebAssembly.compile(/** @type {BufferSource} */ (await files.whole(code)));
  const heap = new Heap(chosen.isa.endsWith("-threads"), index.bytes);
  const first = await firstInstance(module, heap.memory);
  heap.reserve(first.__heap_base.value);
  const base = heap.alloc(index.bytes);
  const [engine, tokenizer] = await Promise.all([
    Engine.start(manifest, heap, module, first, chosen.threads, placed(manifest, index, base)),
    text.length ? readTokenizer(await files.whole(text[0])) : undefined,
    fill(files, index.shards, heap, base),
  ]);
  const { threads, isa } = chosen;
  const notes = [...chosen.notes, ...files.notes];
  const seconds = (performance.now() - start) / 1e3;
  return { engine, tokenizer, files, facts: { isa, threads, notes, storage: files.storage.kind, seconds } };
}

function specOf(manifest, file) {
  const found = manifest.files[file];
  if (found) return { file, ...found };
  throw new ArtefactError(`the manifest lists no ${file}`, { hint: "compile the model again" });
}

/** Where every weight lies. @returns {Map<string, number>} */
function placed(manifest, index, base) {
  const used = new Set(Object.values(manifest.entries).flatMap((entry) => entry.weights));
  const missing = [...used].find((name) => !(name in index.tensors));
  if (missing) throw new ArtefactError(`weights.json has no tensor ${missing}`, { hint: "compile the model again" });
  return new Map([...used].map((name) => [name, base + index.tensors[name].offset]));
}

async function fill(files, shards, heap, base) {
  const ends = [];
  shards.reduce((at, shard) => (ends.push(at), at + shard.bytes), base);
  const rest = shards.map((shard, number) => ({ shard, at: ends[number] }));
  const stream = async () => {
    for (let next = rest.shift(); next; next = rest.shift())
      await files.into(next.shard, heap.view(Uint8Array, next.at, next.shard.bytes));
  };
  await Promise.all(Array.from({ length: STREAMS }, stream));
}

/** The tokenizer, or why there is none. */
async function readTokenizer(bytes) {
  return loadTokenizer(JSON.parse(new TextDecoder().decode(bytes))).catch((error) => ({ error }));
}
