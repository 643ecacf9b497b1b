// What an answer says in a few words: a class, two that are too close to tell apart, or none that the model knows.

import { percent } from "./numbers.js";

const CLOSE = 0.8; // of the likeliest; a second class above that could as well be the answer

/** @returns {{title: string, number: string, sure: boolean, reason: string}} */
export function verdict(answer, { multilabel }) {
  const [first, second] = answer.predictions;
  if (answer.unknown) {
    const reason = `It looks more foreign than ${percent(answer.novelty)} of known images; below are guesses`;
    return { title: "Unknown", number: percent(answer.novelty), sure: false, reason };
  }
  if (!multilabel && second && second.probability > CLOSE * first.probability) {
    const reason = `${percent(first.probability)} against ${percent(second.probability)}`;
    return { title: `Unsure: ${first.class} or ${second.class}`, number: percent(first.probability), sure: false, reason };
  }
  return { title: first.class, number: percent(first.probability), sure: true, reason: "" };
}
