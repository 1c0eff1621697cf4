/** One instance of the compiled code over a memory: on the thread that runs the plan, and on each that helps. */

import { ArtefactError } from "./errors.js";

/** The calling convention of the exported functions. */
export const ABI = 2n;

/** @param {WebAssembly.Module} module @param {WebAssembly.Memory} memory */
async function instantiate(module, memory) {
  const imports = { env: { memory }, sylvester: { seconds: () => performance.now() / 1000 } };
  return /** @type {Record<string, any>} */ ((await WebAssembly.instantiate(module, imports)).exports);
}

/** The first instance, which sets up the memory. */
export async function firstInstance(module, memory) {
  const code = await instantiate(module, memory);
  code._initialize();
  const found = code.sv_abi();
  if (found !== ABI)
    throw new ArtefactError(`the code has ABI ${found}, this runtime calls ABI ${ABI}`, {
      hint: "compile the model again; model.js lies beside the code it fits",
    });
  return code;
}

/** Bytes for thread-local data of one more instance. */
export const localBytes = (code) => code.__tls_size?.value ?? 0;

/** An instance with a stack that ends at `stack`, and thread-local data at `local` where it has any. */
export async function furtherInstance(module, memory, stack, local = 0) {
  const code = await instantiate(module, memory);
  code.__stack_pointer.value = stack;
  if (localBytes(code)) code.__wasm_init_tls(local);
  return code;
}
