/** Text to token ids and back, and text that streams without breaking a character. */

import { UnsupportedError } from "./errors.js";

const BROKEN = "\ufffd";

/** @param {any} json the content of tokenizer.json */
export async function loadTokenizer(json) {
  const { Tokenizer } = await import(/* webpackIgnore: true */ "./vendor/tokenizers.min.mjs").catch((cause) => {
    throw new UnsupportedError("this bundle has no tokenizer code, so that texts cannot be read", {
      cause,
      hint: "give token ids; to bundle it, install npm and compile again (the report says why it was left out)",
    });
  });
  const tokenizer = new Tokenizer(json, {});
  return {
    encode: (/** @type {string} */ text) => /** @type {number[]} */ (tokenizer.encode(text).ids),
    decode: (/** @type {number[]} */ ids) =>
      ids.length
        ? /** @type {string} */ (
            tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false })
          )
        : "",
  };
}

/** Text of a stream of ids, as soon as it is complete: a character may span tokens, and a token need not end on one. */
export class Pieces {
  /** @param {(ids: number[]) => string} decode */
  constructor(decode) {
    this.decode = decode;
    /** @type {number[]} */
    this.window = [];
    this.shown = "";
  }

  /** @param {number} id */
  push(id) {
    this.window.push(id);
    const text = this.decode(this.window);
    if (text.endsWith(BROKEN) || text.length <= this.shown.length) return "";
    const piece = text.slice(this.shown.length);
    const last = this.decode(this.window.slice(-1));
    if (this.window.length > 1 && last && !last.includes(BROKEN) && text.endsWith(last))
      this.window = this.window.slice(-1);
    this.shown = this.decode(this.window);
    return piece;
  }

  end() {
    return this.decode(this.window).slice(this.shown.length);
  }
}

/** Holds back what may be the beginning of a text that ends the stream. */
export class Until {
  /** @param {string[]} stops */
  constructor(stops) {
    this.stops = stops;
    this.held = "";
    this.found = false;
  }

  /** @param {string} piece @returns {string} what is known not to begin a stop */
  push(piece) {
    this.held += piece;
    const places = this.stops.map((stop) => this.held.indexOf(stop)).filter((at) => at >= 0);
    if (places.length) {
      this.found = true;
      return this.take(Math.min(...places));
    }
    let keep = 0;
    for (const stop of this.stops)
      for (let n = 1; n < stop.length; n++) if (this.held.endsWith(stop.slice(0, n))) keep = Math.max(keep, n);
    return this.take(this.held.length - keep);
  }

  end() {
    return this.found ? "" : this.take(this.held.length);
  }

  take(count) {
    const text = this.held.slice(0, count);
    this.held = this.held.slice(count);
    return text;
  }
}
