// The model in the browser: a file becomes pixels as coatnet decodes it, and pixels become probabilities.

import * as ort from "./runtime/ort.js";

const MOST_PIXELS = 50_000_000; // an image with more is halved, as coatnet does
const UNKNOWN = 0.95 + 1e-6; // as foreign as 5 % of known images are; novelties are whole numbers of thousandths

ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
ort.env.wasm.wasmPaths = { wasm: new URL("./runtime/ort.wasm", import.meta.url).href };

/** The file is no image that this browser reads, or too large for it. */
export class Unreadable extends Error {}

export class Classifier {
  #session;
  #last = Promise.resolve(); // a session computes one image at a time

  constructor(metadata, session) {
    this.metadata = metadata;
    this.#session = session;
  }

  /** Fetch the model beside the page. */
  static async open() {
    const [metadata, model] = await Promise.all([fetched("./metadata.json"), fetched("./model.onnx")]);
    const session = await ort.InferenceSession.create(new Uint8Array(await model.arrayBuffer()));
    return new Classifier(await metadata.json(), session);
  }

  /** The answer to an image file, as `coatnet predict` gives it: all classes, the likeliest first. */
  async classify(file) {
    const computed = this.#last.then(async () => this.#run(await decode(file)));
    this.#last = computed.catch(() => {});
    return computed;
  }

  async #run({ pixels, height, width }) {
    const { classes, input } = this.metadata;
    const begin = performance.now();
    const found = await this.#session.run({ [input.name]: new ort.Tensor("uint8", pixels, [1, height, width, 3]) });
    const predictions = classes.map((name, at) => ({ class: name, probability: found.probabilities.data[at] }));
    predictions.sort((one, other) => other.probability - one.probability);
    const novelty = found.novelty?.data[0] ?? null;
    const milliseconds = performance.now() - begin;
    return { predictions, novelty, unknown: novelty !== null && novelty > UNKNOWN, milliseconds };
  }
}

async function fetched(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

/** RGB, row by row: upright, transparent parts on white, color profiles not applied. */
async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Unreadable("It is no image, it is damaged, or this browser does not know its format.");
  }
  let { height, width } = bitmap;
  while (height * width > MOST_PIXELS) {
    [height, width] = [height, width].map((side) => Math.max(1, Math.floor(side / 2)));
  }
  try {
    const canvas = Object.assign(document.createElement("canvas"), { height, width });
    const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const pixels = new Uint8Array(3 * height * width);
    for (let from = 0, to = 0; to < pixels.length; from += 4, to += 3) {
      pixels[to] = data[from];
      pixels[to + 1] = data[from + 1];
      pixels[to + 2] = data[from + 2];
    }
    return { pixels, height, width };
  } catch {
    throw new Unreadable(`It has ${width} × ${height} pixels, too many for this browser.`);
  } finally {
    bitmap.close();
  }
}
