"""Exported graphs in the cache folder: exporting takes some ten seconds, reading a fraction of one."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.bundle.config import config_json
from coatnet.system.cache import cached_folder
from coatnet.system.terminal import report_wait
from coatnet.version import __version__

MAX_CACHED_GRAPHS = 16  # chosen: a handful of models in several formats; 1.6 GB if all are coatnet-0


def cached_graph(bundle: Bundle, file: str, version: str, write: Callable[[Path], None]) -> Path:
    """Return the path of a graph of the bundle, exporting it if it is not in the cache or damaged there.

    The key of a graph is a hash of all it depends on: weights, config, and the versions of this package, torch and the
    engine. Beyond 16 graphs, the least recently used is removed.

    Args:
        bundle: the model.
        file: name of the graph's file; others, such as weights, may lie beside it.
        version: of the engine's package.
        write: exports the graph to a path.
    """

    @report_wait("making the graph of the model, which is kept for the next time")
    def make(staged: Path) -> None:
        write(staged / file)

    key = fingerprint(bundle, __version__, torch.__version__, file, version)
    return cached_folder("graphs", key, make, most=MAX_CACHED_GRAPHS) / file


def fingerprint(bundle: Bundle, *more: str) -> str:
    """SHA-256 of a bundle and of what else is given, as 32 hex digits; 1.2 GB of weights a second."""
    config = config_json(bundle.model, bundle.classes, bundle.preprocessing, bundle.multilabel, {})
    digest = hashlib.sha256("\n".join((config, *more)).encode(errors="surrogatepass"))
    more_tensors = bundle.calibration.tensors() if bundle.calibration is not None else {}
    for name, tensor in {**bundle.model.state_dict(), **more_tensors}.items():
        digest.update(name.encode())
        numbers: Any = tensor.detach().cpu().contiguous().numpy()
        digest.update(memoryview(numbers).cast("B"))
    return digest.hexdigest()[:32]
