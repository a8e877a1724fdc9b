"""Tool that tests the norms on a GPU and measures their cost there.

It needs torch, mmengine and pytest, but neither mmcv nor mmdet.
"""
import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence
from xml.etree import ElementTree

import torch
from rich.console import Console
from torch import Tensor

from ..errors import SetupError, one_line_errors
from ..files import write_whole
from ..tables import as_markdown
from .cases import BLOCKS, NORMS, Setting, train_block
from .contests import contests, measure

ROOT = Path(__file__).resolve().parents[2]
TESTS = ('tests/test_layers', 'tests/test_functional', 'tests/test_hooks')
LEVELS = ('norm', 'block', 'host')
# Settings to measure, in this order, until the time is over.
SETTINGS = {
    'float32': dict(),
    'bfloat16 autocast': dict(dtype=torch.bfloat16),
    'float16 autocast': dict(dtype=torch.float16),
    'float32, channels_last': dict(channels_last=True),
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the flags of the tool."""
    parser = argparse.ArgumentParser(
        description='Run the tests of layers and hooks on a GPU, count how '
        'often the host waits for the GPU, and measure the cost of the norms')
    parser.add_argument(
        '--minutes',
        type=float,
        default=8.,
        help='start no measurement after this time (8)')
    parser.add_argument(
        '--rounds',
        type=int,
        default=9,
        help='number of timings of each norm, at least 3 (9)')
    parser.add_argument(
        '--out',
        default='work_dirs/check_gpu/gpu.json',
        help='JSON file to write; the Markdown page has the same name with '
        '.md (docs/results/gpu.json)')
    args = parser.parse_args(argv)
    if args.rounds < 3:
        parser.error(f'--rounds {args.rounds}: quartiles need at least 3')
    return args


def run_tests(paths: Sequence[str], device: str,
              seconds: float) -> Dict[str, Any]:
    """Run tests on a device, in separate processes.

    Args:
        paths (Sequence[str]): Test files or folders, relative to the
            repository's root.
        device (str): Device name of torch.
        seconds (float): Time limit in seconds.

    Returns:
        dict: Number of passed tests, names and messages of failed tests,
        number of skipped tests by reason, and time in seconds.

    Raises:
        SetupError: If pytest is missing, exceeds the time limit, or ends
            without a report.
    """
    if find_spec('pytest') is None:
        raise SetupError('the tests need pytest, which is not installed. '
                         'Install it: pip install pytest pytest-xdist')
    command = [sys.executable, '-m', 'pytest', '-q', '--device', device]
    if find_spec('xdist') is not None:
        workers = min(os.cpu_count() or 1, 12)
        command += ['-n', str(workers), '--dist', 'worksteal']
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        try:
            ended = subprocess.run(
                [*command, f'--junitxml={report}', *paths],
                cwd=ROOT,
                env=dict(os.environ, OMP_NUM_THREADS='1'),
                capture_output=True,
                text=True,
                timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise SetupError(f'the tests did not end within {seconds:.0f} s. '
                             'Increase --minutes') from error
        # 0: all passed; 1: some failed.
        if ended.returncode > 1 or not report.exists():
            said = (ended.stderr or ended.stdout).strip().splitlines()
            raise SetupError('the tests did not run: '
                             f'{said[-1] if said else "pytest was silent"}')
        found = read_report(report)
    return dict(found, seconds=round(time.perf_counter() - begin))


def read_report(path: Path) -> Dict[str, Any]:
    """Return counts and messages from pytest's XML report."""
    passed, failed, skipped = 0, [], Counter()
    for case in ElementTree.parse(path).iter('testcase'):
        name = f'{case.get("classname")}::{case.get("name")}'
        problem = case.find('failure')
        if problem is None:
            problem = case.find('error')
        left_out = case.find('skipped')
        if problem is not None:
            message = problem.get('message', '').partition('\n')[0]
            failed.append(dict(name=name, message=message[:200]))
        elif left_out is not None:
            skipped[left_out.get('message', '')] += 1
        else:
            passed += 1
    return dict(passed=passed, failed=failed, skipped=dict(skipped))


def count_waits(norm: dict, setting: Setting) -> int:
    """Count how often the host waits for the GPU in a step of four blocks."""
    step = train_block(norm, next(iter(BLOCKS.values())), setting)
    for _ in range(20):  # until all cached tensors exist
        step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            step.run()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(w.message) for w in caught)


