/** One sequence in the caches of a model: read tokens, get the logits of what follows, go back to an earlier place. */

import { asked } from "./binding.js";
import { InputError, UnsupportedError } from "./errors.js";
import { floats } from "./tensors.js";

/** Tokens of a prompt that one call reads, where reading it in parts changes nothing: that bounds the memory. */
const CHUNK = 256;

/** What the model says of generation, or an error where it cannot generate. */
export function generationOf(manifest) {
  const { entries, generation } = manifest;
  const needed = ["prefill", "decode", ...(generation?.stages ?? []).map((stage) => stage.entry)];
  if (!generation || needed.some((name) => !(name in entries)))
    throw new UnsupportedError(`this model cannot generate: it has the entries ${Object.keys(entries).join(", ")}`, {
      hint: "compile a causal language model",
    });
  return generation;
}

export class Session {
  /** @param {import("./engine.js").Engine} engine */
  constructor(engine) {
    this.engine = engine;
    this.generation = generationOf(engine.manifest);
    const specs = asked(engine.manifest.entries.prefill);
    if (specs.length !== 1)
      throw new UnsupportedError(`text is made from token ids only, this model takes ${specs.map((s) => s.name)}`);
    this.input = specs[0];
    this.first = "start" in engine.manifest.entries ? "start" : "prefill";
    const { outputs } = engine.manifest.entries.decode;
    const width = (outputs.find((spec) => spec.name === "logits") ?? outputs[0]).shape.at(-1);
    /** How many token ids there are; infinite where the manifest does not say. */
    this.vocabulary = typeof width === "number" ? width : Infinity;
    /** @type {number[]} What the caches hold. */
    this.tokens = [];
    this.prompt = 0;
    /** @type {import("./engine.js").State | undefined} */
    this.state = undefined;
  }

  /**
   * Begins with a prompt; what the caches hold of it already is not read again, unless every bit matters: what is read
   * in other parts is rounded otherwise.
   * @param {number[]} prompt @param {boolean} exact @param {() => Promise<void>} [between] awaited between calls
   */
  async begin(prompt, exact, between) {
    this.require(prompt);
    const held = this.state && this.state === this.engine.owner && this.generation.uniform && !exact;
    const kept = held ? this.common(prompt) : 0;
    const symbol = this.input.shape[0];
    if (!kept) this.state = this.engine.newState(typeof symbol === "string" ? { [symbol]: 1 } : {});
    this.tokens.length = this.state.position = kept;
    this.prompt = prompt.length;
    return this.feed(prompt.slice(kept), between);
  }

  /**
   * Reads tokens after those held; logits of what follows, good until the next call.
   * @param {number[]} tokens @param {() => Promise<void>} [between]
   */
  async feed(tokens, between) {
    let logits;
    for (let at = 0; at < tokens.length; ) {
      if (at) await between?.();
      const { entry, length } = this.call(tokens.length - at);
      logits = await this.read(entry, tokens.slice(at, at + length));
      at += length;
    }
    return logits;
  }

  /** Positions that are left. */
  get room() {
    return this.generation.max_length - this.state.position;
  }

  /** How many tokens at the beginning the caches hold; the last one is always read. */
  common(prompt) {
    const end = Math.min(prompt.length - 1, this.tokens.length);
    const differs = this.tokens.slice(0, end).findIndex((token, index) => token !== prompt[index]);
    return differs < 0 ? end : differs;
  }

  require(prompt) {
    const limit = this.generation.max_length;
    if (!prompt.length)
      throw new InputError("the prompt has no tokens", { hint: "begin with the token that begins texts" });
    if (prompt.length > limit)
      throw new InputError(`the prompt has ${prompt.length} tokens, above the compiled maximum of ${limit}`);
    const wrong = prompt.find((id) => !Number.isInteger(id) || id < 0 || id >= this.vocabulary);
    if (wrong !== undefined)
      throw new InputError(`the prompt has the token id ${wrong}, expected 0 to ${this.vocabulary - 1}`, {
        hint: "encode the text with the tokenizer of this model",
      });
  }

  /** The entry for the next call, and how many of `rest` tokens it reads. */
  call(rest) {
    const { position } = this.state;
    const { stages, uniform } = this.generation;
    const most = uniform ? Math.min(rest, CHUNK) : rest;
    if (!position) return { entry: this.first, length: stages.length ? Math.min(most, this.prompt) : most };
    const entry = this.entryAt(position);
    let length = 1;
    while (length < most && this.entryAt(position + length) === entry) length++;
    return { entry, length };
  }

  /** The variant of `decode` that reads a position: of the stages that are reached, the last. */
  entryAt(position) {
    const generated = Math.max(0, position - this.prompt + 1);
    const reached = this.generation.stages.filter((s) => s.position <= position && s.generated <= generated);
    return reached.at(-1)?.entry ?? "decode";
  }

  /** @returns {Promise<Float32Array>} */
  async read(entry, tokens) {
    const ids = { data: BigInt64Array.from(tokens, BigInt), shape: [1, tokens.length] };
    const outputs = await this.engine.run(entry, { [this.input.name]: ids }, this.state);
    this.tokens.push(...tokens);
    this.state.position = this.tokens.length;
    const { data, dtype, shape } = outputs.logits ?? Object.values(outputs)[0];
    const width = /** @type {number} */ (shape.at(-1));
    return floats(/** @type {any} */ (data).subarray(data.length - width), dtype);
  }
}
