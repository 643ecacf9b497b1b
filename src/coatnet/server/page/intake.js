// Three ways in: files dropped anywhere on the page, pasted, or picked.

const overlay = document.getElementById("overlay");
const notice = document.getElementById("notice");
const inputs = document.querySelectorAll("input[type=file]");

/** @param {(files: File[]) => void} take called with at least one file */
export function onFiles(take) {
  function offer(files) {
    notice.textContent = files.length ? "" : "That was no file. Save the image first, then drop it here.";
    if (files.length) take([...files]);
  }

  for (const input of inputs) {
    input.addEventListener("change", () => {
      if (input.files.length) offer(input.files);
      input.value = ""; // so that the same file can be picked again
    });
  }

  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length === 0) return; // text, for a field
    event.preventDefault();
    offer(event.clipboardData.files);
  });

  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    overlay.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) overlay.hidden = true; // it left the window, not just an element
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // the browser would open the file in place of the page
    overlay.hidden = true;
    offer(event.dataTransfer.files);
  });
}
