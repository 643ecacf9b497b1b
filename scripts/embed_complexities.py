"""Count the costs of all variants into the package: `python scripts/embed_complexities.py`."""

import json
from dataclasses import astuple
from pathlib import Path

from coatnet.cli.models import RESOLUTIONS
from coatnet.model.complexity import complexity
from coatnet.model.config import Variant
from coatnet.model.registry import find_variant, list_variants

FILE = Path(__file__).resolve().parents[1] / "src" / "coatnet" / "model" / "complexities.json"


def main() -> None:
    """A line for each variant: by resolution its parameters, multiply-accumulates and bytes of activations."""
    lines = [f"{json.dumps(name)}: {json.dumps(count(name))}" for name in list_variants()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def count(name: str) -> dict[str, tuple[int, ...]]:
    """Costs of a variant by resolution; of timm's, whose maps fit one resolution, at their own alone."""
    variant = find_variant(name)
    sides = {variant.resolution, *(RESOLUTIONS if isinstance(variant, Variant) else ())}
    return {
        str(side): astuple(complexity(variant, side, table_resolution=variant.resolution)) for side in sorted(sides)
    }


if __name__ == "__main__":
    main()
