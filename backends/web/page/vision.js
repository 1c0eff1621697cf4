/** The outputs of a model for a picked image. */

import { make, stats, time } from "./dom.js";

/** How images were usually prepared in training: (value / 255 - mean) / deviation of each channel (ImageNet). */
const MEAN = [0.485, 0.456, 0.406];
const DEVIATION = [0.229, 0.224, 0.225];
const SHOWN = 5;

/** The input of an entry that is an image [batch, 3, height, width]. */
export const imageInput = (entry) =>
  entry.inputs.find((spec) => spec.dtype === "float32" && spec.shape.length === 4 && spec.shape[1] === 3);

/** @param {import("../model.js").Model} model @param {(error: unknown) => void} show */
export function visionView(model, show) {
  const entry = Object.values(model.manifest.entries)[0];
  const spec = imageInput(entry);
  const [height, width] = spec.shape.slice(2).map((size) => (typeof size === "number" ? size : 224));
  const picture = /** @type {HTMLCanvasElement} */ (make("canvas", { width, height, hidden: true }));
  const found = make("ol", { class: "found", "aria-live": "polite" });
  const numbers = stats(["Time"]);

  async function go(file) {
    show(undefined);
    try {
      const context = picture.getContext("2d", { willReadFrequently: true });
      context.drawImage(await createImageBitmap(file), 0, 0, width, height);
      picture.hidden = false;
      const start = performance.now();
      const image = { data: channels(context.getImageData(0, 0, width, height).data), shape: [1, 3, height, width] };
      const outputs = await model.run({ [spec.name]: image });
      numbers.set({ Time: time((performance.now() - start) / 1e3) });
      found.replaceChildren(...best(Object.values(outputs)[0]));
    } catch (error) {
      show(error);
    }
  }

  const input = make("input", { type: "file", accept: "image/*", onchange: (event) => go(event.target.files[0]) });
  return make("div", {}, make("div", { class: "card" }, make("label", {}, "An image", input), picture), numbers.list,
    make("div", { class: "card" }, found));
}

/** Pixels [height, width, 4] -> floats [3, height, width]. */
function channels(pixels) {
  const size = pixels.length / 4;
  return Float32Array.from({ length: 3 * size }, (_, at) => {
    const channel = Math.floor(at / size);
    return (pixels[4 * (at % size) + channel] / 255 - MEAN[channel]) / DEVIATION[channel];
  });
}

/** The highest outputs, as chances. */
function best({ data }) {
  const highest = data.reduce((a, b) => Math.max(a, b), -Infinity);
  const total = data.reduce((sum, x) => sum + Math.exp(x - highest), 0);
  const ranked = Array.from(data, (score, label) => ({ label, share: Math.exp(score - highest) / total }));
  ranked.sort((a, b) => b.share - a.share);
  return ranked.slice(0, SHOWN).map(({ label, share }) =>
    make("li", {}, make("b", {}, `${(100 * share).toFixed(0)} %`), `class ${label}`));
}
