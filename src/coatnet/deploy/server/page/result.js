// The main view: one picture and what the server says of it.

import { element } from "./element.js";
import { milliseconds, percent } from "./numbers.js";
import { showPicture } from "./preview.js";

const WAITING = {
  waiting: ["Waiting", "It is sent as soon as there is room."],
  sent: ["Looking …", ""],
  busy: ["The server is busy", "This picture is sent again in a moment."],
};

const result = document.getElementById("result");
const image = document.getElementById("picture");
const frame = document.getElementById("frame");
const headline = document.getElementById("headline");
const detail = document.getElementById("detail");
const predictions = document.getElementById("predictions");
const footnote = document.getElementById("footnote");
const again = document.getElementById("again");

/** @param {() => void} retry called when the person wants the picture to be sent again */
export function onTryAgain(retry) {
  again.addEventListener("click", () => {
    headline.focus(); // the button goes away
    retry();
  });
}

/** Show a picture in its present state; null empties the view. */
export function showResult(picture) {
  result.hidden = !picture;
  document.body.classList.toggle("empty", !picture);
  if (!picture) {
    image.removeAttribute("src");
    return;
  }
  if (image.src !== picture.url) {
    showPicture(frame, picture);
    image.alt = picture.name;
    document.getElementById("file-name").textContent = picture.name;
  }
  result.dataset.state = picture.state;
  result.ariaBusy = String(!["done", "failed"].includes(picture.state));
  again.hidden = picture.state !== "failed" || picture.problem.final;
  [headline.textContent, detail.textContent] = words(picture);
  predictions.replaceChildren(...(picture.answer?.predictions ?? []).map(bar));
  footnote.textContent = picture.answer ? timing(picture) : "";
}

function words({ state, answer, problem, model }) {
  if (state === "failed") return [problem.title, problem.detail];
  if (state !== "done") return WAITING[state];
  const count = model.classes.toLocaleString("en");
  const many = `likeliest of ${count} labels, any number of which may apply`;
  return [answer.predictions[0].class, model.multilabel ? many : `likeliest of ${count} classes`];
}

function bar(prediction) {
  const fill = element("span", "fill");
  fill.style.width = `${100 * prediction.probability}%`;
  const name = element("span", "class", prediction.class);
  name.dir = "auto";
  const track = element("span", "track", fill);
  track.ariaHidden = "true";
  return element("li", "", name, element("span", "percent", percent(prediction.probability)), track);
}

function timing({ answer }) {
  const parts = Object.entries(answer.milliseconds).map(([part, value]) => `${part} ${milliseconds(value)}`);
  return [answer.model, ...parts].join(" · ");
}
