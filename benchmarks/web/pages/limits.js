/** Bytes a second that threads read from memory they share, and their operations a second. */

const PAGE = 65536;
const BASE = 16 * PAGE;
/** Long enough for the system to give every thread a core. */
const LOOPS = 8_000_000;
const OPERATIONS = { int8: 12 * 32, int16: 12 * 16, f32: 12 * 8 };

export async function open({ url, threads, bytes }) {
  const module = await WebAssembly.compileStreaming(fetch(url));
  const pages = Math.ceil((BASE + bytes) / PAGE);
  const memory = new WebAssembly.Memory({ initial: pages, maximum: 65535, shared: true });
  new Uint32Array(memory.buffer, BASE, bytes >> 2).fill(0x01020304);
  const workers = Array.from({ length: threads }, () => new Worker("/pages/limits_worker.js", { type: "module" }));
  const ask = (worker, message) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => resolve(data);
      worker.onerror = ({ message: text }) => reject(new Error(text));
      worker.postMessage(message);
    });
  await Promise.all(workers.map((worker, index) => ask(worker, { module, memory, stack: (index + 1) * 4 * PAGE })));
  /** seconds from when all threads are there until the last is done */
  const together = async (name, given) => {
    new Int32Array(memory.buffer, 0, 1)[0] = 0;
    const times = await Promise.all(workers.map((worker, index) => ask(worker, { name, given: given(index), threads })));
    return (Math.max(...times.map(({ end }) => end)) - Math.min(...times.map(({ start }) => start))) / 1e3;
  };
  const measure = {
    async read({ size }) {
      const part = Math.floor(size / threads / PAGE) * PAGE;
      return (part * threads) / (await together("read_bytes", (index) => [BASE + index * part, part]));
    },
    async peak({ arithmetic }) {
      const seconds = await together(`peak_${arithmetic}`, () => [LOOPS, 1]);
      return (OPERATIONS[arithmetic] * LOOPS * threads) / seconds;
    },
  };
  return { measure, facts: { threads } };
}
