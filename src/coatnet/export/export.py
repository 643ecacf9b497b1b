"""`export`: write a bundle in another format, open the result again, and compare it with the bundle."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import getsource
from pathlib import Path
from textwrap import indent
from typing import Any

from coatnet.bundle import Bundle
from coatnet.bundle.config import readable_json
from coatnet.errors import UserError, first_line, is_memory_shortage, nearest
from coatnet.export import FORMATS, decode_image
from coatnet.export.parity import FP16_TIMES, Parity, compare, example_file, open_check_images, require_parity
from coatnet.export.quantization import Quantization, open_calibration, quantize
from coatnet.export.signature import NOVELTY, Signature, describe
from coatnet.system.files import atomic_folder, output_path, translate_write_errors
from coatnet.system.hardware import choose_device

STEPS = 3


@dataclass(frozen=True)
class ExportResult:
    """The folder that was written, how far its answers are from the bundle's, and code that classifies an image."""

    folder: Path
    signature: Signature
    parity: Parity
    quantization: Quantization | None
    snippet: str


def export_bundle(
    bundle: Bundle,
    format: str,
    out: str | Path,
    *,
    logits: bool = False,
    dynamic_size: bool = False,
    data: str | None = None,
    calibration: str | None = None,
    max_drop: float = 0.01,
    fp16: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Write a model into a new folder; beside it metadata.json, parity.json, parity.md, classify.py and an example.

    Args:
        bundle: the model; one on a GPU is copied to the CPU.
        format: a key of `FORMATS`.
        out: the folder, which must not exist.
        logits: export the bare network, normalized images to logits, instead of images to probabilities.
        dynamic_size: run the network at the size of each image, with its relative biases resampled.
        data: a data source to check the export with; images of the package if None.
        calibration: a labeled data source; quantizes to int8 (format openvino).
        max_drop: largest loss of accuracy by int8, as a fraction of the images.
        fp16: store the weights in float16, for half the bytes (format web).
        device: where the graph runs, "cpu" or "cuda" (format torch-export).
        progress: called with the steps done and the steps in all.

    Returns:
        The folder, the largest differences from the bundle, and code that classifies an image with the export.

    Raises:
        UserError: the format cannot do that or is not installed, the folder exists, the export differs from the
            bundle, or int8 loses more accuracy than `max_drop`. Nothing is left behind then.
    """
    form = find_format(format)
    if dynamic_size and form.fixed_size:
        raise UserError(f"format {format} has one size, that of the bundle: leave --dynamic-size out")
    if dynamic_size and not form.is_graph:
        raise UserError(f"format {format} holds weights alone, which fit images of any size: leave --dynamic-size out")
    if calibration is not None and (format != "openvino" or dynamic_size):
        raise UserError("--calibration (int8) is for format openvino, without --dynamic-size")
    if fp16 and format != "web":
        raise UserError("--fp16 is for format web")
    if device != "cpu" and format != "torch-export":
        raise UserError("--device is for format torch-export")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is {device!r}; it is cpu or cuda: which GPU, the program that opens it decides")
    choose_device(device)
    if not 0 <= max_drop <= 1:
        raise UserError(f"max_drop is {max_drop}; it is a fraction of the images, such as 0.01")
    target = output_path(out)
    if target.exists():
        raise UserError(f"{out} exists already: give a new folder")

    if next(bundle.model.parameters()).device.type != "cpu":
        bundle = replace(bundle, model=copy.deepcopy(bundle.model).cpu())
    signature = Signature(logits or not form.is_graph, dynamic_size, device)
    module: Any = import_module(form.module)
    name, images = open_check_images(bundle, data)
    splits = open_calibration(bundle, calibration) if calibration is not None else None
    if splits is not None:  # 8 bits are too few for the distances of the novelty
        bundle = replace(bundle, calibration=None)
    metadata = describe(bundle, signature, format) | ({"weights": "float16"} if fp16 else {})
    quantization = None
    with translate_write_errors(out), atomic_folder(target) as staged:
        progress(0, STEPS)
        write(module, bundle, signature, metadata, staged)
        progress(1, STEPS)
        parity = compare(bundle, signature, module.reopen(staged, signature), name, images)
        require_parity(parity, FP16_TIMES if fp16 else 1)
        progress(2, STEPS)
        page, figures = parity.to_markdown(), parity.to_dict()
        if fp16:
            page += "\nIts weights are rounded to float16.\n"
        if splits is not None:
            quantization = quantize(bundle, signature, metadata, staged, splits, max_drop)
            parity = compare(bundle, signature, module.reopen(staged, signature), name, images)
            page = f"{parity.to_markdown()}\n{quantization.to_markdown()}"
            figures = parity.to_dict() | {"int8": quantization.to_dict()}
        snippet = module.snippet(bundle, signature)
        texts = {"metadata.json": readable_json(metadata), "parity.json": readable_json(figures), "parity.md": page}
        texts["classify.py"] = script(bundle, signature, snippet)
        for file, text in texts.items():
            (staged / file).write_text(text, encoding="utf-8", errors="backslashreplace")
        example, content = example_file(bundle.preprocessing)
        (staged / example).write_bytes(content)
        progress(3, STEPS)
    program = classify(bundle, signature, snippet, f"Path({str(target)!r})", f'folder / "{example}"')
    code = functions(bundle, signature)
    return ExportResult(target, signature, parity, quantization, f"{code}\n\n{program}")


def write(module: Any, bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Call `module.write`.

    Raises:
        UserError: the exporter fails; with the first line of its root cause.
        MemoryError, RuntimeError: that is a shortage of memory.
    """
    try:
        module.write(bundle, signature, metadata, folder)
    except (UserError, OSError):
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if is_memory_shortage(root):
            raise root from None
        raise UserError(f"{metadata['format']} cannot represent this network: {first_line(root)}") from error


def functions(bundle: Bundle, signature: Signature) -> str:
    """The source of what the code of an export needs before its model: decoding, and preparing for a network alone."""
    eight_bits = bundle.preprocessing.scale is None
    needed = [decode_image.decode if eight_bits else decode_image.read_values]
    if signature.logits:
        needed += [decode_image.prepare if eight_bits else decode_image.prepare_values]
        needed += [decode_image.fit, decode_image.crop]
    imports = ("import json", "from contextlib import suppress", "from pathlib import Path", "from typing import Any")
    libraries = ("import numpy", "from PIL import Image, ImageOps")
    return "\n\n\n".join(["\n".join((*imports, "", *libraries)), *(getsource(each).rstrip() for each in needed)]) + "\n"


def classify(bundle: Bundle, signature: Signature, snippet: str, folder: str, image: str) -> str:
    """Code that prints the likeliest classes of an image; `folder` and `image` are expressions."""
    eight_bits = bundle.preprocessing.scale is None
    more = "" if eight_bits else f", {bundle.preprocessing.channels}"
    lines = [
        f"folder = {folder}",
        'metadata = json.loads((folder / "metadata.json").read_text("utf-8"))',
        f"images = {'decode' if eight_bits else 'read_values'}({image}{more})[None]  # or an image of yours",
    ]
    if signature.logits:
        lines.append(f'images = {"prepare" if eight_bits else "prepare_values"}(images[0], metadata["preprocessing"])')
    lines.append(snippet)
    if signature.logits:
        odds = "numpy.exp(logits - logits.max())"
        lines.append(
            "probabilities = 1 / (1 + numpy.exp(-logits))"
            if bundle.multilabel
            else f"odds = {odds}\nprobabilities = odds / odds.sum()"
        )
    lines.append("for index in (-probabilities[0]).argsort()[:5]:")
    lines.append("    print(f\"{probabilities[0, index]:7.2%}  {metadata['classes'][index]}\")")
    if NOVELTY in signature.outputs(bundle):
        lines.append('print(f"{novelty[0]:7.2%}  novelty: the share of known images that look less foreign")')
    return "\n".join(lines) + "\n"


def script(bundle: Bundle, signature: Signature, snippet: str) -> str:
    """The content of classify.py."""
    image = f'sys.argv[1] if len(sys.argv) > 1 else folder / "{example_file(bundle.preprocessing)[0]}"'
    program = classify(bundle, signature, snippet, "Path(__file__).parent", image)
    about = '"""Classify an image file: `python classify.py image.jpg`. Images are decoded as coatnet does."""'
    code = functions(bundle, signature).replace("import json\n", "import json\nimport sys\n", 1)
    return f'{about}\n\n{code}\n\nif __name__ == "__main__":\n{indent(program, "    ")}'


def find_format(name: str) -> Any:
    """The row of that name. Raises UserError with the nearest name if there is none."""
    if name not in FORMATS:
        raise UserError(f"there is no format {name!r}{nearest(name, FORMATS)}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
