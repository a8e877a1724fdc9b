"""Inference example weighting as an entry of a config."""
from typing import Sequence, Union

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..errors import SetupError
from ..layers import check_example_weight, set_example_weight
from .model import bare_model


@HOOKS.register_module()
class ExampleWeightHook(Hook):
    """Weigh examples in their own normalisation, in validation and testing.

    :func:`mmdet_smallbn.set_example_weight` before either, and undone after
    it. Training is not touched.

    Example:
        >>> custom_hooks = [
        ...     dict(type='ExampleWeightHook', weight=0.05,
        ...          exclude='backbone')]

    Args:
        weight (float): From 0 to 1; ``tools/sweep_example_weight.py`` finds
            it.
        exclude (str | Sequence[str]): Prefixes of modules to leave as
            trained.

    Raises:
        ValueError: If the weight is out of range.
        SetupError: Before validation or testing, if the model has no norm to
            weigh examples in.
    """

    def __init__(self,
                 weight: float,
                 exclude: Union[str, Sequence[str]] = ()) -> None:
        check_example_weight(weight)
        self.weight = weight
        self.exclude = exclude

    def before_val(self, runner) -> None:
        """Set the weight."""
        self._set(runner, self.weight)

    def after_val(self, runner) -> None:
        """Undo it."""
        self._set(runner, None)

    before_test = before_val
    after_test = after_val

    def _set(self, runner, weight) -> None:
        try:
            names = set_example_weight(
                bare_model(runner), weight, self.exclude)
        except ValueError as error:
            raise SetupError(f'ExampleWeightHook: {error}') from error
        if weight is not None:
            runner.logger.info(
                f'{len(names)} norms give each example the weight {weight}')
