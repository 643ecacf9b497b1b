"""How to lay a training out over GPUs: copies or shards, images a pass, recomputation; the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from coatnet.errors import UserError
from coatnet.planning.memory import Rehearsal, build, rehearse
from coatnet.training.config import Parallelism, Recomputed, TrainingConfig
from coatnet.training.distributed.parallelize import SHARDED_ABOVE
from coatnet.training.distributed.processes import Processes

# chosen, not measured: with fewer images a pass the products are too narrow to keep a GPU busy, and to recompute (at
# most a third more arithmetic) costs less.
ENOUGH = 8
RECOMPUTATIONS: tuple[Recomputed, ...] = ("none", "transformer", "all")


@dataclass(frozen=True)
class Layout:
    """A way to train, and what it takes: `recipe` with parallelism, micro-batch and recomputation filled in."""

    recipe: TrainingConfig
    rehearsal: Rehearsal

    @property
    def at_once(self) -> int:
        """Images of a pass."""
        return self.recipe.micro_batch_size


@dataclass
class LayoutSearch:
    """The ways to train a recipe on `processes`, one a GPU, of which each may take `limit` bytes.

    The recipe has a model, a resolution, a batch size, a precision and an average (or none).
    """

    recipe: TrainingConfig
    num_classes: int
    processes: Processes
    limit: float

    @cached_property
    def share(self) -> int:
        """Images of one GPU in a step; the largest share, where they are not equal."""
        return -(-self.recipe.batch_size // self.processes.world_size)

    @cached_property
    def _num_parameters(self) -> int:
        return sum(each.numel() for each in build(self.recipe, self.num_classes).parameters())

    def best(self) -> Layout:
        """The fastest that fits: rather without recomputation, then in copies than in shards, then in few passes.

        Raises UserError if none fits, and says how much the smallest takes.
        """
        few: list[Layout] = []
        for recomputation in RECOMPUTATIONS:
            for parallelism in self._parallelisms():
                found = self._largest(parallelism, recomputation)
                if found is not None and found.at_once >= min(ENOUGH, self.share):
                    return found
                few += [found] if found is not None else []
        if few:
            return max(few, key=lambda layout: layout.at_once)
        smallest = self._layout(list(self._parallelisms())[-1], RECOMPUTATIONS[-1], 1)
        least, how = smallest.rehearsal.memory.total / 1e9, describe_layout(smallest.recipe, self.processes)
        raise UserError(
            f"{self.recipe.model} at {self.recipe.resolution} pixels takes {least:.1f} GB of each GPU at the least "
            f"({how}), and {self.limit / 1e9:.1f} GB are free there: "
            + (why_no_shards(self.recipe, self.processes) or "give larger GPUs, or more of them")
        )

    def _parallelisms(self) -> Iterator[Parallelism]:
        """In the order of what they exchange between machines in a step; copies only of what is not too large."""
        shards = not (self.processes.alone or why_no_shards(self.recipe, self.processes))
        if not shards or self._num_parameters <= SHARDED_ABOVE:
            yield "ddp"
        if shards:
            if self.processes.local_world_size < self.processes.world_size:
                yield "hsdp"
            yield "fsdp"

    def _largest(self, parallelism: Parallelism, recomputation: Recomputed) -> Layout | None:
        """With as many images a pass as fit: a GPU's whole share, a half, a quarter, ... None if not even one."""
        whole = self._layout(parallelism, recomputation, self.share)
        if whole.rehearsal.memory.total <= self.limit:
            return whole
        memory = whole.rehearsal.memory
        for halvings in range(1, (self.share - 1).bit_length() + 1):
            micro = -(-self.share // 2**halvings)
            # Fewer images a pass spare activations at the most, so what can not fit needs no rehearsal.
            if memory.total - memory.activations * (1 - micro / self.share) <= self.limit:
                layout = self._layout(parallelism, recomputation, micro)
                if layout.rehearsal.memory.total <= self.limit:
                    return layout
        return None

    def _layout(self, parallelism: Parallelism, recomputation: Recomputed, micro: int) -> Layout:
        recipe = replace(
            self.recipe, parallelism=parallelism, activation_checkpointing=recomputation, micro_batch_size=micro
        )
        return Layout(
            recipe, rehearse(recipe, num_classes=self.num_classes, share=self.share, processes=self.processes)
        )


def why_no_shards(recipe: TrainingConfig, processes: Processes) -> str:
    """Why the weights can not lie in shards, and what would let them; empty if they can, or there is one process."""
    batch_size, gpus = recipe.batch_size, processes.world_size
    if batch_size % gpus == 0:
        return ""
    below, above = batch_size // gpus * gpus, -(-batch_size // gpus) * gpus
    return (
        f"no shards, as {batch_size:,} images are not a multiple of {gpus} GPUs: "
        f"batch-size {below} or {above} would let the weights lie in shards"
    )


def describe_layout(recipe: TrainingConfig, processes: Processes) -> str:
    """`hsdp, 16 images a pass, transformer blocks recomputed`."""
    recomputed = {"none": "nothing", "transformer": "transformer blocks", "all": "all blocks"}
    told = [f"{recipe.micro_batch_size} image{'s' * (recipe.micro_batch_size != 1)} a pass"]
    told.append(f"{recomputed[recipe.activation_checkpointing]} recomputed")
    spread = {
        "ddp": "a copy on each GPU",
        "hsdp": f"shards over {processes.local_world_size} GPUs",
        "fsdp": f"shards over {processes.world_size} GPUs",
    }
    return ", ".join(told if processes.alone else [spread[recipe.parallelism], *told])
