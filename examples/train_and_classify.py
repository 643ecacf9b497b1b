"""From data to a measured, finished model, in Python rather than on the command line.

The digits come with the package; a path to a folder of images works the same. Takes an optional run folder.
"""

import sys
import tempfile
from pathlib import Path

import torch

import coatnet
from coatnet.data import EvaluationTransform

run = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="coatnet-"))

# What a recipe does not say follows from the data; said here: two passes, not the hundred it would take.
report = coatnet.train(coatnet.Recipe(data="digits", epochs=2), run)
print(report.headline())

bundle = coatnet.load(run / "bundle")  # the model with its class names and its preprocessing
prepare = EvaluationTransform(bundle.preprocessing)
held_out = coatnet.open_dataset("digits").validation
pixels, label = held_out.read(0)
with torch.inference_mode():
    probabilities = bundle.model(prepare(pixels)[None]).softmax(dim=1)[0]
best = int(probabilities.argmax())
answer, truth = bundle.classes[best], held_out.classes[label]
print(f"{held_out.describe(0)}: {answer} ({probabilities[best]:.0%}), in truth {truth}")
