/** Autoregressive decoding: read the prompt, then choose a token and read it, until the limit or the end. */

import { AbortError, InputError } from "./errors.js";
import { breather } from "./platform.js";
import { sampler } from "./sampling.js";
import { Pieces, Until } from "./text.js";

/**
 * @param {import("./session.js").Session} session @param {number[]} prompt
 * @param {{maxNewTokens?: number, stop?: any, temperature?: number, topK?: number, topP?: number, seed?: number}} options
 * @param {((ids: number[]) => string) | undefined} decode for text
 * @param {{signal: AbortSignal, onToken: (token: {id: number, text: string}) => void}} caller
 */
export async function generate(session, prompt, options, decode, { signal, onToken }) {
  const { ids: ends, texts } = stops(options.stop, session.generation.eos_token_ids, decode);
  const choose = sampler(options);
  const count = budget(session.generation.max_length, prompt.length, options.maxNewTokens);
  const pieces = new Pieces(decode ?? (() => ""));
  const until = new Until(texts);
  const result = { text: "", ids: /** @type {number[]} */ ([]), finish: "length", promptTokens: prompt.length };
  const start = performance.now();
  let first = start;
  const measured = () => timed(result, start, first);
  const exact = options.seed !== undefined;
  const breathe = breather();
  let next = prompt;
  const listen = async () => {
    await breathe();
    if (signal.aborted) throw Object.assign(new AbortError("cancelled by the caller"), { partial: measured() });
  };
  while (result.ids.length < count) {
    await listen();
    const id = choose(result.ids.length ? await session.feed(next) : await session.begin(next, exact, listen));
    if (!result.ids.length) first = performance.now();
    result.ids.push(id);
    next = [id];
    const ended = ends.includes(id);
    const text = ended ? "" : until.push(pieces.push(id));
    result.text += text;
    onToken({ id, text });
    if (ended || until.found) {
      result.finish = "stop";
      break;
    }
  }
  const rest = until.found ? "" : until.push(pieces.end()) + until.end();
  result.text += rest;
  if (rest) onToken({ id: -1, text: rest });
  return measured();
}

function timed(result, start, first) {
  const seconds = { first: (first - start) / 1e3, total: (performance.now() - start) / 1e3 };
  const rest = result.ids.length - 1;
  return { ...result, seconds, tokensPerSecond: rest > 0 ? rest / (seconds.total - seconds.first) : 0 };
}

/** The ids and texts that end a sequence; ids that are given take the place of the model's own. */
function stops(given, ends, decode) {
  const items = given === undefined ? [] : [given].flat();
  const wrong = items.find((item) => item === "" || !(typeof item === "string" || Number.isInteger(item)));
  if (wrong !== undefined) throw new InputError(`stop has ${wrong}, expected token ids and texts`);
  const texts = items.filter((item) => typeof item === "string");
  const ids = items.filter((item) => typeof item === "number");
  if (texts.length && !decode) throw new InputError("stop has texts, but this model has no tokenizer");
  return { ids: ids.length || (given !== undefined && !texts.length) ? ids : ends, texts };
}

function budget(limit, length, wanted) {
  if (wanted === undefined) return Math.max(0, limit - length);
  if (!Number.isInteger(wanted) || wanted < 0)
    throw new InputError(`maxNewTokens is ${wanted}, expected a whole number, 0 or more`);
  if (length + wanted <= limit) return wanted;
  const total = `${length} prompt tokens + ${wanted} new tokens = ${length + wanted}`;
  throw new InputError(`${total}, above the compiled maximum of ${limit}`, {
    hint: `maxNewTokens may be up to ${Math.max(0, limit - length)}`,
  });
}
