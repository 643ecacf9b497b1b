// Whether the server answers: a banner while it does not, and a promise for when it does again.

import { models, pause, Unreachable } from "./server.js";

const LONGEST_PAUSE = 5; // seconds between two questions
const banner = document.getElementById("banner");
let waiting = null;
let whenBack = () => {};

/** Call this whenever the server answers after having been away. */
export function onServerBack(callback) {
  whenBack = callback;
}

/** Settles as soon as the server answers anything at all. */
export function serverAnswers() {
  waiting ??= poll().finally(() => (waiting = null));
  return waiting;
}

async function poll() {
  for (let seconds = 0.5; !(await answers()); seconds = Math.min(2 * seconds, LONGEST_PAUSE)) {
    banner.hidden = false;
    await pause(seconds);
  }
  if (banner.hidden) return;
  banner.hidden = true;
  whenBack();
}

async function answers() {
  try {
    await models();
  } catch (error) {
    return !(error instanceof Unreachable);
  }
  return true;
}
