"""The moving average of weights that are spread over processes: each keeps the average of its own rows."""

import torch
from torch import Tensor

from coatnet.model.coatnet import CoAtNet, create_model
from coatnet.training.freezing import frozen_modules
from coatnet.training.optimization import decay_at
from coatnet.training.parallel.rows import completed, here


class ShardedAverage:
    """As `WeightAverage`, without a second network: `whole` puts one together when it is asked for."""

    def __init__(self, model: CoAtNet, decay: float) -> None:
        self.decay, self._model = decay, model
        current = model.state_dict()
        self._averages = {name: value.clone() for name, value in current.items()} if decay > 0 else current
        still = frozen_modules(model)
        moving = [name for name in current if name.rpartition(".")[0] not in still]
        pairs = [(here(self._averages[name]), here(current[name])) for name in moving]
        self._moving = [(average, value) for average, value in pairs if value.is_floating_point()]
        self._counters = [(average, value) for average, value in pairs if not value.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0 is the first)."""
        if self.decay == 0:
            return
        weight = 1 - decay_at(step, self.decay)
        torch._foreach_lerp_([a for a, _ in self._moving], [v for _, v in self._moving], weight)
        for average, value in self._counters:
            average.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of the network."""
        return dict(self._averages)

    @torch.no_grad()
    def whole(self) -> CoAtNet:
        """An ordinary network with the averages, on every process; 4 bytes a parameter for as long as it is used.

        All processes must ask for it. Evaluation then needs no messages, and folds and keeps what it likes.
        """
        with torch.device("meta"):
            network = create_model(**self._model.config())
        network.load_state_dict({name: completed(value) for name, value in self._averages.items()}, assign=True)
        return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()
