"""Inference example weighting as an entry of a config."""
from typing import Sequence, Union

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..errors import SetupError
from ..layers import (check_example_weight, check_positive_int,
                      lacks_averages, set_example_weight)
from .model import bare_model, calibrate


@HOOKS.register_module()
class ExampleWeightHook(Hook):
    """Weigh examples in their own normalisation, in validation and testing.

    :func:`mmdet_smallbn.set_example_weight` before either, and undone after
    it. Training is not touched. For GroupNorm, moving averages are gathered
    before each of them.

    Example:
        >>> custom_hooks = [
        ...     dict(type='ExampleWeightHook', weight=0.05,
        ...          exclude='backbone')]

    Args:
        weight (float): From 0 to 1; ``tools/sweep_example_weight.py`` finds
            it.
        exclude (str | Sequence[str]): Prefixes of modules to leave as
            trained.
        calibration_images (int): Training images that GroupNorm's averages
            are gathered from.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: Before validation or testing, if the model has no norm to
            weigh examples in.
    """

    def __init__(self,
                 weight: float,
                 exclude: Union[str, Sequence[str]] = (),
                 calibration_images: int = 256) -> None:
        check_example_weight(weight)
        check_positive_int('ExampleWeightHook: calibration_images',
                           calibration_images)
        self.weight = weight
        self.excluded = (exclude, ) if isinstance(exclude, str) else exclude
        self.calibration_images = calibration_images

    def before_val(self, runner) -> None:
        """Set the weight."""
        model = bare_model(runner)
        try:
            if lacks_averages(model, self.weight, self.excluded):
                calibrate(runner, self.calibration_images)
            names = set_example_weight(model, self.weight, self.excluded)
        except ValueError as error:
            raise SetupError(f'ExampleWeightHook: {error}') from error
        runner.logger.info(
            f'{len(names)} norms give each example the weight {self.weight}')

    def after_val(self, runner) -> None:
        """Undo it."""
        set_example_weight(bare_model(runner), None)

    before_test = before_val
    after_test = after_val
