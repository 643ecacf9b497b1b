"""The README.md of a bundle: what the model is, how good it is, how to use it, how it was made."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from coatnet.bundle import Bundle

_MOST_NAMES = 100


def model_card(bundle: Bundle) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads."""
    model, seen = bundle.model, bundle.preprocessing
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = "any number of the labels" if bundle.multilabel else "one of the classes"
    front = {
        "library_name": "coatnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "coatnet"],
    }
    names = ", ".join(map(_text, bundle.classes[:_MOST_NAMES]))
    more = len(bundle.classes) - _MOST_NAMES
    crop = "the middle" if seen.crop == "center" else "the whole image, squashed to a square"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_text(model.variant.name)}: {len(bundle.classes):,} classes",
        f"A CoAtNet of {parameters / 1e6:,.2f} M parameters that gives an image {kind} below.",
        _figures(bundle.record.get("report")),
        "## How to use it\n\n```sh\ncoatnet predict path/to/this/folder image.jpg\n```\n\n"
        '```python\nimport coatnet\n\nbundle = coatnet.load("path/to/this/folder")\n'
        "bundle.model, bundle.classes, bundle.preprocessing\n```",
        f"## What it sees\n\n{crop[0].upper() + crop[1:]}, {seen.resolution} x {seen.resolution} pixels, "
        f"{seen.channels} channel{'s' * (seen.channels != 1)}, {seen.interpolation} interpolation, "
        f"crop fraction {seen.crop_fraction:g}, "
        f"mean {list(seen.mean)}, standard deviation {list(seen.std)} (pixels in 0..1).",
        f"## What it tells apart\n\n{names}" + (f" and {more:,} more (`config.json`)" if more > 0 else ""),
        _recipe(bundle.record.get("recipe")),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _figures(report: Mapping[str, Any] | None) -> str:
    """The measured figures, as fractions, with their intervals."""
    if not report:
        return "It has not been measured."
    rows = []
    for name, value in report["figures"].items():
        interval = report["intervals"].get(name)
        bounds = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        rows.append(f"| {name} | {value if name == 'n' else f'{value:.4f}'} | {bounds} |")
    table = "\n".join(("| figure | value | 95 % interval |", "| --- | ---: | ---: |", *rows))
    source = f"{report['data']}, {report['split']}"
    return f"## How good it is\n\n{_text(report['headline'])} ({_text(source)}).\n\n{table}"


def _recipe(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return ""
    plain = json.loads(json.dumps(recipe))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return f"## How it was made\n\nThe recipe, which `coatnet train --config` repeats:\n\n```yaml\n{text}```"


def _text(text: str) -> str:
    """Class names come from folders: no line breaks, no markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`").replace("*", "\\*")
