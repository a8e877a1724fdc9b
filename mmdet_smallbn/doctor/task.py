"""Interface between the norm doctor and a model's training loop."""
import copy
from itertools import chain
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ..errors import SetupError


class Task:
    """Training of mmengine's models; subclass it for other training loops."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch, a scalar."""
        # The copy is needed: preprocessing changes the samples in place.
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        return model.parse_losses(model(**data, mode='loss'))[0]

    def size(self, batch: Any) -> int:
        """Return the number of images in a batch."""
        if isinstance(batch, dict):
            batch = next(iter(batch.values()))
        if isinstance(batch, dict):
            raise SetupError('the norm doctor supports one stream of images, '
                             f'but the batch has {", ".join(batch)}. Diagnose '
                             'the detector alone')
        return len(batch)

    def join(self, batches: Sequence[Any]) -> Any:
        """Join several batches into one."""
        first = batches[0]
        if isinstance(first, dict):
            return {key: self.join([batch[key] for batch in batches])
                    for key in first}
        if isinstance(first, Tensor):
            return torch.cat(list(batches))
        return list(chain.from_iterable(batches))
