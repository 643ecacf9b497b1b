"""ExecuTorch's runtime gives the logits of the bundle, and classify.py the class."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from coatnet import UserError, load
from coatnet.data.transforms import normalize
from coatnet.export.executorch import reopen
from coatnet.export.export import export_bundle
from coatnet.export.signature import Signature

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


def test_a_program_has_the_logits_of_the_bundle(clothes_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'coatnet[executorch]'")
    bundle = load(clothes_bundle)
    exported = export_bundle(bundle, "executorch", tmp_path / "phone")
    assert exported.parity.agreement == 1 and exported.parity.probability_difference < 1e-4
    pixels = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = normalize(pixels, bundle.preprocessing)
    with torch.no_grad():
        expected = bundle.model(images).numpy()
    found = reopen(tmp_path / "phone", Signature(logits=True))(images.numpy())
    assert np.abs(found - expected).max() < 1e-4
    run = subprocess.run([sys.executable, tmp_path / "phone/classify.py"], capture_output=True, text=True, check=True)
    printed = re.findall(r"([\d.]+)%  (.+)", run.stdout)
    assert len(printed) == 5 and sum(float(share) for share, _ in printed) <= 100.1
    assert {name for _, name in printed} <= set(bundle.classes)


def test_one_size_alone(clothes_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has one size"):
        export_bundle(load(clothes_bundle), "executorch", tmp_path / "phone", dynamic_size=True)
    assert not (tmp_path / "phone").exists()
