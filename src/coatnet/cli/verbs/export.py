"""The verb that writes a finished model for another program."""

from collections.abc import Sequence
from textwrap import indent
from typing import TYPE_CHECKING

from coatnet.cli.arguments.export import export_arguments

if TYPE_CHECKING:
    from coatnet.export.export import Exported


def export(arguments: Sequence[str]) -> int:
    """Write a finished model for another program."""
    given = export_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.export.export import export as export_bundle
    from coatnet.system.progress import ProgressBar

    bundle = load(given.bundle)
    with ProgressBar("exporting") as bar:
        exported = export_bundle(
            bundle,
            given.format,
            given.out,
            logits=given.logits,
            dynamic_size=given.dynamic_size,
            data=given.data,
            calibration=given.calibration,
            max_drop=given.max_drop,
            progress=bar.update,
        )
    show_export(exported)
    return 0


def show_export(exported: "Exported") -> None:
    """What was written, how far it is from the bundle, and how to open it."""
    parity, small, interface = exported.parity, exported.quantisation, exported.interface
    print(
        f"{exported.folder}: on {parity.num_images} images of {parity.data} within "
        f"{parity.probability_difference:.1e} of the bundle's probabilities, the same likeliest class for "
        f"{100 * parity.agreement:.1f} %"
    )
    if small is not None:
        first = small.speed[0]
        print(
            f"int8: {small.figure} {100 * small.after:.2f} % against {100 * small.before:.2f} % on "
            f"{small.num_images:,} images of {small.data}, {small.bytes_after / 1e6:.1f} MB against "
            f"{small.bytes_before / 1e6:.1f} MB, {first.int8:.1f} ms against {first.fp32:.1f} ms an image"
        )
    side = "H, W" if interface.any_size else "R, R"
    taken = f"float32 (B, C, {side}), normalised" if interface.logits else "uint8 (B, H, W, 3), RGB"
    print(f"parity.md tells more. With {interface.input} {taken}:")
    print(indent(exported.snippet, "  "))
