"""Measurements of the norm doctor on one model."""
from typing import Dict, List, NamedTuple

from .measures import Layer, WindowErrors


class Diagnosis(NamedTuple):
    """Measurements of :func:`diagnose`.

    Attributes:
        images (int): Images in a batch.
        reference (int): Images in the large batch.
        layers (list[Layer]): Measured norms, in the order of the model.
        agreement (dict[int, list[float]]): By number of images that are
            normalised together: cosine between the gradient with such batches
            and the gradient with all ``reference`` images in one batch. Both
            gradients are of the same images. Each value is the mean over the
            weights of convolutions and linear layers, for one block of
            ``reference`` images. 1: the small batch does no harm.
        floor (list[float]): The same cosine with fixed statistics. It is
            below 1 where the loss counts objects of the batch, or the model
            samples regions at random.
        loss (dict[str, list[float]]): Mean loss of each block. ``'batch'``:
            with the statistics of each batch, ``'fixed'``: with those of all
            batches, as in evaluation, ``'reference'``: with those of the
            large batch.
        windows (dict[int, tuple]): By window size: RMS error of the
            normalised output, mean over layers. The first error is with the
            past moments as they were, the second with the past moments
            recomputed with the current weights (None: not possible in any
            layer). Window 1 is BatchNorm.
        moved (float): Relative change of the weights in 16 iterations at the
            full learning rate.
        asleep (list[str]): Batch norms that the model keeps in evaluation
            mode. If all norms are, they were measured as if they trained.
        alike (float): Correlation of the images of a batch, in the first
            norm. 0: as randomly chosen images, 1: identical images. NaN for a
            batch of one image, or if the first norm sees regions.
        single (list[str]): Norms that see one value per channel.
        others (dict[str, int]): Number of norms of each other kind.
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
