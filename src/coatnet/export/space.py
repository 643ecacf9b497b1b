"""A Space of the Hugging Face hub: the bundle with a page made by Gradio, which classifies uploaded images."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatnet.bundle import Bundle, load
from coatnet.export.signature import Run, Signature, run_with_torch
from coatnet.version import __version__

MODEL = "model"
GRADIO = "6.31.0"  # of 2026-11; the hub builds the page with this release

_APP = '''\
"""Classify an image with the model in this folder: `python app.py`, or as a Space of the Hugging Face hub."""

from pathlib import Path

import coatnet
import gradio

FOLDER = Path(__file__).parent
predictor = coatnet.Predictor(FOLDER / "model"{reject})


def classify(path):
    """The likeliest classes of an image file, and what else there is to say."""
    if path is None:
        return None, ""
    (found,) = predictor(path)
    if found.error:
        raise gradio.Error(found.error)
    note = "unknown: it looks like no image of its training" if found.unknown else ""
    return dict(zip(found.classes, found.probabilities)), note


page = gradio.Interface(
    classify,
    {given},  # a path: the file is read as in training
    [gradio.Label(num_top_classes=5, label="Classes"), gradio.Textbox(label="Note")],
    title={title},
    examples=[[str(path)] for path in FOLDER.glob("example.*")] or None,
    cache_examples=False,
    flagging_mode="never",
    analytics_enabled=False,
)

if __name__ == "__main__":
    page.launch()
'''


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the bundle, app.py, requirements.txt, and README.md with what the hub must know."""
    bundle.save(folder / MODEL)
    reject = ", reject=0.05" if bundle.calibration is not None else ""
    # Gradio's own image shows, and takes, no more than a browser does.
    kind = 'Image(type="filepath"' if bundle.preprocessing.scale is None else 'File(type="filepath"'
    given = f'gradio.{kind}, label="Image")'
    title = f"{bundle.model.variant.name}: {len(bundle.classes)} classes"
    (folder / "app.py").write_text(_APP.format(reject=reject, given=given, title=json.dumps(title)), encoding="utf-8")
    extra = "" if bundle.preprocessing.scale is None else "[tiff]"  # the hub installs no more than this names
    (folder / "requirements.txt").write_text(f"coatnet{extra}=={__version__}\n", encoding="utf-8")
    head = {"title": title, "sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py", "pinned": False}
    lines = [f"{name}: {json.dumps(value)}" for name, value in head.items()]
    text = "\n".join(
        ["---", *lines, "---", "", f"Classifies images with the model in `{MODEL}`, a bundle of coatnet.", ""]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the bundle in the folder."""
    return run_with_torch(load(folder / MODEL).model)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes logits (B, K) of the array `images`."""
    return (
        "import coatnet, torch\n"
        f'model = coatnet.load(folder / "{MODEL}").model\n'
        "with torch.inference_mode():\n"
        "    logits = model(torch.from_numpy(images)).numpy()"
    )
