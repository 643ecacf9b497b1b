"""Graphs of bundles, kept on this machine: exporting one takes ten seconds, reading it again a fraction of one."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch

from coatnet.bundle import Bundle
from coatnet.bundle.config import describe
from coatnet.data.shards.block_cache import cache_folder
from coatnet.version import __version__

MAX_CACHED_GRAPHS = 16  # chosen: a handful of models in several formats; 1.6 GB if all are coatnet-0


def cached_graph(bundle: Bundle, file: str, version: str, write: Callable[[Path], None]) -> Path:
    """The file of that name which `write` makes of the bundle, or made of it before.

    They lie in COATNET_CACHE_DIR or the user's cache folder, under what they depend on: weights, config, and the
    versions of this package, torch and the engine. Beyond 16 of them, the one that was used longest ago goes.
    """
    home = cache_folder() / "graphs"
    entry = home / fingerprint(bundle, file, version)
    if not entry.exists():
        home.mkdir(parents=True, exist_ok=True)
        staged = home / f".{uuid4().hex[:8]}.tmp"
        staged.mkdir()
        try:
            write(staged / file)
            with suppress(OSError):  # another process was faster, and its graph is the same
                staged.rename(entry)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    os.utime(entry)
    kept = sorted(home.glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)
    for path in kept[:-MAX_CACHED_GRAPHS]:
        shutil.rmtree(path, ignore_errors=True)
    return entry / file


def fingerprint(bundle: Bundle, *more: str) -> str:
    """SHA-256 of all that the graph follows from; 1.2 GB of weights a second."""
    config = describe(bundle.model, bundle.classes, bundle.preprocessing, bundle.multilabel, {})
    digest = hashlib.sha256("\n".join((config, __version__, torch.__version__, *more)).encode(errors="surrogatepass"))
    for name, tensor in bundle.model.state_dict().items():
        digest.update(name.encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:32]
