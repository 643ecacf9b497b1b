"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (name, text = "", kind = "") => Object.assign(document.createElement(name), { textContent: text, className: kind });

// Tables: a click on a heading sorts by it, numbers as numbers, cells without a value last.
const number = (text) => parseFloat(text.replaceAll(",", ""));
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const up = before ? before === "descending" : !numeric;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].textContent, row]);
    rows.sort(([a], [b]) => (a === "") - (b === "") || (up ? 1 : -1) * (numeric ? number(a) - number(b) : a.localeCompare(b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}

// The confusion matrix: a click on a cell, or a choice of two classes, shows images of the cell.
const panel = document.getElementById("cell");
const counts = new Map((data.cells ?? []).map(([truth, predicted, count]) => [`${truth},${predicted}`, count]));
const menus = ["truth", "predicted"].map((name) => document.getElementById(name)).filter(Boolean);

function show(truth, predicted) {
  const key = `${truth},${predicted}`, count = counts.get(key) ?? 0, images = data.examples?.[key] ?? [];
  const names = [data.classes[truth], data.classes[predicted]];
  panel.replaceChildren(element("h3", ""));
  const title = panel.firstChild, bold = (text) => title.append(element("bdi", text));
  bold(names[0]);
  title.append(truth === predicted ? " recognized as such: " : " taken for ");
  if (truth !== predicted) { bold(names[1]); title.append(": "); }
  title.append(`${count.toLocaleString("en")} image${count === 1 ? "" : "s"}`);
  const which = truth === predicted ? "the least sure ones" : "the surest ones";
  if (images.length < count)
    panel.append(element("p", images.length ? `Shown: ${images.length}, ${which}.` : "This report holds images of the most frequent cells only; predictions.csv names all.", "faint"));
  const list = element("ul", "", "images");
  for (const [name, probability, source, small] of images) {
    const item = element("li"), image = element("img", "", small ? "pixels" : "");
    Object.assign(image, { src: source, alt: name });
    item.append(image, element("p", name, "clamp faint"), element("p", `${(100 * probability).toFixed(1)} %`));
    list.append(item);
  }
  panel.append(list);
  for (const other of document.querySelectorAll("[data-cell][aria-pressed]"))
    other.setAttribute("aria-pressed", String(other.dataset.cell === key));
  menus.forEach((menu, index) => { menu.value = [truth, predicted][index]; });
  panel.scrollIntoView({ block: "nearest" });
}

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-cell]");
  if (button) show(...button.dataset.cell.split(",").map(Number));
});
document.querySelector(".matrix")?.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !event.target.dataset.cell) return;
  event.preventDefault();
  const [row, column] = event.target.dataset.cell.split(",").map(Number);
  for (let way = 1; way < data.classes.length; way++) {
    const next = document.querySelector(`.matrix [data-cell="${row + way * step[0]},${column + way * step[1]}"]`);
    if (next) return next.focus();
  }
});

for (const menu of menus) {
  menu.append(...data.classes.map((name, index) => Object.assign(element("option", name), { value: index })));
  menu.addEventListener("change", () => show(...menus.map((each) => Number(each.value))));
}

const canvas = document.querySelector("canvas");
if (canvas) {
  const side = Math.min(data.classes.length, 400), place = (index) => Math.floor(index * side / data.classes.length);
  const draw = () => {
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    context.fillStyle = style.getPropertyValue("--page");
    context.fillRect(0, 0, side, side);
    const most = Math.max(1, ...data.cells.map(([truth, predicted, count]) => truth === predicted ? 1 : count));
    for (const [truth, predicted, count] of [...data.cells].sort((a, b) => a[2] - b[2])) {
      context.fillStyle = style.getPropertyValue(truth === predicted ? "--blue" : "--orange");
      context.globalAlpha = truth === predicted ? 1 : 0.3 + 0.7 * Math.sqrt(count / most);
      context.fillRect(place(predicted), place(truth), 1, 1);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  canvas.addEventListener("click", (event) => {
    const [x, y] = [event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight].map((part) => part * data.classes.length - 0.5);
    const distance = ([truth, predicted]) => (truth - y) ** 2 + (predicted - x) ** 2;
    // A cell may be smaller than a pixel: of those that a pointer cannot tell apart, the most frequent.
    const reach = (3 * data.classes.length / canvas.clientWidth) ** 2;
    const near = data.cells.filter((cell) => distance(cell) <= Math.max(reach, 0.5));
    const better = near.length ? (cell, best) => cell[2] > best[2] : (cell, best) => distance(cell) < distance(best);
    const [truth, predicted] = (near.length ? near : data.cells).reduce((best, cell) => better(cell, best) ? cell : best);
    show(truth, predicted);
  });
}
