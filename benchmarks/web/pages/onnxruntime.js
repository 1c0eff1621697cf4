/** onnxruntime-web on its WebAssembly provider. A decode step fetches the logits and leaves the new caches behind. */

import * as ort from "/npm/onnxruntime-web/dist/ort.wasm.min.mjs";

export async function open({ url, threads, layers, heads, width }) {
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = "/npm/onnxruntime-web/dist/";
  ort.env.logLevel = "error";
  const data = `${url}.data`;
  const found = await fetch(data, { method: "HEAD" });
  const externalData = found.ok ? [{ path: data.split("/").at(-1), data }] : [];
  const session = await ort.InferenceSession.create(url, {
    executionProviders: ["wasm"], graphOptimizationLevel: "all", externalData,
  });
  const names = Array.from({ length: layers }, (_, i) => [`${i}.key`, `${i}.value`]).flat();
  const empty = (length) => new ort.Tensor("float32", new Float32Array(heads * length * width), [1, heads, length, width]);
  const caches = (make) => Object.fromEntries(names.map((name) => [`past.${name}`, make(name)]));
  const whole = (ids) => feeds(ids, 0, caches(() => empty(0)));
  const timed = async (given, outputs) => {
    const start = performance.now();
    await session.run(given, outputs);
    return performance.now() - start;
  };
  const held = new Map();
  const step = async ({ ids, steps }) => {
    const length = ids.length + Math.floor(steps / 2);
    const prompt = Array.from({ length }, (_, i) => ids[i % ids.length]);
    const past = await session.run(whole(prompt));
    return feeds([ids[0]], length, caches((name) => past[`present.${name}`]));
  };
  const once = async (key, make) => {
    if (!held.has(key)) held.set(key, await make());
    return held.get(key);
  };
  const measure = {
    decode: async (given) => timed(await once("decode", () => step(given)), ["logits"]),
    prefill: async ({ ids }) => timed(await once("prefill", () => whole(ids)), ["logits"]),
    encode: async ({ ids }) => timed(await once("encode", () => encoded(session, ids))),
  };
  const check = {
    async tokens({ ids, steps }) {
      let answer = await session.run(whole(ids));
      const logits = Array.from(answer.logits.data);
      const tokens = [largest(answer.logits.data)];
      while (tokens.length < steps) {
        const past = answer;
        const length = ids.length + tokens.length - 1;
        answer = await session.run(feeds([tokens.at(-1)], length, caches((name) => past[`present.${name}`])));
        tokens.push(largest(answer.logits.data));
      }
      return { tokens, logits };
    },
    async hidden({ ids }) {
      const outputs = await session.run(encoded(session, ids));
      return { hidden: Array.from(outputs.hidden.data) };
    },
  };
  return { measure, check, facts: { threads: ort.env.wasm.numThreads, version: ort.env.versions.web } };
}

const largest = (values) => values.reduce((best, value, index) => (value > values[best] ? index : best), 0);

const int64 = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const int32 = (values, dims) => new ort.Tensor("int32", Int32Array.from(values), dims);

function feeds(ids, past, caches) {
  const total = past + ids.length;
  return {
    input_ids: int64(ids, [1, ids.length]),
    seqlens_k: int32([total - 1], [1]),
    total_sequence_length: int32([total], []),
    ...caches,
  };
}

/** The optimizer makes some inputs narrower. */
function encoded(session, ids) {
  const types = Object.fromEntries(session.inputMetadata.map(({ name, type }) => [name, type]));
  const made = (name, values) => (types[name] === "int32" ? int32 : int64)(values, [1, values.length]);
  return Object.fromEntries(
    session.inputNames.map((name) => [name, made(name, name === "input_ids" ? ids : ids.map(() => 1))]),
  );
}
