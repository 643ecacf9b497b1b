// An image in its frame, as far as the browser can show it.

const SMALL = 128; // pixels; below it an image is enlarged without blur

/** @param {HTMLElement} frame around an <img> */
export function showImage(frame, image) {
  const image = frame.querySelector("img");
  frame.classList.remove("small", "no-preview");
  image.onload = () => frame.classList.toggle("small", image.naturalWidth < SMALL);
  image.onerror = () => frame.classList.add("no-preview");
  image.src = image.url;
}
