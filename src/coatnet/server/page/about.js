// The model: which of several is asked, and what its card says.

import { readCard } from "./card.js";
import { element } from "./element.js";
import { bytes } from "./numbers.js";

const choice = document.getElementById("model");
const about = document.getElementById("about");
let models = [];

export function chosenModel() {
  return models.find((model) => model.name === choice.value) ?? models[0];
}

/** @param {() => void} chosen called when the person takes another model */
export function onModelChosen(chosen) {
  choice.addEventListener("change", () => {
    describe(chosenModel());
    chosen();
  });
}

/** Show what the server has now; a choice that it still has stays. */
export function setModels(served) {
  const before = choice.value;
  models = served;
  choice.replaceChildren(...models.map(({ name }) => new Option(name, name, false, name === before)));
  const only = document.getElementById("only-model");
  only.textContent = models.length === 1 ? models[0].name : "";
  only.hidden = models.length !== 1;
  document.getElementById("several-models").hidden = models.length < 2;
  describe(chosenModel());
}

function describe(model) {
  about.hidden = !model;
  if (!model) return;
  document.getElementById("limit").textContent = `, up to ${bytes(model.max_bytes)} each`;
  const count = model.classes.toLocaleString("en");
  const facts = {
    Network: model.variant,
    Size: `${(model.num_parameters / 1e6).toFixed(2)} M parameters`,
    Answers: model.multilabel ? `any of ${count} labels` : `one of ${count} classes`,
    Sees: `${sides(model)} pixels`,
    "Runs on": `${model.engine}, ${model.precision}`,
  };
  const pairs = Object.entries(facts).map(([name, value]) =>
    element("div", "", element("dt", "", name), element("dd", "", value)),
  );
  document.getElementById("facts").replaceChildren(...pairs);
  document.getElementById("card").replaceChildren(...readCard(model.card));
}

function sides(model) {
  return typeof model.resolution === "number" ? `${model.resolution} × ${model.resolution}` : model.resolution;
}
