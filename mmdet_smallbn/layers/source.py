"""Which filters a window of CBN follows."""
from typing import Any, Dict, NamedTuple, Optional

from torch import Tensor

from ..functional import Filters


class Source(NamedTuple):
    """The filters that a window's moments depend on.

    Attributes:
        filters (Filters, optional): None: the moments stay as they were.
        whole (bool): Whether the gradient flows to the filters.
        processes (Processes, optional): Who shared the batch.
    """
    filters: Optional[Filters]
    whole: bool
    processes: Any = None

    @property
    def is_known_before(self) -> bool:
        """Whether the filters are known before the forward pass."""
        return self.filters is None or self.filters.are_parameters

    @property
    def follows(self) -> bool:
        """Whether the gradient flows to filters that train."""
        return self.whole and self.filters is not None and (
            self.filters.weight.requires_grad or self.filters.bias is not None)

    def key(self) -> tuple:
        """Changes with the filters, and with their values."""
        if self.filters is None:
            return ()
        weight, bias = self.filters[:2]
        return (id(weight), weight._version, id(bias),
                bias is not None and bias._version, self.filters.centred,
                self.whole)

    def named(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """The filters by their names in a model; None if they have none."""
        if self.processes is not None or self.filters is None or (
                self.filters.weight not in names):
            return None
        weight, bias, *rest = self.filters
        return (names[weight], names.get(bias), *rest, self.whole)

    @classmethod
    def of_names(cls, named: tuple,
                 parameters: Dict[str, Tensor]) -> Optional['Source']:
        """The source that :meth:`named` described; None if it is gone."""
        weight, bias, *rest, whole = named
        if weight not in parameters or bias not in (None, *parameters):
            return None
        return cls(
            Filters(parameters[weight], parameters.get(bias), *rest), whole)
