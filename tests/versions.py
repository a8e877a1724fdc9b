"""Record of the versions that the tests ran with, shown in the docs."""
import datetime
import json
import platform
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import torch

from mmdet_smallbn.files import write_runs, write_whole
from mmdet_smallbn.tables import as_markdown
from mmdet_smallbn.version import BOUNDS, installed

COUNTS = ('passed', 'failed', 'skipped')
PAGE = """# Versions that the tests were run with

`make test RECORD=1` writes a row; `SUITE` and `TOOLBOX` work as in any `make test`. In other environments, use
`python -m pytest TESTS --record NAME`. The suite `toolbox` holds the tests that another mmengine, mmcv or mmdet can break; the
[Makefile](../Makefile) lists them. A dash means that the package is not installed.

{}
"""


def found() -> Dict[str, str]:
    """Return the versions of Python and the toolbox, and the device.

    The version of a fork begins with the name of its distribution.
    """
    versions = {'python': platform.python_version()}
    for package, (distributions, *_) in BOUNDS.items():
        name, version = installed(distributions)
        text = str(version) if name == package else f'{name} {version}'
        versions[package] = '-' if version is None else text
    versions['device'] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')
    return versions


def read_runs(path: Path) -> List[Dict[str, Any]]:
    """Return the recorded runs, or an empty list if there is no file."""
    return json.loads(path.read_text())['runs'] if path.exists() else []


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of the docs, in Markdown."""
    head = ['suite', *found(), *COUNTS, 'date']
    return PAGE.format(
        as_markdown([head, *([str(run[name]) for name in head]
                             for run in runs)]))


def record(docs: Path, suite: str, counts: Mapping[str, int]) -> None:
    """Record a run of today; it replaces one of the same suite and versions.

    Args:
        docs (Path): The folder of the page and of ``results/versions.json``.
        suite (str): Name of the tests that ran.
        counts (dict): Numbers of tests: ``passed``, ``failed``, ``skipped``.
    """
    path = docs / 'results' / 'versions.json'
    key = dict(suite=suite, **found())
    runs = [run for run in read_runs(path)
            if {name: run[name] for name in key} != key]
    runs.append(dict(key, **counts, date=str(datetime.date.today())))
    runs.sort(key=lambda run: [run[name] for name in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_runs(path, runs)
    write_whole(docs / 'versions.md', page(runs))
