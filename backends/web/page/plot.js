/** Horizontal bars. */

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 640;
const NAMES = 190;
const NUMBERS = 150;
const ROW = 34;

/** @param {string} tag @param {Record<string, any>} attributes @param {...(Node | string)} children */
function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const name in attributes) element.setAttribute(name, String(attributes[name]));
  element.append(...children);
  return element;
}

/**
 * @param {string} title @param {{name: string, before?: number, after: number}[]} steps
 * @param {(n: number) => string} text
 */
export function bars(title, steps, text) {
  const most = Math.max(...steps.flatMap(({ before = 0, after }) => [before, after])) || 1;
  const scale = (/** @type {number} */ n) => ((WIDTH - NAMES - NUMBERS) * n) / most;
  const rows = steps.map(({ name, before, after }, index) => {
    const y = index * ROW;
    const numbers = before === undefined ? text(after) : `${text(before)} → ${text(after)}`;
    const bar = (/** @type {number} */ n, kind, top) =>
      draw("rect", { x: NAMES, y: y + top, width: Math.max(scale(n), 1), height: 10, rx: 3, class: kind });
    return draw("g", {},
      draw("text", { x: 0, y: y + 20 }, shortened(name)),
      ...(before === undefined ? [] : [bar(before, "before", 5)]),
      bar(after, "bar", before === undefined ? 10 : 17),
      draw("text", { x: NAMES + scale(Math.max(before ?? 0, after)) + 8, y: y + 20, class: "note" }, numbers));
  });
  const box = `0 0 ${WIDTH} ${steps.length * ROW}`;
  return draw("svg", { viewBox: box, role: "img", class: "plot" }, draw("title", {}, title), ...rows);
}

const shortened = (/** @type {string} */ name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);
