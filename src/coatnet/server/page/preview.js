// An image in its frame, as far as the browser can show it.

const SMALL = 128; // pixels; below it an image is enlarged without blur

/** @param {HTMLElement} frame around an <img> */
export function showImage(frame, image) {
  const img = frame.querySelector("img");
  frame.classList.remove("small", "no-preview");
  img.onload = () => {
    frame.classList.toggle("small", img.naturalWidth < SMALL);
    frame.style.setProperty("--ratio", img.naturalWidth / img.naturalHeight);
  };
  img.onerror = () => frame.classList.add("no-preview");
  img.src = image.url;
}
