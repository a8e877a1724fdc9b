"""Hook for inference example weighting."""
from typing import Sequence, Union

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..errors import SetupError
from ..layers import (check_example_weight, check_positive_int,
                      lacks_averages, set_example_weight)
from .model import bare_model, calibrate


@HOOKS.register_module()
class ExampleWeightHook(Hook):
    """Hook that gives each example a weight in its own normalisation.

    It calls :func:`mmdet_smallbn.set_example_weight` before validation and
    testing, and undoes it afterwards. Training does not change. GroupNorm has
    no moving averages: the hook computes them before each validation and
    test.

    Example:
        >>> custom_hooks = [
        ...     dict(type='ExampleWeightHook', weight=0.05,
        ...          exclude='backbone')]

    Args:
        weight (float): Weight from 0 to 1. ``tools/sweep_example_weight.py``
            finds the best one.
        exclude (str | Sequence[str]): Prefixes of modules that keep the
            weight they were trained with.
        calibration_images (int): Number of training images for the averages
            of GroupNorm.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: Before validation or testing, if no norm of the model
            supports the weight.
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
        """Set the weight before validation and testing."""
        model = bare_model(runner)
        try:
            if lacks_averages(model, self.weight, self.excluded):
                calibrate(runner, self.calibration_images)
            names = set_example_weight(model, self.weight, self.excluded)
        except ValueError as error:
            raise SetupError(f'ExampleWeightHook: {error}') from error
        runner.logger.info(
            f'{len(names)} norms use the example weight {self.weight}')

    def after_val(self, runner) -> None:
        """Restore the weights that the norms were trained with."""
        set_example_weight(bare_model(runner), None)

    before_test = before_val
    after_test = after_val
