// The page: images come in, go to the server a few at a time, and their answers are shown, listed and announced.

import { chosenModel, onModelChosen, setModels } from "./about.js";
import { onServerBack, serverAnswers } from "./connection.js";
import { element } from "./element.js";
import { addTile, markTile, onClear, updateTile } from "./history.js";
import { onFiles } from "./intake.js";
import { Image } from "./images.js";
import { Queue } from "./queue.js";
import { onTryAgain, showResult } from "./result.js";
import { models, Unreachable } from "./server.js";
import { verdict } from "./verdict.js";

const AT_ONCE = 3; // requests in flight
const MOST_ANNOUNCED = 10;

const queue = new Queue(AT_ONCE);
let shown = null;
let opening = null;

onFiles(take);
onServerBack(() => load().catch(tell));
onModelChosen(() => shown && take([shown.file])); // the same image through the other model
onTryAgain(() => send(shown));
onClear(() => {
  queue.clear();
  show(null);
  document.getElementById("files").focus();
});
opened().catch(tell);

/** Files become images, listed and sent; the last of them is shown. */
async function take(files) {
  try {
    await opened();
  } catch (error) {
    tell(error);
    return;
  }
  const images = files.map((file) => new Image(file, chosenModel()));
  for (const image of images) {
    addTile(image, show);
    send(image);
  }
  show(images.at(-1));
}

function send(image) {
  image.problem = null;
  image.state = "waiting";
  changed(image);
  queue.add(() => image.classify(changed));
}

function changed(image) {
  updateTile(image);
  if (image === shown) showResult(image);
  if (image.state === "done" || image.state === "failed") announce(image);
}

function show(image) {
  shown = image;
  showResult(image);
  markTile(image);
  if (!image) return;
  document.getElementById("result").scrollIntoView({ block: "nearest" });
}

function announce({ name, answer, problem, model }) {
  const said = answer && verdict(answer, model);
  const line = said ? `${name}: ${said.title}, ${said.number}` : `${name}: ${problem.title}`;
  const log = document.getElementById("announcements");
  log.append(element("p", "", line));
  if (log.children.length > MOST_ANNOUNCED) log.firstChild.remove();
}

/** Settles when the models are known; a failed attempt is made again by the next who asks. */
function opened() {
  opening ??= load().catch((error) => {
    opening = null;
    throw error;
  });
  return opening;
}

async function load() {
  for (;;) {
    try {
      setModels(await models());
      return;
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      await serverAnswers();
    }
  }
}

function tell(error) {
  const refused = error.status === 401;
  document.getElementById("notice").textContent = refused
    ? "Nothing can be classified without the token. Give it an image to be asked again."
    : `The server does not say which models it has: ${error.message}`;
}
