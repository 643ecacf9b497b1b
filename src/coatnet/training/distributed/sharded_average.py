"""The moving average of weights that are spread over processes: each keeps the average of its own rows."""

import torch

from coatnet.model.network import CoAtNet, create_model
from coatnet.training.distributed.shards import completed
from coatnet.training.optimizer import MovingAverage


class ShardedAverage(MovingAverage):
    """Without a second network: `whole` puts one together when it is asked for."""

    def __init__(self, model: CoAtNet, decay: float) -> None:
        self._model, current = model, model.state_dict()
        super().__init__({k: value.clone() for k, value in current.items()} if decay > 0 else current, model, decay)

    @torch.no_grad()
    def whole(self) -> CoAtNet:
        """An ordinary network with the averages, on every process; 4 bytes a parameter for as long as it is used.

        All processes must ask for it. Evaluation then needs no messages, and folds and keeps what it likes.
        """
        with torch.device("meta"):
            network = create_model(**self._model.config())
        network.load_state_dict({name: completed(value) for name, value in self._averages.items()}, assign=True)
        return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()
