"""The guide does what it says: its code runs, from top to bottom, as a reader would paste it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "predicting.md"


def test_the_code_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = create_model("coatnet-femto-64", num_classes=3, resolution=32).eval()
    Bundle(model, ("ant", "bee", "cat"), Preprocessing(resolution=32)).save("runs/mine/bundle")
    generator = np.random.default_rng(0)
    for name in ("holiday.jpg", "other.png"):
        Image.fromarray(generator.integers(0, 255, (60, 50, 3), dtype=np.uint8)).save(name)

    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert "holiday.jpg {'" in said and "image 1 {'" in said and said.count("(('") == 2
