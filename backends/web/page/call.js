/** What a model takes and gives, where no view is made for it. */

import { make } from "./dom.js";

/** @param {import("../model.js").Model} model */
export function callView(model) {
  const rows = Object.entries(model.manifest.entries).flatMap(([name, entry]) => [
    ...entry.inputs.map((spec) => [name, "in", spec]),
    ...entry.outputs.map((spec) => [name, "out", spec]),
  ]);
  const cells = rows.map(([name, way, spec]) =>
    make("tr", {}, ...[name, way, spec.name, spec.dtype, `[${spec.shape.join(", ")}]`].map((text) => make("td", {}, text))));
  const heads = ["entry", "", "name", "type", "shape"].map((text) => make("th", { scope: "col" }, text));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...cells));
  const how = "Call it from your own code: const model = await load(url); await model.run({name: {data, shape}})";
  return make("div", { class: "card" }, make("p", {}, how), make("div", { class: "wide" }, table));
}
