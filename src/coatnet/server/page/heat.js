// The heat map over the image in the main view: what mattered for the answer, asked for when it is wanted.

const button = document.getElementById("explain");
const canvas = document.getElementById("heat");
const reason = document.getElementById("heat-problem");
const img = document.getElementById("image");
const SIDE = 512; // pixels of the longer side of the canvas

let shown = null;
let wanted = false;

button.addEventListener("click", () => {
  wanted = !wanted;
  showHeat(shown);
});
img.addEventListener("load", () => showHeat(shown));

/** Show the heat map of an image, or hide it; it is asked for once. */
export async function showHeat(image) {
  shown = image;
  button.hidden = image?.state !== "done";
  button.ariaPressed = String(wanted);
  canvas.hidden = true;
  reason.textContent = "";
  if (!wanted || button.hidden) return;
  try {
    image.explanation ??= image.explain();
    const { box, heat_map: map } = await image.explanation;
    const bytes = Uint8Array.from(atob(map), (one) => one.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    if (image === shown && wanted && img.naturalWidth) draw(bitmap, box);
  } catch (error) {
    image.explanation = null; // another click asks again
    if (image === shown) reason.textContent = `No heat map: ${error.message || "the server does not answer"}`;
  }
}

function draw(bitmap, [left, top, right, bottom]) {
  const scale = SIDE / Math.max(img.naturalWidth, img.naturalHeight);
  canvas.width = Math.max(1, Math.round(scale * img.naturalWidth));
  canvas.height = Math.max(1, Math.round(scale * img.naturalHeight));
  const [width, height] = [(right - left) * canvas.width, (bottom - top) * canvas.height];
  canvas.getContext("2d").drawImage(bitmap, left * canvas.width, top * canvas.height, width, height);
  canvas.hidden = false;
}
