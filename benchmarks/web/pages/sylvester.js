/** A compiled model, used as a page would: through `generate` and `run`, once it is tuned. */

export async function open({ url, threads }) {
  const { load } = await import(`${url}model.js`);
  const isa = threads > 1 ? "relaxed-threads" : "relaxed";
  const model = await load({ url: new URL(url, location.href).href, threads, isa, storage: "memory" });
  const generate = (ids, maxNewTokens, options = {}) => model.generate(ids, { maxNewTokens, stop: [], ...options });
  await ("prefill" in model.manifest.entries ? generate([1, 2, 3], 2) : model.run(encoded([5, 6, 7])));
  await model.tuned;
  const measure = {
    /** ms of a token, sampling and messages included; the caches hold the prompt from the second call on */
    async decode({ ids, steps }) {
      const { seconds } = await generate(ids, steps + 1);
      return (1e3 * (seconds.total - seconds.first)) / steps;
    },
    /** a seed has the whole prompt read again */
    prefill: async ({ ids }) => 1e3 * (await generate(ids, 1, { seed: 1 })).seconds.first,
    async encode({ ids }) {
      const start = performance.now();
      await model.run(encoded(ids));
      return performance.now() - start;
    },
  };
  const check = {
    async tokens({ ids, steps }) {
      const found = await generate(ids, steps);
      const entry = "start" in model.manifest.entries ? "start" : "prefill";
      const { logits } = await model.run({ input_ids: [ids] }, { entry });
      const width = logits.shape.at(-1);
      return { tokens: found.ids, logits: Array.from(logits.data.slice(-width)) };
    },
    hidden: async ({ ids }) => ({ hidden: Array.from((await model.run(encoded(ids))).last_hidden_state.data) }),
  };
  return { measure, check, facts: model.facts };
}

const encoded = (ids) => ({ input_ids: [ids], attention_mask: [ids.map(() => 1)] });

/** ms from the call of `load` in a page that knows the model to the first token. */
export async function firstToken({ url, ids }) {
  const { load } = await import(`${url}model.js`);
  const start = performance.now();
  const model = await load({ url: new URL(url, location.href).href });
  let first = 0;
  await model.generate(ids, { maxNewTokens: 1, onToken: () => (first = performance.now() - start) });
  const { facts } = model;
  model.dispose();
  return { ms: first, facts };
}
