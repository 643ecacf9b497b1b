// An element with its children. Strings become text, never markup.

/** @param {string} tag @param {string} [className] @param {...(Node|string)} children */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
