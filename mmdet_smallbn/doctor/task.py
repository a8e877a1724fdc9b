"""How a model trains, for the norm doctor."""
import copy
from itertools import chain
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ..errors import SetupError


class Task:
    """How mmengine's models train. Subclass it for models of other loops."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar."""
        # Preprocessing writes to the samples.
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        return model.parse_losses(model(**data, mode='loss'))[0]

    def size(self, batch: Any) -> int:
        """Images of a batch."""
        if isinstance(batch, dict):
            batch = next(iter(batch.values()))
        if isinstance(batch, dict):
            raise SetupError('the norm doctor follows one stream of images, '
                             f'but the batch has {", ".join(batch)}: diagnose '
                             'the detector by itself')
        return len(batch)

    def join(self, batches: Sequence[Any]) -> Any:
        """Several batches as one."""
        first = batches[0]
        if isinstance(first, dict):
            return {key: self.join([batch[key] for batch in batches])
                    for key in first}
        if isinstance(first, Tensor):
            return torch.cat(list(batches))
        return list(chain.from_iterable(batches))
