/** Graphs of one artefact in onnxruntime-web; prints what `given.work` finds as JSON. The request is on stdin. */

import { readFileSync } from "node:fs";

const given = JSON.parse(readFileSync(0, "utf8"));
const ort = await import(`${given.runtime}ort.wasm.min.mjs`);
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmBinary = readFileSync(new URL(`${given.runtime}ort-wasm-simd-threaded.wasm`));
ort.env.wasm.wasmPaths = given.runtime;
ort.env.logLevel = "error";

const file = (name) => readFileSync(new URL(given.artefact + name));
const weights = file("weights.bin");
const open = (entry) =>
  ort.InferenceSession.create(file(`${entry}.onnx`), {
    executionProviders: ["wasm"], externalData: [{ path: "weights.bin", data: weights }],
  });
const int64 = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const best = (values) => values.reduce((most, value, index) => (value > values[most] ? index : most), 0);
const caches = (found) =>
  Object.fromEntries(given.caches.map(({ past, present }) => [past, found[present]]));
const zeros = () =>
  Object.fromEntries(given.caches.map(({ past, shape }) =>
    [past, new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b)), shape)]));

const works = {
  /** Greedy tokens after a prompt, and the logits that chose each. */
  async tokens({ prompt, steps }) {
    const [start, decode] = [await open("start"), await open("decode")];
    let found = await start.run({ input_ids: int64(prompt, [1, prompt.length]), ...zeros() });
    const tokens = [], logits = [];
    for (;;) {
      logits.push(Array.from(found.logits.data));
      tokens.push(best(found.logits.data));
      if (tokens.length === steps) return { tokens, logits };
      const past = prompt.length + tokens.length - 1;
      found = await decode.run({ input_ids: int64(tokens.slice(-1), [1, 1]), past: int64([past], []), ...caches(found) });
    }
  },
  async outputs({ ids, mask }) {
    const dims = [ids.length, ids[0].length];
    const session = await open("forward");
    const found = await session.run({ input_ids: int64(ids.flat(), dims), attention_mask: int64(mask.flat(), dims) });
    return Object.fromEntries(session.outputNames.map((name) => [name, Array.from(found[name].data)]));
  },
};

process.stdout.write(JSON.stringify(await works[given.work](given)));
