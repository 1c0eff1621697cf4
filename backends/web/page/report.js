/** What every pass of the compilation did and cost, and what tuning found on this device, as plots. */

import { make, megabytes, time } from "./dom.js";
import { bars } from "./plot.js";

/** @param {URL} base @param {import("../model.d.ts").Tuned} [found] */
export async function reportView(base, found) {
  const manifest = await read(base, "manifest.json");
  const has = (/** @type {string} */ name) => name in manifest.files;
  const parts = has("report.json") ? reported(await read(base, "report.json"), manifest) : [];
  if (found) parts.push(...tuned(found));
  if (has("report.html")) parts.push(make("p", {}, make("a", { href: "report.html" }, "The whole report")));
  return make("div", {}, ...(parts.length ? parts : ["This bundle has no report."]));
}

async function read(base, name) {
  const url = new URL(name, base);
  const stored = async (/** @type {unknown} */ error) => (await globalThis.caches?.match(url)) ?? Promise.reject(error);
  const response = await fetch(url).catch(stored);
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  return response.json();
}

function reported(report, manifest) {
  const rows = report.ledger.rows;
  const model = report.model?.architecture;
  const head = [model, manifest.passes.join(", ") || "exact passes only"].filter(Boolean).join(": ");
  return [make("h2", {}, head), ...weights(rows), ...work(rows), ...costs(rows), ledger(rows), ...notes(report)];
}

const changed = (rows, key) => rows.filter((row) => row.before[key] !== row.after[key]);

function weights(rows) {
  const steps = changed(rows, "parameter_bytes").map((row) => ({
    name: row.pass, before: row.before.parameter_bytes, after: row.after.parameter_bytes,
  }));
  return plot("Bytes of weights, before and after", steps, megabytes);
}

function work(rows) {
  const steps = changed(rows, "nodes").map((row) => ({ name: row.pass, before: row.before.nodes, after: row.after.nodes }));
  return plot("Nodes of the graph, before and after", steps, String);
}

function costs(rows) {
  const steps = rows.flatMap((row) => row.measured.filter((m) => m.next_token && !m.made_up)
    .map((m) => ({ name: row.pass, after: m.next_token.kl })));
  return plot("Distance to the model before the pass (KL, nats per token)", steps, (n) => n.toFixed(3));
}

function tuned({ seconds, shapes, notes }) {
  const steps = shapes.map((shape) => ({ name: shape.name, before: shape.default, after: shape.tuned }));
  const title = `Tuned on this device in ${time(seconds)}: default and chosen kernel`;
  return [...plot(title, steps, (n) => `${n.toPrecision(3)} ms`), ...listed("Notes on tuning", notes)];
}

function plot(title, steps, text) {
  return steps.length ? [make("h2", {}, title), make("div", { class: "card" }, bars(title, steps, text))] : [];
}

function ledger(rows) {
  const heads = ["pass", "contract", "rewrites", "refused", "largest error", "seconds"];
  const cells = rows.map((row) => [
    row.pass, row.contract, sum(row.applied), row.refused.length, row.error?.toPrecision(2) ?? "", row.seconds.toFixed(1),
  ]);
  const line = (/** @type {any[]} */ texts) => make("tr", {}, ...texts.map((text) => make("td", {}, String(text))));
  const top = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const table = make("table", {}, make("thead", {}, top), make("tbody", {}, ...cells.map(line)));
  return make("div", {}, make("h2", {}, "Passes"), make("div", { class: "card wide" }, table));
}

const sum = (/** @type {Record<string, number>} */ counts) => Object.values(counts).reduce((total, n) => total + n, 0);

const notes = (report) => listed("Notes", report.ledger.notes ?? []);

function listed(title, found) {
  return found.length ? [make("h2", {}, title), make("ul", {}, ...found.map((note) => make("li", {}, String(note))))] : [];
}
