// Numbers as people read them; their units stay on the same line.

/** A probability in percent: honest at both ends, where rounding would say 0 or 100. */
export function percent(probability) {
  if (probability > 0 && probability < 0.001) return "<\u00a00.1\u00a0%";
  if (probability < 1 && probability > 0.999) return ">\u00a099.9\u00a0%";
  return `${(100 * probability).toFixed(1)}\u00a0%`;
}

export function milliseconds(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)}\u00a0ms`;
}

/** In the megabytes that `coatnet serve` counts in. */
export function bytes(count) {
  const [unit, size] = count < 2 ** 20 ? ["kB", 2 ** 10] : ["MB", 2 ** 20];
  return `${Number((count / size).toFixed(1))}\u00a0${unit}`;
}
