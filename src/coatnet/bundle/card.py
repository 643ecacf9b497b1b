"""The model card, README.md: what the model is, how good it is, how to use it, how it was trained."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from coatnet.bundle.config import extensions
from coatnet.data.transforms import Preprocessing
from coatnet.errors import counted, shorten
from coatnet.model.network import CoAtNet
from coatnet.system.terminal import escape_lines, escape_markdown

_MAX_CLASS_NAMES = 100


def model_card(
    model: CoAtNet,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    multilabel: bool,
    record: Mapping[str, Any],
) -> str:
    """The model card as Markdown with the front matter that the Hugging Face hub reads."""
    seen = preprocessing
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = "any number of the labels" if multilabel else "one of the classes"
    front = {
        "library_name": "coatnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "coatnet"],
    }
    names = ", ".join(map(escape_markdown, classes[:_MAX_CLASS_NAMES]))
    more = len(classes) - _MAX_CLASS_NAMES
    crop = "the center" if seen.crop == "center" else "the whole image, squashed to a square"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {escape_markdown(model.variant.name)}: {len(classes):,} classes",
        f"A CoAtNet of {parameters / 1e6:,.2f} M parameters that gives an image {kind} below.",
        _figures(record.get("report")),
        "## How to use it\n\n```sh\ncoatnet predict path/to/this/folder image.jpg\n```\n\n"
        '```python\nimport coatnet\n\nbundle = coatnet.load("path/to/this/folder")\n'
        "bundle.model, bundle.classes, bundle.preprocessing\n```",
        f"## Preprocessing\n\n{crop[0].upper() + crop[1:]}, {seen.size[0]} x {seen.size[1]} pixels"
        f"{' (height x width)' * (seen.size[0] != seen.size[1])}, "
        f"{counted(seen.channels, 'channel')}, {seen.interpolation} interpolation, "
        f"crop fraction {seen.crop_fraction:g}, "
        f"mean {list(seen.mean)}, standard deviation {list(seen.std)} "
        + (
            "(pixels in 0..1)."
            if seen.value_range is None
            else f"(values from {seen.value_range[0]:g} to {seen.value_range[1]:g} as 0..1)."
        ),
        f"## Classes\n\n{names}" + (f" and {more:,} more (`config.json`)" if more > 0 else ""),
        _soup(record.get("soup")),
        _recipe(record),
        _probe(record.get("probe")),
        _changes(record, set(classes)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _figures(report: Mapping[str, Any] | None) -> str:
    """The figures of the report, as fractions, with their confidence intervals."""
    if not report:
        return "It has not been evaluated."
    rows = []
    for name, value in report.get("figures", {}).items():
        interval = report.get("intervals", {}).get(name)
        bounds = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        rows.append(f"| {escape_markdown(name)} | {value if name == 'n' else f'{value:.4f}'} | {bounds} |")
    table = "\n".join(("| figure | value | 95 % interval |", "| --- | ---: | ---: |", *rows))
    headline, data, split = (escape_markdown(report.get(name, "")) for name in ("headline", "data", "split"))
    return f"## How good it is\n\n{headline} ({data}, {split}).\n\n{table}"


def _probe(probe: Mapping[str, Any] | None) -> str:
    if not probe:
        return ""
    model, data = (escape_markdown(str(probe.get(name, "unknown"))) for name in ("model", "data"))
    return (
        f"## How it was trained\n\nBy `coatnet probe`: the network is that of {model}, unchanged; its classifier is a "
        f"logistic regression on the network's features of {probe.get('num_training', 0):,} images of {data} "
        f"(L2 {probe.get('l2', 0):g}, features standardized for the fit)."
    )


def _soup(soup: Mapping[str, Any] | None) -> str:
    """The models that the weights are an average of."""
    lines = [] if not soup else str(soup.get("summary", "")).splitlines()
    return "## An average of models\n\n" + "\n".join(f"- {escape_markdown(line)}" for line in lines) if lines else ""


def _changes(record: Mapping[str, Any], classes: Collection[str]) -> str:
    """What was done to the classes since the training."""
    before = record.get("classes_before")
    lines = []
    if before:
        lines.append(f"Made from a model of {len(before):,} classes by `coatnet shrink`; the network is the same.")
    left = set(classes)
    additions = []
    for extension in reversed(extensions(record)):  # a class that was left out and added again is the later one
        if added := [name for name in extension["added"] if name in left]:
            left -= set(added)
            names = escape_markdown(shorten(added))
            additions.append(f"Classes added by `coatnet extend`: {names}; the network is the same.")
    lines += reversed(additions)
    return "## What was changed since\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _recipe(record: Mapping[str, Any]) -> str:
    recipe = record.get("recipe")
    if not recipe:
        return ""
    if record.get("classes_before") or extensions(record):
        title = "The recipe of the model before its classes were changed"
    else:
        whose = "The recipe of the best of these models" if record.get("soup") else "The recipe"
        title = f"{whose}, which `coatnet train --config` repeats"
    plain = json.loads(json.dumps(recipe))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    text = escape_lines(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # so that no name ends the block
    return f"## How it was trained\n\n{title}:\n\n{fence}yaml\n{text}{fence}"
