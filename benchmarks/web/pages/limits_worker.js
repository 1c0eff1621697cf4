/** One thread of the limits: waits for the others at the first word of the memory, then runs a function. */

let code;
let meeting;

self.onmessage = async ({ data }) => {
  if (data.module) {
    code = (await WebAssembly.instantiate(data.module, { env: { memory: data.memory } })).exports;
    code.__stack_pointer.value = data.stack;
    meeting = new Int32Array(data.memory.buffer, 0, 1);
    self.postMessage({});
    return;
  }
  Atomics.add(meeting, 0, 1);
  while (Atomics.load(meeting, 0) < data.threads);
  const start = performance.timeOrigin + performance.now();
  code[data.name](...data.given);
  self.postMessage({ start, end: performance.timeOrigin + performance.now() });
};
