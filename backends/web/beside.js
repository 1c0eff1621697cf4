/** Modules of functions beside the code of a model, in its memory: on every thread, at the same places of its table. */

import { furtherInstance } from "./code.js";

/** Bytes of the stack of a module on a thread. */
const STACK = 65536;

/** Adds the functions c0, c1, ... of a module. @returns {Promise<number>} the first place */
export async function addFunctions(code, module, memory, stack) {
  const beside = await furtherInstance(module, memory, stack);
  const table = code.__indirect_function_table;
  const first = table.length;
  for (let n = 0; beside[`c${n}`]; n++) table.set(table.grow(1), beside[`c${n}`]);
  return first;
}

/** On all threads, which rest meanwhile. @param {import("./team.js").Team} team */
export async function addToTeam(team, module) {
  const { code, heap, helpers } = team;
  const stacks = [code, ...helpers].map(() => heap.alloc(STACK) + STACK);
  await team.rest();
  try {
    await Promise.all(helpers.map((helper, index) => helper.ask({ beside: module, stack: stacks[index + 1] })));
    return await addFunctions(code, module, heap.memory, stacks[0]);
  } finally {
    if (team.at) team.begin();
  }
}
