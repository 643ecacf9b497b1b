"""How the work is cut: parts are a pure function of the number of pictures, and a process takes every n-th of them.

So a part is the same work whoever does it and whenever, and any number of processes can go on with what another
number has left.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from coatnet.errors import UserError

# chosen: a thousand parts, so that a process that is killed loses little and many share evenly, within bounds: a file
# for fewer than 64 pictures costs more than it saves, and 4,096 rows are some MB to be held until they are written.
MOST_PARTS, FEWEST_PICTURES, MOST_PICTURES = 1024, 64, 4096


@dataclass(frozen=True)
class Plan:
    """What all parts of a file have in common; with another plan it would be another file."""

    model: str
    pictures: str
    num_pictures: int
    engine: str
    precision: str
    views: str
    top_k: int

    @property
    def part_size(self) -> int:
        return min(MOST_PICTURES, max(FEWEST_PICTURES, self.num_pictures // MOST_PARTS))

    @property
    def num_parts(self) -> int:
        return -(-self.num_pictures // self.part_size)

    def part(self, number: int) -> range:
        """The pictures of a part."""
        return range(number * self.part_size, min((number + 1) * self.part_size, self.num_pictures))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def difference(self, other: str) -> str | None:
        """In words, what another plan, as JSON, has otherwise; None if nothing."""
        try:
            values = json.loads(other)
        except ValueError:
            return "an unreadable plan"
        if not isinstance(values, Mapping):
            return "an unreadable plan"
        for name, value in asdict(self).items():
            if values.get(name) != value:
                known = {"model": "another model", "pictures": "other pictures", "num_pictures": "other pictures"}
                return known.get(name) or f"{name.replace('_', ' ')} {values.get(name)} where this has {value}"
        return None


def own_rank() -> tuple[int, int]:
    """This process among how many, as torchrun says in RANK and WORLD_SIZE; (0, 1) where nobody does.

    Raises:
        UserError: they are no such numbers.
    """
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(
            f"RANK is {rank!r} and WORLD_SIZE {world_size!r}; RANK must be a number from 0 to WORLD_SIZE - 1"
        )
    return int(rank), int(world_size)
