"""The norm doctor's numbers about a model."""
from typing import Dict, List, NamedTuple

from .measures import Layer, WindowErrors


class Diagnosis(NamedTuple):
    """What :func:`diagnose` measured.

    Attributes:
        images (int): Images of a batch.
        reference (int): Images of the large batch.
        layers (list[Layer]): The watched norms, in the order of the model.
        agreement (dict[int, list[float]]): By the number of images that are
            normalised together, the cosine of two gradients of the same
            images: normalised so, and all ``reference`` images together. Mean
            over the weights of convolutions and linear layers; a value a
            block of ``reference`` images. 1: the small batch does no harm.
        floor (list[float]): The same with fixed statistics: what losses that
            count objects, and random regions, do to it.
        loss (dict[str, list[float]]): Of each block, the mean loss
            ``'batch'``: with statistics of each batch, ``'fixed'``: with
            those of all batches, as in evaluation, ``'reference'``: of the
            large batch.
        windows (dict[int, tuple]): By window, RMS error of the normalised
            output, mean over layers: past moments as they were, and brought
            to today's weights (None: nowhere possible). 1 is BatchNorm.
        moved (float): Change of the weights in 16 iterations at the full
            learning rate, as a part of their size.
        asleep (list[str]): Batch norms that the model keeps in evaluation
            mode. If these are all, they were measured as if they trained.
        alike (float): How alike the images of a batch are, in the first norm:
            0 as images taken by chance, 1 the same. NaN of one image, and if
            it sees regions.
        single (list[str]): Norms that see one value a channel.
        others (dict[str, int]): How many norms of other kinds there are.
    """
    images: int
    reference: int
    layers: List[Layer]
    agreement: Dict[int, List[float]]
    floor: List[float]
    loss: Dict[str, List[float]]
    windows: WindowErrors
    moved: float
    asleep: List[str]
    alike: float
    single: List[str]
    others: Dict[str, int]
