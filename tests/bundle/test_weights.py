"""File modes of weights."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from coatnet.bundle.weights import write_tensors


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_have_the_file_mode_of_new_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
