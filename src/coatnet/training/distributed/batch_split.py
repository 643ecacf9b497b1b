"""Which images of a batch a process takes: the batch is the recipe's, however many processes there are."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coatnet.data.loader import MAX_WORKERS
from coatnet.data.mixing import Mixing
from coatnet.system.hardware import num_cores
from coatnet.training.distributed.processes import Processes


class Share(NamedTuple):
    """Places in the batch, 0 to batch_size - 1. The first `num_extra` of them are there only to be blended with."""

    places: NDArray[np.int64]
    num_extra: int


def share_of(batch_size: int, mixing: Mixing, processes: Processes) -> Share:
    """Equal runs of the batch, some longer by one if need be.

    Images are blended with their neighbour in the batch. So that this is the same however the batch is cut, a share
    begins with the last image of the one before.
    """
    rank, number = processes.rank, processes.world_size
    places = np.arange(rank * batch_size // number, (rank + 1) * batch_size // number)
    blends = bool(mixing.mixup_alpha or mixing.cutmix_alpha)
    if processes.alone or not blends:
        return Share(places, 0)
    return Share(np.concatenate(([(places[0] - 1) % batch_size], places)), 1)


def workers_of_one(wanted: int | Literal["auto"], processes: Processes) -> int | None:
    """Worker processes of each process: as many as are wanted, or its part of the machine's cores.

    None leaves it to the loader, which a single process may.
    """
    if wanted != "auto":
        return wanted
    if processes.alone:
        return None
    return max(1, min(MAX_WORKERS, num_cores() // processes.local_world_size))
