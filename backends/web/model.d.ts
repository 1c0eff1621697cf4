/** Models that `sylvester compile --target wasm` wrote, in a page, a worker, or Node. */

export interface Progress {
  /** `broken`: a file did not have its hash and is fetched again. */
  status: "download" | "stored" | "broken";
  file: string;
  /** Bytes of all files. */
  loaded: number;
  total: number;
}

export interface LoadOptions {
  /** Threads to use; by default one less than the cores, at most 8. More than one need a cross-origin isolated page. */
  threads?: number;
  /** One build of the code instead of the fastest that runs here. */
  isa?: "simd128" | "relaxed" | "simd128-threads" | "relaxed-threads";
  /** Where files are kept for the next visit; by default the first that this engine has. */
  storage?: "opfs" | "cache" | "memory";
  /** How often a fetch is tried again after the last bytes came, and the milliseconds before the first time. */
  retries?: { count: number; delay: number };
  /**
   * Seconds that kernels may be timed on this device, once and after the first call; 30 by default, false for none.
   * What is found is kept for the next visit.
   */
  tune?: number | false;
  onProgress?: (progress: Progress) => void;
  /** Cancels; loading again goes on where it stopped. */
  signal?: AbortSignal;
}

/** Loads the folder at `url`: its manifest, code and weights, each checked by its hash. */
export function load(url: string | URL, options?: LoadOptions): Promise<Model>;
export function load(options: LoadOptions & { url: string | URL }): Promise<Model>;

export type Data =
  | Float32Array | Float64Array | BigInt64Array | Int32Array | Int16Array | Int8Array | Uint8Array | Uint16Array;

export interface Tensor {
  /** As PyTorch names it; bfloat16 and float16 are the bits in a Uint16Array, bool is a Uint8Array. */
  dtype: string;
  shape: number[];
  data: Data;
}

type Nested = number | bigint | boolean | Nested[];
/** Typed arrays have the type of the input; plain arrays are converted. */
export type Input = Nested | { data: Data | number[]; shape: number[] };

export interface Token {
  /** -1 where the last tokens end in the middle of a character. */
  id: number;
  /** Text that is complete with this token; empty where the bundle has no tokenizer. */
  text: string;
}

export interface GenerateOptions {
  /** By default what fits the model's length. */
  maxNewTokens?: number;
  /** 0 always takes the likeliest token. */
  temperature?: number;
  topK?: number;
  topP?: number;
  /** Makes what is drawn repeatable in one build of the code; the whole prompt is then read anew. */
  seed?: number;
  /** Ids that end the text in place of the model's own, and texts. */
  stop?: number | string | (number | string)[];
  /** Called for every token; those of a few milliseconds arrive together. */
  onToken?: (token: Token) => void;
  /** Cancels with an `AbortError`, whose `partial` is what was generated. */
  signal?: AbortSignal;
}

export interface Generated {
  text: string;
  ids: number[];
  finish: "stop" | "length";
  promptTokens: number;
  /** From the call to the first token, and to the last. */
  seconds: { first: number; total: number };
  /** After the first. */
  tokensPerSecond: number;
}

/** Products with the weights of one format and depth, for about so many rows at once. */
export interface TunedShape {
  name: string;
  /** Milliseconds of all of them in the model, by the kernel of the build, and by the one that runs from then on. */
  default: number;
  tuned: number;
  /** What the chosen one does otherwise, or `default`. */
  candidate: string;
}

export interface Tuned {
  /** Spent on timing; calls did not wait for them. */
  seconds: number;
  /** Whether an earlier visit found it. */
  remembered: boolean;
  shapes: TunedShape[];
  /** What was not tuned and why, and candidates that were dropped. */
  notes: string[];
}

export interface Facts {
  isa: string;
  threads: number;
  /** Why a faster build, or storage, is not used. */
  notes: string[];
  storage: "opfs" | "cache" | "memory";
  /** That loading took. */
  seconds: number;
  /** Bytes of the model's memory. */
  memory: number;
  /** Whether it takes texts. */
  text: boolean;
  /** What tuning found, once it is done. */
  tuned?: Tuned;
}

export class Model {
  private constructor();
  readonly facts: Facts;
  /** What tuning finds; it begins after the first call. */
  readonly tuned: Promise<Tuned>;
  /** What manifest.json says, without the list of files. */
  readonly manifest: any;
  /** Outputs by name of one call of an entry, by default the one that computes what the model's forward computed. */
  run(inputs: Record<string, Input>, options?: { entry?: string }): Promise<Record<string, Tensor>>;
  generate(prompt: string | ArrayLike<number>, options?: GenerateOptions): Promise<Generated>;
  /** Vectors of length 1, or as the model gives them. */
  embed(text: string, options?: { normalize?: boolean }): Promise<Float32Array>;
  embed(texts: string[], options?: { normalize?: boolean }): Promise<Float32Array[]>;
  /** Ends the workers and gives the memory back. */
  dispose(): void;
}

/** Every error raised on purpose: what was found, what was expected, and what to do. */
export class SylvesterError extends Error {
  readonly code: "error" | "input" | "artefact" | "quota" | "network" | "unsupported" | "abort";
  readonly hint: string;
}
export class InputError extends SylvesterError {}
export class ArtefactError extends SylvesterError {}
export class QuotaError extends SylvesterError {}
export class NetworkError extends SylvesterError {}
export class UnsupportedError extends SylvesterError {}
export class AbortError extends SylvesterError {
  readonly partial?: Generated;
}
