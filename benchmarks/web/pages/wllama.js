/** llama.cpp as wllama builds it, with its own timings, which leave out messages. */

import { Wllama } from "/npm/@wllama/wllama/esm/index.js";

const quiet = { debug() {}, log() {}, warn() {}, error: console.error };

export async function open({ url, threads, exact }) {
  const wllama = new Wllama({ default: "/npm/@wllama/wllama/esm/wasm/wllama.wasm" }, { logger: quiet });
  const blob = await (await fetch(url)).blob();
  const cache = exact ? { cache_type_k: "f32", cache_type_v: "f32" } : {};
  const sizes = { n_ctx: 512, n_batch: 512, n_ubatch: 512, n_parallel: 1, n_gpu_layers: 0 };
  await wllama.loadModel([blob], { n_threads: threads, ...sizes, ...cache });
  const complete = (prompt, count, options) =>
    wllama.createCompletion({
      prompt, max_tokens: count, temperature: 0, top_k: 1, ignore_eos: true, stream: false, ...options,
    });
  const measure = {
    /** the first of `predicted_n` tokens comes from the prompt */
    async decode({ text, steps }) {
      const { timings } = await complete(text, steps + 1, { cache_prompt: true });
      return timings.predicted_ms / (timings.predicted_n - 1);
    },
    async prefill({ text }) {
      return (await complete(text, 1, { cache_prompt: false })).timings.prompt_ms;
    },
  };
  const check = {
    async tokens({ ids, text, steps }) {
      const answer = await complete(text, steps, { cache_prompt: false, logprobs: 20 });
      if (answer.timings.prompt_n !== ids.length) throw new Error(`${answer.timings.prompt_n} tokens were read`);
      const all = answer.choices[0].logprobs.content;
      return {
        tokens: all.map(({ id }) => id),
        logprobs: all[0].top_logprobs.map(({ id, logprob }) => [id, logprob]),
      };
    },
  };
  return { measure, check, facts: { threads: wllama.getNumThreads(), version: Wllama.getLibllamaVersion() } };
}
