// A picture in its frame, as far as the browser can show it.

const SMALL = 128; // pixels; below it a picture is enlarged without blur

/** @param {HTMLElement} frame around an <img> */
export function showPicture(frame, picture) {
  const image = frame.querySelector("img");
  frame.classList.remove("small", "no-preview");
  image.onload = () => frame.classList.toggle("small", image.naturalWidth < SMALL);
  image.onerror = () => frame.classList.add("no-preview");
  image.src = picture.url;
}
