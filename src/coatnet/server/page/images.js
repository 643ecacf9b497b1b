// An image on its way: read, sent, answered or refused. The rest of the page looks at `state` and draws it.

import { serverAnswers } from "./connection.js";
import { bytes } from "./numbers.js";
import { explain, predict, Refusal, Unreachable } from "./server.js";

const MOST_SENDS = 3; // of an image whose connection breaks: it could be what ends the server

/** One file for one model. `state` is waiting, sent, busy, done or failed. */
export class Image {
  state = "waiting";
  answer = null; // {model, predictions, milliseconds}
  problem = null; // {title, detail, final}
  explanation = null; // a promise of {box, heat_map}
  #abort = new AbortController();

  constructor(file, model) {
    this.file = file;
    this.model = model;
    this.url = URL.createObjectURL(file);
  }

  get name() {
    return this.file.name || "pasted image";
  }

  /** Ask for the classes; `changed` is called whenever `state` is another. Raises nothing. */
  async classify(changed) {
    this.#become("sent", changed);
    try {
      this.answer = await this.#send(changed);
      this.#become("done", changed);
    } catch (error) {
      if (this.#abort.signal.aborted) return;
      this.problem = describe(error);
      this.#become("failed", changed);
    }
  }

  /** What mattered for its likeliest class. */
  async explain() {
    const body = await this.file.arrayBuffer();
    return explain(body, { model: this.model.name, type: this.file.type, signal: this.#abort.signal });
  }

  /** Forget it: its request is cancelled, its memory given back. */
  discard() {
    this.#abort.abort();
    URL.revokeObjectURL(this.url);
  }

  async #send(changed) {
    const most = this.model.max_bytes;
    if (this.file.size > most) {
      throw new Refusal(413, `It has ${bytes(this.file.size)}; this server takes ${bytes(most)} at most.`);
    }
    const body = await this.file.arrayBuffer(); // before sending: an error here is the file's, not the server's
    for (let sends = 1; ; sends += 1) {
      try {
        return await predict(body, {
          model: this.model.name,
          type: this.file.type,
          signal: this.#abort.signal,
          onBusy: () => this.#become("busy", changed),
        });
      } catch (error) {
        if (!(error instanceof Unreachable) || sends === MOST_SENDS) throw error;
        this.#become("waiting", changed);
        await serverAnswers();
      }
    }
  }

  #become(state, changed) {
    this.state = state;
    if (!this.#abort.signal.aborted) changed(this);
  }
}

const TITLES = {
  401: "The server asks for a token",
  404: "The server does not have this model",
  408: "The upload took too long",
  413: "This file is too big",
  415: "This is not an image that the server can read",
  422: "This image cannot be used",
  503: "The server is busy",
  504: "The answer took too long",
};

function describe(error) {
  if (error instanceof Refusal) {
    return { title: TITLES[error.status] ?? "The server failed", detail: error.message, final: error.final };
  }
  if (error instanceof Unreachable) {
    const detail = "The connection broke off each time it was sent.";
    return { title: "This image did not get through", detail, final: false };
  }
  if (error instanceof DOMException) {
    const detail = "It was moved or changed, or it is a folder.";
    return { title: "This file cannot be read", detail, final: false };
  }
  return { title: "The answer made no sense", detail: String(error), final: false };
}
