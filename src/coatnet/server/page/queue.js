// A few works at once, the newest first: what a person looks at is answered before what waits.

export class Queue {
  #waiting = [];
  #running = 0;
  #most;

  constructor(most) {
    this.#most = most;
  }

  /** @param {() => Promise<void>} work that deals with its own errors */
  add(work) {
    this.#waiting.push(work);
    queueMicrotask(() => this.#next()); // after all images of one drop are here
  }

  clear() {
    this.#waiting = [];
  }

  async #next() {
    if (this.#running === this.#most || this.#waiting.length === 0) return;
    this.#running += 1;
    try {
      await this.#waiting.pop()();
    } finally {
      this.#running -= 1;
      this.#next();
    }
  }
}
