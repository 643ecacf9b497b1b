// What was dropped, newest first: a tile an image, kept as long as the tab.

import { element } from "./element.js";
import { showImage } from "./preview.js";
import { verdict } from "./verdict.js";

const MOST = 200; // images; the oldest goes first
const WAITING = { waiting: "waiting", sent: "looking …", busy: "server busy" };

const section = document.getElementById("history");
const list = document.getElementById("tiles");
const tiles = new Map(); // image -> its item; in the order of their arrival

/** @param {(image: Image) => void} select called when the person wants to see an image again */
export function addTile(image, select) {
  const img = element("img");
  img.alt = "";
  const frame = element("span", "thumbnail", img);
  showImage(frame, image);
  const label = element("span", "label");
  label.dir = "auto";
  const number = element("span", "number");
  const button = element("button", "tile", frame, label, number, element("span", "name", image.name));
  button.type = "button";
  button.addEventListener("click", () => select(image));
  const item = element("li", "", button);
  tiles.set(image, item);
  list.prepend(item);
  section.hidden = false;
  updateTile(image);
  if (tiles.size > MOST) remove(tiles.keys().next().value);
}

export function updateTile(image) {
  const item = tiles.get(image);
  if (!item) return;
  const said = image.answer && verdict(image.answer, image.model);
  const label = image.problem?.title ?? said?.title ?? WAITING[image.state];
  item.querySelector(".label").textContent = label;
  item.querySelector(".number").textContent = said?.number ?? "";
  item.firstChild.dataset.state = image.state;
}

/** Mark the tile of the image in the main view. */
export function markTile(shown) {
  for (const [image, item] of tiles) item.firstChild.ariaCurrent = image === shown ? "true" : null;
}

/** Forget all images. @param {() => void} cleared called afterwards */
export function onClear(cleared) {
  document.getElementById("clear").addEventListener("click", () => {
    for (const image of [...tiles.keys()]) remove(image);
    section.hidden = true;
    cleared();
  });
}

function remove(image) {
  tiles.get(image).remove();
  tiles.delete(image);
  image.discard();
}
