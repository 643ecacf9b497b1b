"""`coatnet models`: list the models, with counted parameters and MACs beside what the paper and timm publish."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coatnet.cli.parser import Parser
from coatnet.model.config import Variant
from coatnet.model.registry import PUBLISHED, find_variant, list_variants
from coatnet.model.timm.config import TimmVariant
from coatnet.system.terminal import echo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RESOLUTIONS = (224, 384, 512)  # of the paper
CAPTION = "Millions of parameters, billions of MACs per image; in brackets as the paper publishes them."
TIMM_CAPTION = "timm's architectures; hub ids begin with timm/ and load with their weights; top-1 on ImageNet-1k."


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "models",
        "List the models: parameters, and multiply-accumulates (MACs) of one image at 224, 384 and 512 pixels (of\n"
        "models for small images, at their own resolution), counted, with the paper's figures beside\n"
        "them; of timm's architectures also the pretrained weights and their accuracy.",
        "examples:\n  coatnet models\n  coatnet models coatnet-0 coatnet-1 --json",
    )
    parser.add_argument("names", nargs="*", metavar="MODEL", help="only these (all)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for a program")
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Print the models as tables or as JSON."""
    given = parse_arguments(arguments)
    from coatnet.system.document import open_console

    rows = describe_models(given.names)
    if given.json:
        echo(json.dumps(rows, indent=1), is_json=True)
    else:
        print_models(rows, open_console())
    return 0


def describe_models(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Parameters, MACs and activation bytes by resolution of each model, or all, and what is published about it.

    `published` holds the paper's figures or None, `pretrained` the checkpoints of timm.

    Raises:
        UserError: if a name is unknown.
    """
    return [_describe(find_variant(name)) for name in names or list_variants()]


def print_models(rows: Sequence[dict[str, Any]], console: "Console") -> None:
    """Print two tables that fit into 80 columns: the paper's models and our own, then timm's."""
    table = _table(CAPTION, "model", "parameters", *(f"MACs at {side}" for side in RESOLUTIONS))
    timms = _table(TIMM_CAPTION, "model", "parameters", "MACs", "pretrained", "top-1")
    for row in rows:
        if isinstance(find_variant(row["name"]), TimmVariant):
            _add_timm_row(timms, row)
        else:
            _add_row(table, row)
    for each in (table, timms):
        if each.row_count:
            console.print(each)


def _table(caption: str, first: str, *headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "pretrained" else "right", no_wrap=True)
    return table


def _add_row(table: "Table", row: dict[str, Any]) -> None:
    paper = row["published"] or {"parameters": None, "macs": {}}
    own = str(row["resolution"])
    if row["resolution"] < RESOLUTIONS[0]:  # a model for small images is not shown at larger ones
        macs = [f"at {own}: {_with_published(row['macs'][own], None, 1e9)}"]
    else:
        macs = [_with_published(row["macs"][side], paper["macs"].get(side), 1e9) for side in map(str, RESOLUTIONS)]
    table.add_row(row["name"], _with_published(row["parameters"], paper["parameters"], 1e6), *macs)


def _add_timm_row(table: "Table", row: dict[str, Any]) -> None:
    """Add one line per checkpoint; the first one shows the architecture and its cost."""
    cost = (
        row["name"],
        _with_published(row["parameters"], None, 1e6),
        _with_published(row["macs"][str(row["resolution"])], None, 1e9),
    )
    for checkpoint in row["pretrained"] or [None]:
        tag = checkpoint["id"].partition(".")[2] if checkpoint else ""
        top1 = f"{100 * checkpoint['top1']:.1f} %" if checkpoint and checkpoint["top1"] else ""
        table.add_row(*cost, f".{tag}" if tag else "", top1)
        cost = ("", "", "")


def _describe(variant: Variant | TimmVariant) -> dict[str, Any]:
    from coatnet.bundle.timm.catalog import pretrained_of
    from coatnet.model.complexity import embedded_complexities

    counted = embedded_complexities()[variant.name]
    paper = PUBLISHED.get(variant.name)
    return {
        "name": variant.name,
        "resolution": variant.resolution,
        "parameters": counted[variant.resolution].parameters,
        "macs": {str(side): cost.macs for side, cost in counted.items()},
        "activation_bytes": {str(side): cost.activation_bytes for side, cost in counted.items()},
        "published": paper
        and {
            "parameters": round(paper.parameters),
            "macs": {str(side): round(macs) for side, macs in paper.macs.items()},
        },
        "pretrained": [
            {"id": each.hub_id, "top1": each.top1, "top5": each.top5} for each in pretrained_of(variant.name)
        ],
    }


def _with_published(counted: int, published: int | None, unit: float) -> str:
    """Format a figure as `25.0 (25)`, or as `25.0` if the paper does not publish one."""
    amount = counted / unit
    figure = f"{amount:,.{0 if amount >= 1000 else 1 if amount >= 10 else 2}f}"
    return figure if published is None else f"{figure} ({published / unit:,.4g})"
