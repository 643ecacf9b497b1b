// The page: one image comes in, is classified in this browser, and its answer is shown.

import { bar } from "./bar.js";
import { Classifier, Unreadable } from "./classifier.js";
import { onFiles } from "./intake.js";
import { milliseconds, percent } from "./numbers.js";
import { showImage } from "./preview.js";
import { verdict } from "./verdict.js";

const MOST_SHOWN = 5;

const [result, frame, img, name, headline, detail, predictions, footnote, notice, model, offline] = [
  "result", "frame", "image", "file-name", "headline", "detail", "predictions", "footnote", "notice", "only-model",
  "offline",
].map((id) => document.getElementById(id));

let current = 0;
let opening = open();
onFiles(take);
keep();

function open() {
  const opened = Classifier.open();
  opened.then(({ metadata }) => {
    model.textContent = `${metadata.architecture} · ${count(metadata)}`;
    model.hidden = false;
  }, () => {});
  return opened;
}

async function take(files) {
  if (files.length > 1) notice.textContent = `One image at a time: this is the first of ${files.length}.`;
  const [file] = files;
  const turn = (current += 1);
  URL.revokeObjectURL(img.src);
  showImage(frame, { url: URL.createObjectURL(file) });
  name.textContent = img.alt = file.name || "pasted image";
  document.body.classList.remove("empty");
  result.hidden = false;
  result.ariaBusy = "true";
  say("Looking …", "", [], "busy");
  await painted();
  try {
    const classifier = await opening;
    const answer = await classifier.classify(file);
    if (turn === current) show(answer, classifier.metadata);
  } catch (error) {
    if (turn !== current) return;
    if (error instanceof Unreadable) {
      say("This image cannot be used", error.message, [], "failed");
    } else {
      say("The model did not run in this browser", String(error.message ?? error), [], "failed");
      opening = open();
    }
  } finally {
    if (turn === current) result.ariaBusy = "false";
  }
}

function show(answer, metadata) {
  const { title, reason, sure } = verdict(answer, metadata);
  const what = metadata.multilabel ? "labels, any number of which may apply" : "classes";
  const among = `likeliest of ${metadata.classes.length.toLocaleString("en")} ${what}`;
  say(title, answer.unknown ? reason : [reason, among].filter(Boolean).join(", "), answer.predictions, "done");
  result.dataset.sure = String(sure);
  const novelty = answer.novelty === null || answer.unknown ? "" : `more foreign than ${percent(answer.novelty)} of known images · `;
  footnote.textContent = `${novelty}${milliseconds(answer.milliseconds)}, in this browser`;
}

/** @param {"busy" | "done" | "failed"} state */
function say(title, reason, found, state) {
  Object.assign(result.dataset, { state, sure: "true" });
  headline.textContent = title;
  detail.textContent = reason;
  footnote.textContent = "";
  predictions.replaceChildren(...found.slice(0, MOST_SHOWN).map(bar));
}

function count({ classes, multilabel }) {
  return `${classes.length.toLocaleString("en")} ${multilabel ? "labels" : "classes"}`;
}

/** Resolves when the browser has drawn: computing holds the page up. */
function painted() {
  return new Promise((resolve) => {
    requestAnimationFrame(() => setTimeout(resolve));
    setTimeout(resolve, 100); // a hidden tab draws nothing
  });
}

/** Keep the page for visits without a network, where the browser lets a page do that. */
async function keep() {
  try {
    await navigator.serviceWorker.register("./sw.js");
    await navigator.serviceWorker.ready;
    offline.hidden = false;
  } catch {
    // without https, or in a private window
  }
}
