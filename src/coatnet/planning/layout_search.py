"""Search for the fastest layout of a training that fits: replicated or sharded, images per pass, recomputation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from coatnet.errors import UserError, counted
from coatnet.planning.memory import StepCost, build_on_meta, simulate_step
from coatnet.training.config import Parallelism, Recomputed, TrainingConfig
from coatnet.training.distributed.parallelize import MAX_REPLICATED_PARAMETERS
from coatnet.training.distributed.processes import Processes

# chosen, not measured: with fewer images per pass the matrix products are too small to keep a GPU busy, and
# recomputation (at most a third more arithmetic) costs less.
ENOUGH_IMAGES_PER_PASS = 8
RECOMPUTATIONS: tuple[Recomputed, ...] = ("none", "transformer", "all")


@dataclass(frozen=True)
class Layout:
    """A configuration with parallelism, micro-batch and recomputation chosen, and the cost of one step of it."""

    config: TrainingConfig
    cost: StepCost

    @property
    def images_per_pass(self) -> int:
        return self.config.micro_batch_size


@dataclass
class LayoutSearch:
    """The layouts of a training on `processes`, one per GPU."""

    config: TrainingConfig
    num_classes: int
    processes: Processes
    limit: float  # bytes of memory per GPU

    @cached_property
    def images_per_gpu(self) -> int:
        """Images of one GPU in a step; the largest number, if they are not equal."""
        return -(-self.config.batch_size // self.processes.world_size)

    @cached_property
    def _num_parameters(self) -> int:
        return sum(each.numel() for each in build_on_meta(self.config, self.num_classes).parameters())

    def best(self) -> Layout:
        """The fastest layout that fits: preferably without recomputation, then replicated, then in few passes.

        Raises UserError if none fits; the message says how much memory the smallest one takes.
        """
        with_few_images: list[Layout] = []
        for recomputation in RECOMPUTATIONS:
            for parallelism in self._parallelisms():
                found = self._largest(parallelism, recomputation)
                if found is not None and found.images_per_pass >= min(ENOUGH_IMAGES_PER_PASS, self.images_per_gpu):
                    return found
                with_few_images += [found] if found is not None else []
        if with_few_images:
            return max(with_few_images, key=lambda layout: layout.images_per_pass)
        smallest = self._layout(list(self._parallelisms())[-1], RECOMPUTATIONS[-1], 1)
        least, how = smallest.cost.memory.total / 1e9, describe_layout(smallest.config, self.processes)
        raise UserError(
            f"{self.config.model} at {self.config.preprocessing.shown_size} pixels takes at least {least:.1f} GB of "
            f"each GPU ({how}), and {self.limit / 1e9:.1f} GB are free: "
            + (why_not_sharded(self.config, self.processes) or "give larger GPUs, or more of them")
        )

    def _parallelisms(self) -> Iterator[Parallelism]:
        """By increasing traffic between machines; replicated only if the model is not too large."""
        shards = self.processes.is_distributed and not why_not_sharded(self.config, self.processes)
        if not shards or self._num_parameters <= MAX_REPLICATED_PARAMETERS:
            yield "ddp"
        if shards:
            if self.processes.local_world_size < self.processes.world_size:
                yield "hsdp"
            yield "fsdp"

    def _largest(self, parallelism: Parallelism, recomputation: Recomputed) -> Layout | None:
        """The layout with the most images per pass that fit: all of a GPU, a half, a quarter, ...; None if not one."""
        whole = self._layout(parallelism, recomputation, self.images_per_gpu)
        if whole.cost.memory.total <= self.limit:
            return whole
        memory = whole.cost.memory
        for halvings in range(1, (self.images_per_gpu - 1).bit_length() + 1):
            micro = -(-self.images_per_gpu // 2**halvings)
            # Fewer images per pass save activations only, so a layout that cannot fit is not simulated.
            if memory.total - memory.activations * (1 - micro / self.images_per_gpu) <= self.limit:
                layout = self._layout(parallelism, recomputation, micro)
                if layout.cost.memory.total <= self.limit:
                    return layout
        return None

    def _layout(self, parallelism: Parallelism, recomputation: Recomputed, micro: int) -> Layout:
        config = replace(
            self.config, parallelism=parallelism, activation_checkpointing=recomputation, micro_batch_size=micro
        )
        cost = simulate_step(
            config, num_classes=self.num_classes, images_per_gpu=self.images_per_gpu, processes=self.processes
        )
        return Layout(config, cost)


def why_not_sharded(config: TrainingConfig, processes: Processes) -> str:
    """Why the weights cannot be sharded, and what would let them be; empty if they can, or there is one process."""
    batch_size, gpus = config.batch_size, processes.world_size
    if batch_size % gpus == 0:
        return ""
    below, above = batch_size // gpus * gpus, -(-batch_size // gpus) * gpus
    return (
        f"not sharded, since {batch_size:,} images are not a multiple of {gpus} GPUs: "
        f"batch-size {below} or {above} would let the weights be sharded"
    )


def describe_layout(config: TrainingConfig, processes: Processes) -> str:
    """Such as `sharded over 8 GPUs, 16 images per pass, transformer blocks recomputed`."""
    recomputed = {"none": "nothing", "transformer": "transformer blocks", "all": "all blocks"}
    parts = [f"{counted(config.micro_batch_size, 'image')} per pass"]
    parts.append(f"{recomputed[config.activation_checkpointing]} recomputed")
    placement = {
        "ddp": "replicated on each GPU",
        "hsdp": f"sharded over {processes.local_world_size} GPUs",
        "fsdp": f"sharded over {processes.world_size} GPUs",
    }
    return ", ".join([placement[config.parallelism], *parts] if processes.is_distributed else parts)
