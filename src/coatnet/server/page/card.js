// A model's card, which is untrusted Markdown: headings, paragraphs, lists, tables and code; all else stays text.

import { element } from "./element.js";

const FRONT_MATTER = /^---\n[^]*?\n---(?:\n|$)/;
const HEADING = /^(#{1,6}) +(.*)$/;
const ITEM = /^[-*] +(.*)$/;
const FENCE = /^```/;
const ROW = /^\|/;
const RULE = /^\|[\s|:-]+$/;
const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\\([!-/:-@[-`{-~])|&(?:(amp|lt|gt|quot)|#(\d+));/g;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"' };
const MOST_CHARACTERS = 50_000; // ten times a card with its recipe and a hundred class names
const SHIFT = 2; // the card's first heading stands under the page's second

/** @param {string} markdown @returns {HTMLElement[]} */
export function readCard(markdown) {
  const lines = markdown.slice(0, MOST_CHARACTERS).replaceAll("\r\n", "\n").replace(FRONT_MATTER, "").split("\n");
  const blocks = [];
  while (lines.length) {
    const line = lines.shift();
    const heading = HEADING.exec(line);
    if (heading) {
      blocks.push(element(`h${Math.min(6, heading[1].length + SHIFT)}`, "", ...inline(heading[2])));
    } else if (FENCE.test(line)) {
      blocks.push(element("pre", "", element("code", "", take(lines, (next) => !FENCE.test(next)).join("\n"))));
      lines.shift();
    } else if (ROW.test(line) && RULE.test(lines[0] ?? "")) {
      lines.shift();
      blocks.push(table(line, take(lines, (next) => ROW.test(next))));
    } else if (ITEM.test(line)) {
      const items = [line, ...take(lines, (next) => ITEM.test(next))];
      blocks.push(element("ul", "", ...items.map((item) => element("li", "", ...inline(ITEM.exec(item)[1])))));
    } else if (line.trim()) {
      blocks.push(element("p", "", ...inline([line, ...take(lines, isPlain)].join(" "))));
    }
  }
  return blocks;
}

function isPlain(line) {
  return line.trim() && ![HEADING, FENCE, ROW, ITEM].some((block) => block.test(line));
}

function take(lines, belongs) {
  const end = lines.findIndex((line) => !belongs(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

function table(head, rows) {
  const row = (line, tag) => element("tr", "", ...cells(line).map((cell) => element(tag, "", ...inline(cell))));
  const body = element("tbody", "", ...rows.map((line) => row(line, "td")));
  return element("table", "", element("thead", "", row(head, "th")), body);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, code, strong, escaped, entity, number] = match;
    parts.push(text.slice(end, match.index));
    if (code) parts.push(element("code", "", code));
    else if (strong) parts.push(element("strong", "", ...inline(strong)));
    else parts.push(escaped ?? ENTITIES[entity] ?? String.fromCharCode(number));
    end = match.index + whole.length;
  }
  return [...parts, text.slice(end)];
}
