"""A folder for a web server of files: a page that classifies images in the browser, which sends them nowhere.

It holds the ONNX model, onnxruntime-web (WebAssembly, one thread) and the page. Needs what ONNX needs, and npm the
first time, which fetches onnxruntime-web.
"""

import hashlib
import math
import shutil
import subprocess
import tarfile
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from coatnet.bundle import Bundle
from coatnet.errors import UserError, first_line
from coatnet.export import onnx as file
from coatnet.export.signature import Run, Signature
from coatnet.system.cache import cached_folder
from coatnet.system.telemetry import import_onnxruntime

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# Its files in the package, and their names in the export: not every file server knows the type of .mjs.
RUNTIME = {
    "package/dist/ort.wasm.bundle.min.mjs": "ort.js",
    "package/dist/ort-wasm-simd-threaded.wasm": "ort.wasm",
    "package/package.json": "package.json",
}
# The npm package has none, the Python package of the same source does.
LICENSES = {"LICENSE": "LICENSE.txt", "ThirdPartyNotices.txt": "ThirdPartyNotices.txt"}
NPM_SECONDS = 300

OWN = Path(__file__).with_name("page")
# The look, and the words for an answer, are those of the server's page.
SHARED = Path(__file__).parents[1] / "server" / "page"
SHARED_FILES = ("bar.js", "element.js", "favicon.svg", "intake.js", "numbers.js", "preview.js", "verdict.js")
SHARED_FILES += ("result.css", "style.css")
WORKER = "sw.js"
HALVED_FROM = 256  # numbers; smaller tensors, such as scales and means, are not worth their rounding


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the page, the model and the runtime; `weights` of the metadata may be float16.

    Raises:
        UserError: the model takes other values than 8-bit RGB, its weights are too many for a browser, ONNX Runtime is
            not installed, or onnxruntime-web cannot be fetched.
    """
    if not signature.resizes:
        raise UserError("the page of format web takes image files: leave --logits and --dynamic-size out")
    if bundle.preprocessing.scale is not None:
        raise UserError("a browser reads 8-bit RGB images, this model takes other values: choose another format")
    licenses = Path(import_onnxruntime().__file__).parent
    runtime = cached_folder("onnxruntime-web", VERSION, fetch_runtime, most=2)
    file.write(bundle, signature, metadata, folder)
    if (folder / f"{file.FILE}.data").exists():
        raise UserError("the weights have more than 1.6 GB, which no browser opens: choose a smaller model")
    if metadata.get("weights") == "float16":
        halve_weights(folder / file.FILE)
    (folder / "runtime").mkdir()
    for name in RUNTIME.values():
        shutil.copyfile(runtime / name, folder / "runtime" / name)
    for name, target in LICENSES.items():
        shutil.copyfile(licenses / name, folder / "runtime" / target)
    for source in (*(SHARED / name for name in SHARED_FILES), *OWN.iterdir()):
        if source.name != WORKER:
            shutil.copyfile(source, folder / source.name)
    (folder / WORKER).write_text(service_worker(folder), encoding="utf-8")


def service_worker(folder: Path) -> str:
    """The text of sw.js: with the names of all files of the page, and a version that is another if any of them is."""
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in names:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    text = (OWN / WORKER).read_text(encoding="utf-8")
    needed = [name for name in (*names, "metadata.json") if not name.endswith("ThirdPartyNotices.txt")]
    return text.replace('"VERSION"', f'"{digest.hexdigest()[:16]}"').replace('"FILES"', f'"{" ".join(needed)}"')


def fetch_runtime(folder: Path) -> None:
    """Let npm fetch onnxruntime-web, and unpack what a page needs of it.

    Raises:
        UserError: there is no npm, it fails, or what it fetched is another file than the one of this version.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"format web needs npm, which fetches {PACKAGE}, and there is none: install Node.js")
    with TemporaryDirectory(prefix="coatnet-") as name:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--loglevel=error", "--pack-destination", name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", cwd=name, timeout=NPM_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"npm did not fetch {PACKAGE} in {NPM_SECONDS} s: is there a network?") from None
        packages = list(Path(name).glob("*.tgz"))
        if done.returncode or len(packages) != 1:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")
            raise UserError(f"npm cannot fetch {PACKAGE} ({reason.strip()[:200]}): `npm pack {PACKAGE}` says more")
        if hashlib.sha512(packages[0].read_bytes()).digest() != b64decode(SHA512):
            raise UserError(f"what npm fetched as {PACKAGE} is another file than was released under that name")
        try:
            with tarfile.open(packages[0]) as package:
                for member, target in RUNTIME.items():
                    (folder / target).write_bytes(package.extractfile(member).read())  # type: ignore[union-attr]
        except (tarfile.TarError, KeyError) as error:
            raise UserError(f"{PACKAGE} cannot be unpacked: {first_line(error)}") from error


def halve_weights(path: Path) -> None:
    """Store the weights of an ONNX file in float16; they are cast to float32, in which all is computed."""
    import onnx

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < HALVED_FROM:
            continue
        name, stored = tensor.name, f"{tensor.name}_float16"
        with np.errstate(over="ignore"):
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        if np.isfinite(values).all():
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, stored))
            casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the model in ONNX Runtime, whose release for browsers computes the same graph."""
    return file.reopen(folder, signature)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the model in `folder`, and computes probabilities (B, K) of the array `images`."""
    return file.snippet(bundle, signature)


def sizes(folder: Path) -> str:
    """How large the parts of an export are, and how to open its page."""
    model = (folder / file.FILE).stat().st_size
    runtime = sum((folder / "runtime" / name).stat().st_size for name in RUNTIME.values())
    page = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".js", ".css", ".html", ".svg"))
    return (
        f"model {model / 1e6:.1f} MB, runtime {runtime / 1e6:.1f} MB, page {page / 1e6:.2f} MB. Any server of files "
        f"will do: python -m http.server --directory {folder}"
    )