def capture(norm: dict, setting: Setting) -> str:
    """Capture a step of a block in a CUDA graph, and replay it.

    Returns:
        str: ``'yes'``, or the error message of the capture.
    """
    block = next(iter(BLOCKS.values()))
    torch.manual_seed(0)
    module = train_block(norm, block, setting).module[0]
    x = setting.put(torch.randn(block.shape))
    grad = torch.randn_like(x)
    parameters = list(module.parameters())

    def step() -> Sequence[Tensor]:
        out = module(x)
        return (out, *torch.autograd.grad(out, parameters, grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    x.normal_()
    wanted = copy.deepcopy(module)(x)
    graph.replay()
    if not torch.allclose(found[0], wanted, rtol=1e-3, atol=1e-3):
        return 'the replay has other outputs'
    return 'yes'


def machine() -> Dict[str, Any]:
    """Return the GPU's name, the versions and the date."""
    import mmengine
    return dict(
        gpu=torch.cuda.get_device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        mmengine=mmengine.__version__,
        date=time.strftime('%Y-%m-%d'))


def norm_table(rows: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Return a table of times relative to BatchNorm, one row per norm."""
    cases = list(dict.fromkeys((row['level'], row['case']) for row in rows))
    found = {(r['level'], r['case'], r['norm']): r for r in rows}
    host = next(case for case in cases if case[0] == 'host')
    lines = [['norm', *(f'{level}: {case}' for level, case in cases),
              'launches, host']]
    for name in dict.fromkeys(row['norm'] for row in rows):
        cells = [found.get((*case, name)) for case in cases]
        launched = found.get((*host, name))
        lines.append([
            name,
            *(f'{cell["time"]["median"]:.2f}' if cell else ''
              for cell in cells),
            str(launched['launches']) if launched else ''
        ])
    return lines


def page(result: Dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    on, tests = result['machine'], result['tests']
    lines = [
        f'# The norms on {on["gpu"]}', '',
        f'`{result["command"]}`, {on["date"]}: Python {on["python"]}, PyTorch '
        f'{on["torch"]}, CUDA {on["cuda"]}, cuDNN {on["cudnn"]}, mmengine '
        f'{on["mmengine"]}, without mmcv and mmdet. Total time: '
        f'{result["seconds"]} s.', '', '## Tests on the GPU', '',
        f'{" ".join(TESTS)} with `--device cuda`: {tests["passed"]} passed, '
        f'{len(tests["failed"])} failed, {sum(tests["skipped"].values())} '
        f'skipped, {tests["seconds"]} s.', ''
    ]
    lines += [f'- failed: `{one["name"]}`: {one["message"]}'
              for one in tests['failed']]
    lines += [f'- skipped, {count}: {reason}'
              for reason, count in tests['skipped'].items()]
    graphs = {name: one['graph'] for name, one in result['steps'].items()}
    lines += [
        '', '## Waiting, and CUDA graphs', '',
        'How often the host waits for the GPU in a training step of four '
        'blocks, and whether a step can be captured in a CUDA graph.', '',
        as_markdown([['norm', 'waits', 'CUDA graph'],
                     *([name, str(one['waits']),
                        'yes' if graphs[name] == 'yes' else 'no']
                       for name, one in result['steps'].items())]), ''
    ]
    reasons = {text.partition(' ')[2]: text for text in graphs.values()
               if text != 'yes'}
    lines += [f'- no: {text}' for text in reasons.values()]
    for title, rows in result['costs'].items():
        lines += [
            '', f'## Time of a training step, {title}', '',
            'Each number is the median of the ratio to the time of BatchNorm '
            "in the same round. Host is an iteration of mmengine's loop on 50 "
            'small blocks. Its time is that of the launches.', '',
            as_markdown(norm_table(rows))
        ]
    if result['left_out']:
        lines += ['', f'Not measured, because the time was over: '
                  f'{"; ".join(result["left_out"])}.']
    return '\n'.join([*lines, ''])


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tests and measurements, and write the results."""
    args = parse_args(argv)
    console, begin = Console(), time.perf_counter()
    with one_line_errors():
        if not torch.cuda.is_available():
            raise SetupError('torch finds no GPU. On a machine with a GPU, '
                             'install a torch that is built for CUDA')

        def left() -> float:
            return args.minutes * 60 - (time.perf_counter() - begin)

        console.print(f'tests on {torch.cuda.get_device_name()} ...')
        tests = run_tests(TESTS, 'cuda', left())
        for one in tests['failed']:
            console.print(f'failed: {one["name"]}: {one["message"]}',
                          markup=False)
        console.print(f'{tests["passed"]} passed, {len(tests["failed"])} '
                      f'failed, {tests["seconds"]} s')
        setting = Setting(torch.device('cuda'))
        steps = {
            name: dict(waits=count_waits(norm, setting),
                       graph=capture(norm, setting))
            for name, norm in NORMS.items() if norm['norm_cfg']
        }
        costs: Dict[str, Any] = {}
        left_out: List[str] = []
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write() -> Dict[str, Any]:
            result = dict(
                command='python tools/check_gpu.py '
                f'--minutes {args.minutes:g} --rounds {args.rounds}',
                machine=machine(),
                seconds=round(time.perf_counter() - begin),
                tests=tests,
                steps=steps,
                costs=costs,
                left_out=left_out)
            write_whole(path, json.dumps(result, indent=1) + '\n')
            write_whole(path.with_suffix('.md'), page(result))
            return result

        write()  # an error later on should not lose it
        for title, kind in SETTINGS.items():
            setting = Setting(torch.device('cuda'), **kind)
            if left() < 0:
                left_out.append(title)
                continue
            console.print(f'{title} ...')
            costs[title] = [
                row for contest in contests(LEVELS, NORMS, setting)
                for row in measure(*contest, setting, args.rounds)
            ]
        console.print(page(write()), markup=False)
        if tests['failed']:
            raise SetupError(f'{len(tests["failed"])} tests failed on the '
                             f'GPU. {path} lists them')
