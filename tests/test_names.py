"""The names that configs give are names of the package."""
import inspect

import pytest
from mmengine.registry import HOOKS, MODELS

import mmdet_smallbn

OURS = {
    name: cls
    for registry in (MODELS, HOOKS)
    for name, cls in registry.module_dict.items()
    if inspect.isclass(cls) and cls.__module__.startswith('mmdet_smallbn.')
}


@pytest.mark.parametrize('name', sorted({*OURS, 'BGN', 'CenConv', 'CmBN'}))
def test_a_registered_name_is_the_class(name):
    assert getattr(mmdet_smallbn, name) is OURS[name]
    assert name in mmdet_smallbn.__all__
