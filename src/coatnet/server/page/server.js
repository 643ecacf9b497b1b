// What the page asks of the server: the models, and the classes of an image.

import { renewToken, token } from "./access.js";

const MODELS_TIMEOUT = 5_000; // milliseconds
const PREDICT_TIMEOUT = 120_000; // the server's own deadline comes first, unless it hangs or the line is slow
const MOST_TRIES = 6; // of an image that a busy server sends back
const WAITS = [0.2, 30]; // seconds at least and at most, whatever Retry-After says

// No mending: the same image would be refused again.
const FINAL = new Set([400, 403, 404, 413, 415, 421, 422]);

/** The server answered, and the answer is no. */
export class Refusal extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
    this.final = FINAL.has(status);
  }
}

/** There was no answer. */
export class Unreachable extends Error {}

export function models() {
  return ask("models", { cache: "no-store", signal: AbortSignal.timeout(MODELS_TIMEOUT) });
}

/**
 * The answer to one image. A busy server is asked again when it says so, a few times.
 *
 * @param {ArrayBuffer} body
 * @param {{model: string, type: string, signal: AbortSignal, onBusy: () => void}} options
 */
export async function predict(body, { model, type, signal, onBusy }) {
  const path = `predict?${new URLSearchParams({ model, top_k: 5 })}`;
  const headers = { "Content-Type": type || "application/octet-stream" };
  for (let tries = 1; ; tries += 1) {
    try {
      const limit = AbortSignal.any([signal, AbortSignal.timeout(PREDICT_TIMEOUT)]);
      return await ask(path, { method: "POST", body, headers, signal: limit });
    } catch (error) {
      if (error.status !== 503 || tries === MOST_TRIES) throw error;
      onBusy();
      // Spread, so that images refused together do not come back together.
      await pause(error.retryAfter * (1 + Math.random() / 4), signal);
    }
  }
}

/** What mattered for the likeliest class of an image: where in it a heat map lies, and the map. */
export function explain(body, { model, type, signal }) {
  const headers = { "Content-Type": type || "application/octet-stream" };
  const limit = AbortSignal.any([signal, AbortSignal.timeout(PREDICT_TIMEOUT)]);
  return ask(`explain?${new URLSearchParams({ model })}`, { method: "POST", body, headers, signal: limit });
}

/** Wait some seconds, or until the signal ends it with its reason. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

async function ask(path, options) {
  for (;;) {
    const used = token();
    const headers = { ...options.headers, ...(used && { Authorization: `Bearer ${used}` }) };
    let response, text;
    try {
      response = await fetch(path, { ...options, headers });
      text = await response.text();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Unreachable();
    }
    if (response.ok) return JSON.parse(text);
    if (response.status !== 401) throw refusal(response, text);
    if (!(await renewToken(used))) throw refusal(response, text);
  }
}

function refusal(response, text) {
  let message = `The server answered ${response.status} without a reason.`;
  try {
    message = String(JSON.parse(text).error.message);
  } catch {
    // Something between the page and the server spoke, in words of its own.
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? 1) || WAITS[0];
  return new Refusal(response.status, message, Math.min(Math.max(seconds, WAITS[0]), WAITS[1]));
}
