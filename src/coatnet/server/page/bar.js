// A class with its probability, and a bar as long as it is likely.

import { element } from "./element.js";
import { percent } from "./numbers.js";

/** @param {{class: string, probability: number}} prediction */
export function bar(prediction) {
  const fill = element("span", "fill");
  fill.style.width = `${100 * prediction.probability}%`;
  const name = element("span", "class", prediction.class);
  name.dir = "auto";
  const track = element("span", "track", fill);
  track.ariaHidden = "true";
  return element("li", "", name, element("span", "percent", percent(prediction.probability)), track);
}
