"""Filters that the moments of a CBN window depend on."""
from typing import Any, Dict, NamedTuple, Optional

from torch import Tensor

from ..functional import Filters


class Source(NamedTuple):
    """The filters that a window's moments depend on.

    Attributes:
        filters (Filters, optional): The filters. None: past moments are used
            without compensation.
        whole (bool): If True, the gradient flows to the filters.
        processes (Processes, optional): The processes that share the batch.
    """
    filters: Optional[Filters]
    whole: bool
    processes: Any = None

    @property
    def is_known_before(self) -> bool:
        """True if the filters are known before the forward pass."""
        return self.filters is None or self.filters.are_parameters

    @property
    def follows(self) -> bool:
        """True if the gradient flows to filters that train."""
        return self.whole and self.filters is not None and (
            self.filters.weight.requires_grad or self.filters.bias is not None)

    def key(self) -> tuple:
        """Return a key that changes with the filters and their values."""
        if self.filters is None:
            return ()
        weight, bias = self.filters[:2]
        return (id(weight), weight._version, id(bias),
                bias is not None and bias._version, self.filters.centred,
                self.whole)

    def named(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """Return the filters' names in a model; None if they have none."""
        if self.processes is not None or self.filters is None or (
                self.filters.weight not in names):
            return None
        weight, bias, *rest = self.filters
        return (names[weight], names.get(bias), *rest, self.whole)

    @classmethod
    def of_names(cls, named: tuple,
                 parameters: Dict[str, Tensor]) -> Optional['Source']:
        """Return the source that :meth:`named` described; None if missing."""
        weight, bias, *rest, whole = named
        if weight not in parameters or bias not in (None, *parameters):
            return None
        return cls(
            Filters(parameters[weight], parameters.get(bias), *rest), whole)
