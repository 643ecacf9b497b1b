"""A hub of our own on loopback, and processes that are its clients."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.bundle.hub_server import Hub

# huggingface_hub reads its environment when it is imported, so each client is a process of its own.
CLIENT = """
import json, sys
from coatnet.errors import UserError
from coatnet.bundle.hub import download, upload
from coatnet.system import terminal
terminal.REPORTED_WAIT_SECONDS = 3600
verb, arguments, options = json.loads(sys.argv[1])
try:
    print({"download": download, "upload": upload}[verb](*arguments, **options))
except UserError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def start_client(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start_client("download", "ana/cats", revision="v1", environment={"HF_TOKEN": "hf_ana"})` is under way."""

    def start(verb: str, *arguments: str, environment: dict[str, str] | None = None, **options: Any):
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, json.dumps([verb, arguments, options])],
            env=hub.environment(tmp_path / "home", **(environment or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def client(start_client: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Like `start_client`, but waits for the result, which is what `download` or `upload` returns."""

    def call(*arguments: Any, **options: Any) -> str:
        printed, errors = (process := start_client(*arguments, **options)).communicate(timeout=60)
        assert process.returncode == 0, errors
        return printed.strip()

    return call


@pytest.fixture
def refused(start_client: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Like `client`, for what must end in a mistake of the user: its one line."""

    def call(*arguments: Any, **options: Any) -> str:
        printed, errors = (process := start_client(*arguments, **options)).communicate(timeout=60)
        assert (process.returncode, printed) == (2, ""), printed + errors
        assert errors.count("\n") == 1, errors
        return errors.strip()

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as bundles are, with weights of little sense."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "coatnet-nano"}')
    (folder / "README.md").write_text("---\nlibrary_name: coatnet\n---\n\n# A model\n")
    save_file({"weight": np.arange(1000, dtype=np.float32)}, folder / "model.safetensors")
    return folder
