"""Which filters a window of CBN follows."""
from typing import Any, NamedTuple, Optional

from ..functional import Filters


class Source(NamedTuple):
    """What a window followed in its last forward pass.

    Attributes:
        filters (Filters, optional): Those of the convolution. None: nothing
            moves the moments.
        whole (bool): Whether the gradient flows to them.
        processes (Processes, optional): Who shared the batch.
    """
    filters: Optional[Filters]
    whole: bool
    processes: Any

    def version(self) -> tuple:
        """Changes whenever the filters do."""
        if self.filters is None:
            return ()
        return tuple(None if p is None else p._version
                     for p in (self.filters.weight, self.filters.bias))

    def is_of(self, filters: Optional[Filters], whole: bool) -> bool:
        """Whether these are the same filters, used in the same way."""
        held = self.filters
        if held is None or filters is None:
            return held is filters
        return (held.weight is filters.weight and held.bias is filters.bias
                and held.centred == filters.centred and self.whole == whole)
