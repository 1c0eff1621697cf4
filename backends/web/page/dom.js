/** Elements in one call, and numbers for people. */

/**
 * @param {string} tag @param {Record<string, any>} [attributes] `on...` are listeners
 * @param {...(Node | string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  element.append(...children);
  return element;
}

/** The element with this id. @returns {any} */
export const at = (/** @type {string} */ id) => document.getElementById(id);

export const megabytes = (/** @type {number} */ n) => `${(n / 1e6).toFixed(n < 1e8 ? 1 : 0)} MB`;

export const time = (/** @type {number} */ seconds) =>
  seconds < 1 ? `${(seconds * 1e3).toFixed(0)} ms` : `${seconds.toFixed(1)} s`;

/** Numbers with names, to be filled in: `set({name: text})`. @param {string[]} names */
export function stats(names) {
  const values = Object.fromEntries(names.map((name) => [name, make("dd", {}, "–")]));
  const list = make("dl", { class: "stats" }, ...names.map((name) => make("div", {}, make("dt", {}, name), values[name])));
  const set = (/** @type {Record<string, string>} */ given) => {
    for (const name in given) values[name].textContent = given[name];
  };
  return { list, set };
}

/** A labelled field. @param {string} text @param {HTMLElement} field */
export const field = (text, field) => make("label", {}, text, field);

/** A labelled slider that shows its value. @param {string} text @param {Record<string, any>} attributes */
export function slider(text, attributes) {
  const shown = make("span", { class: "value" }, String(attributes.value));
  const input = /** @type {HTMLInputElement} */ (
    make("input", { type: "range", ...attributes, oninput: () => (shown.textContent = input.value) })
  );
  return { label: make("label", {}, text, shown, input), value: () => Number(input.value) };
}
