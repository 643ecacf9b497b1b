// What was dropped, newest first: a tile a picture, kept as long as the tab.

import { element } from "./element.js";
import { percent } from "./numbers.js";
import { showPicture } from "./preview.js";

const MOST = 200; // pictures; the oldest goes first
const WAITING = { waiting: "waiting", sent: "looking …", busy: "server busy" };

const section = document.getElementById("history");
const list = document.getElementById("tiles");
const tiles = new Map(); // picture -> its item; in the order of their arrival

/** @param {(picture: Picture) => void} select called when the person wants to see a picture again */
export function addTile(picture, select) {
  const image = element("img");
  image.alt = "";
  const frame = element("span", "thumbnail", image);
  showPicture(frame, picture);
  const label = element("span", "label");
  label.dir = "auto";
  const number = element("span", "number");
  const button = element("button", "tile", frame, label, number, element("span", "name", picture.name));
  button.type = "button";
  button.addEventListener("click", () => select(picture));
  const item = element("li", "", button);
  tiles.set(picture, item);
  list.prepend(item);
  section.hidden = false;
  updateTile(picture);
  if (tiles.size > MOST) remove(tiles.keys().next().value);
}

export function updateTile(picture) {
  const item = tiles.get(picture);
  if (!item) return;
  const best = picture.answer?.predictions[0];
  const label = picture.problem?.title ?? best?.class ?? WAITING[picture.state];
  item.querySelector(".label").textContent = label;
  item.querySelector(".number").textContent = best ? percent(best.probability) : "";
  item.firstChild.dataset.state = picture.state;
}

/** Mark the tile of the picture in the main view. */
export function markTile(shown) {
  for (const [picture, item] of tiles) item.firstChild.ariaCurrent = picture === shown ? "true" : null;
}

/** Forget all pictures. @param {() => void} cleared called afterwards */
export function onClear(cleared) {
  document.getElementById("clear").addEventListener("click", () => {
    for (const picture of [...tiles.keys()]) remove(picture);
    section.hidden = true;
    cleared();
  });
}

function remove(picture) {
  tiles.get(picture).remove();
  tiles.delete(picture);
  picture.discard();
}
