"""The models as tables: what is counted, and what the paper and timm publish beside it."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from coatnet.bundle.timm.catalog import pretrained_of
from coatnet.model.complexity import complexity
from coatnet.model.registry import PUBLISHED, Variant, find_variant, list_variants
from coatnet.model.timm.config import TimmVariant

RESOLUTIONS = (224, 384, 512)  # of the paper
CAPTION = "Millions of parameters, billions of MACs an image; in brackets the paper's."
TIMM_CAPTION = "timm's architectures; hub ids begin with timm/ and load with their weights; top-1 on ImageNet-1k."


def measure_family(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """For each name, or all: parameters, MACs and activation bytes by resolution, and what is published.

    `published` holds the paper's figures or None, `pretrained` the checkpoints of timm.

    Raises:
        UserError: if a name is unknown.
    """
    variants = [find_variant(name) for name in names or list_variants()]
    with Console(stderr=True).status("counting") as status:
        rows = []
        for variant in variants:
            status.update(f"counting {variant.name}")
            larger = () if isinstance(variant, TimmVariant) else RESOLUTIONS
            rows.append(_measure(variant, (variant.resolution, *larger)))
    return rows


def show_family(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the rows as tables that fit into 80 columns: the paper's and our own, then timm's."""
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


def _table(caption: str, first: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "pretrained" else "right", no_wrap=True)
    return table


def _add_row(table: Table, row: dict[str, Any]) -> None:
    paper = row["published"] or {"parameters": None, "macs": {}}
    own = str(row["resolution"])
    if row["resolution"] < RESOLUTIONS[0]:  # larger images are not what such a row is for
        macs = [f"at {own}: {_beside(row['macs'][own], None, 1e9)}"]
    else:
        macs = [_beside(row["macs"][side], paper["macs"].get(side), 1e9) for side in map(str, RESOLUTIONS)]
    table.add_row(row["name"], _beside(row["parameters"], paper["parameters"], 1e6), *macs)


def _add_timm_row(table: Table, row: dict[str, Any]) -> None:
    """One line a checkpoint; the architecture and its cost on the first of them."""
    cost = (
        row["name"],
        _beside(row["parameters"], None, 1e6),
        _beside(row["macs"][str(row["resolution"])], None, 1e9),
    )
    for checkpoint in row["pretrained"] or [None]:
        tag = checkpoint["id"].partition(".")[2] if checkpoint else ""
        top1 = f"{100 * checkpoint['top1']:.1f} %" if checkpoint and checkpoint["top1"] else ""
        table.add_row(*cost, f".{tag}" if tag else "", top1)
        cost = ("", "", "")


def _measure(variant: Variant | TimmVariant, sides: Sequence[int]) -> dict[str, Any]:
    counted = {side: complexity(variant, side, table_resolution=variant.resolution) for side in sorted({*sides})}
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


def _beside(counted: int, published: int | None, unit: float) -> str:
    """`25.0 (25)`, or `25.0` where the paper says nothing."""
    amount = counted / unit
    figure = f"{amount:,.{0 if amount >= 1000 else 1 if amount >= 10 else 2}f}"
    return figure if published is None else f"{figure} ({published / unit:,.4g})"
