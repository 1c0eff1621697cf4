/** Every error raised on purpose: what was found, what was expected, and what to do. */

export class SylvesterError extends Error {
  /** @param {string} message @param {{hint?: string, cause?: unknown, code?: string}} [options] */
  constructor(message, { hint = "", cause, code = "error" } = {}) {
    super(hint ? `${message}\nhint: ${hint}` : message, cause === undefined ? undefined : { cause });
    this.name = new.target.name;
    this.code = code;
    this.hint = hint;
  }
}

/** @param {string} code */
const kind = (code) =>
  class extends SylvesterError {
    /** @param {string} message @param {{hint?: string, cause?: unknown}} [options] */
    constructor(message, options = {}) {
      super(message, { ...options, code });
    }
  };

/** A call gave an input of the wrong name, shape, type or length. */
export class InputError extends kind("input") {}
/** A file of the model is truncated, edited, foreign, or of another version. */
export class ArtefactError extends kind("artefact") {}
/** The storage that was asked for has no room. */
export class QuotaError extends kind("quota") {}
/** A file could not be fetched. */
export class NetworkError extends kind("network") {}
/** This engine, or this model, has no way to do what was asked. */
export class UnsupportedError extends kind("unsupported") {}
/** The caller's signal ended the work; `partial` is what was made until then, if anything. */
export class AbortError extends kind("abort") {
  partial = undefined;
}

const KINDS = { InputError, ArtefactError, QuotaError, NetworkError, UnsupportedError, AbortError, SylvesterError };

/** What crosses from a worker to the page. @param {any} error */
export function toPlain(error) {
  const name = error instanceof SylvesterError ? error.name : "SylvesterError";
  const hint = error?.hint ?? "";
  const text = String(error?.message ?? error);
  const message = hint ? text.slice(0, -`\nhint: ${hint}`.length) : text;
  const outside = error instanceof SylvesterError ? "" : `${error?.name ?? "Error"}: `;
  return { name, message: outside + message, hint, stack: error?.stack, partial: error?.partial };
}

/** @param {ReturnType<typeof toPlain>} plain */
export function fromPlain({ name, message, hint, stack, partial }) {
  const error = new KINDS[/** @type {keyof typeof KINDS} */ (name)](message, { hint });
  if (stack) error.stack = stack;
  if (error instanceof AbortError) error.partial = partial;
  return error;
}

/** @param {AbortSignal} [signal] */
export function throwIfAborted(signal) {
  if (signal?.aborted) throw new AbortError("cancelled by the caller");
}
