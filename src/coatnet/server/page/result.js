// The main view: one image and what the server says of it.

import { bar } from "./bar.js";
import { showHeat } from "./heat.js";
import { milliseconds, percent } from "./numbers.js";
import { showImage } from "./preview.js";
import { verdict } from "./verdict.js";

const WAITING = {
  waiting: ["Waiting", "It is sent as soon as there is room."],
  sent: ["Looking …", ""],
  busy: ["The server is busy", "This image is sent again in a moment."],
};

const result = document.getElementById("result");
const img = document.getElementById("image");
const frame = document.getElementById("frame");
const headline = document.getElementById("headline");
const detail = document.getElementById("detail");
const predictions = document.getElementById("predictions");
const footnote = document.getElementById("footnote");
const again = document.getElementById("again");

/** @param {() => void} retry called when the person wants the image to be sent again */
export function onTryAgain(retry) {
  again.addEventListener("click", () => {
    headline.focus(); // the button goes away
    retry();
  });
}

/** Show an image in its present state; null empties the view. */
export function showResult(image) {
  result.hidden = !image;
  document.body.classList.toggle("empty", !image);
  if (!image) {
    img.removeAttribute("src");
    return;
  }
  if (img.src !== image.url) {
    showImage(frame, image);
    img.alt = image.name;
    document.getElementById("file-name").textContent = image.name;
  }
  result.dataset.state = image.state;
  result.dataset.sure = String(image.state !== "done" || verdict(image.answer, image.model).sure);
  showHeat(image);
  result.ariaBusy = String(!["done", "failed"].includes(image.state));
  again.hidden = image.state !== "failed" || image.problem.final;
  [headline.textContent, detail.textContent] = words(image);
  predictions.replaceChildren(...(image.answer?.predictions ?? []).map(bar));
  footnote.textContent = image.answer ? timing(image) : "";
}

function words({ state, answer, problem, model }) {
  if (state === "failed") return [problem.title, problem.detail];
  if (state !== "done") return WAITING[state];
  const count = model.classes.toLocaleString("en");
  const many = `likeliest of ${count} labels, any number of which may apply`;
  const { title, reason } = verdict(answer, model);
  const among = model.multilabel ? many : `likeliest of ${count} classes`;
  return [title, answer.unknown ? reason : [reason, among].filter(Boolean).join(", ")];
}

function timing({ answer }) {
  const parts = Object.entries(answer.milliseconds).map(([part, value]) => `${part} ${milliseconds(value)}`);
  return [answer.model, ...parts].join(" · ");
}
