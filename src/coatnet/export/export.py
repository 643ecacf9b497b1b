"""Exporting: write, open what was written, compare it with the bundle, and only then keep it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from coatnet.bundle import Bundle
from coatnet.bundle.config import readable_json
from coatnet.errors import UserError, first_line, nearest
from coatnet.export import FORMATS
from coatnet.export.parity import Parity, compare, require_parity
from coatnet.export.quantization import Quantisation, open_calibration, quantise
from coatnet.export.sample_images import check_images
from coatnet.export.signature import Interface, describe
from coatnet.system.files import atomic_folder, translate_write_errors

STEPS = 3


@dataclass(frozen=True)
class Exported:
    """What was written, how far it is from the bundle, and how to open it."""

    folder: Path
    interface: Interface
    parity: Parity
    quantisation: Quantisation | None
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a model into a new folder, with metadata.json, parity.json and parity.md beside it.

    Args:
        logits: the bare network, images to logits, rather than images to probabilities.
        dynamic_size: the network runs at the size that an image has.
        data: what to check the export with; images of the package if None.
        calibration: labelled data, to quantise to int8 with.
        max_drop: of the accuracy on it, a fraction.

    Raises:
        UserError: the format can not do that or is not installed, the folder is there already, the export differs
            from the bundle, or int8 costs more accuracy than it may. Nothing is left behind then.
    """
    form = find_format(format)
    if dynamic_size and not form.is_graph:
        raise UserError(f"format {format} holds weights, which fit images of any size; leave dynamic size out")
    if calibration is not None and (format != "openvino" or dynamic_size):
        raise UserError("int8 is for format openvino, without dynamic size")
    if not 0 <= max_drop <= 1:
        raise UserError(f"max_drop is {max_drop}; it is a fraction of the images, such as 0.01")
    if Path(out).exists():
        raise UserError(f"{out} is there already; give a new folder")

    interface = Interface(logits or not form.is_graph, dynamic_size)
    module: Any = import_module(form.module)
    name, images = check_images(bundle, data)
    splits = open_calibration(bundle, calibration) if calibration is not None else None
    metadata = describe(bundle, interface, format)
    quantisation = None
    with translate_write_errors(out), atomic_folder(out) as staged:
        progress(0, STEPS)
        write(module, bundle, interface, metadata, staged)
        progress(1, STEPS)
        parity = compare(bundle, interface, module.reopen(staged, interface), name, images)
        require_parity(parity)
        progress(2, STEPS)
        page, figures = parity.to_markdown(), parity.to_dict()
        if splits is not None:
            quantisation = quantise(bundle, interface, metadata, staged, splits, max_drop)
            parity = compare(bundle, interface, module.reopen(staged, interface), name, images)
            page = f"{parity.to_markdown()}\n{quantisation.to_markdown()}"
            figures = parity.to_dict() | {"int8": quantisation.to_dict()}
        texts = {"metadata.json": readable_json(metadata), "parity.json": readable_json(figures), "parity.md": page}
        for file, text in texts.items():
            (staged / file).write_text(text, encoding="utf-8", errors="backslashreplace")
        snippet = module.snippet(staged, interface).replace(str(staged), str(out))
        progress(3, STEPS)
    return Exported(Path(out), interface, parity, quantisation, snippet)


def write(module: Any, bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if the exporter raises anything, with the first line of what was at the root of it."""
    try:
        module.write(bundle, interface, metadata, folder)
    except (UserError, OSError):
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UserError(f"{metadata['format']} can not hold this network: {first_line(root)}") from error


def find_format(name: str) -> Any:
    """Raises UserError with the nearest names if there is no such format."""
    if name not in FORMATS:
        raise UserError(f"there is no format {name!r}{nearest(name, FORMATS)}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
