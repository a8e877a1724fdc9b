"""Comparisons of norms: which norms are measured together, in which case."""
import datetime
import platform
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch

from .cases import (BLOCKS, DEPLOYED, DETECTORS, PLACES, Contender, Setting,
                    infer_block, infer_network, train_block,
                    train_detector, train_norm, train_stack)
from .measure import interleave, launches, peak_memory, ratio

BASELINE = 'BN'
LEVELS = ('norm', 'block', 'growth', 'host', 'inference', 'latency',
          'detector')
DTYPES = dict(
    float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'cbn'


def contests(levels: Sequence[str],
             norms: Dict[str, dict],
             setting: Setting,
             sides: Sequence[int] = (),
             **detector: Any) -> Iterator[tuple]:
    """Yield level, case and contenders of each comparison.

    Each contender is a tuple of a function and its arguments; the call
    returns a :class:`Contender`.

    Args:
        levels (Sequence[str]): Levels from :data:`LEVELS`.
        norms (dict[str, dict]): Norms from ``cases.NORMS``, including the
            baseline.
        setting (Setting): Device, precision and memory format.
        sides (Sequence[int]): Sides in pixels of the square images for level
            ``'latency'``.
        **detector: ``images``, ``size`` and ``rois`` of
            :func:`train_detector`.
    """
    makers: Dict[str, Callable] = dict(
        norm=train_norm, block=train_block, inference=infer_block)
    real = {n: norm for n, norm in norms.items() if norm['norm_cfg']}
    for level in (n for n in levels if n in makers):
        for case, block in BLOCKS.items():
            make = {
                name: (makers[level], norm, block, setting)
                for name, norm in (real if level == 'norm' else norms).items()
            }
            if level == 'inference':
                make['BN, folded'] = (infer_block, norms[BASELINE], block,
                                      setting, True)
            yield level, case, make
    if 'growth' in levels:
        block = BLOCKS['backbone, 2x64x64x64, 3x3']
        some = [n for n in (BASELINE, 'CBN, window 4', 'MABN') if n in norms]
        for key, values in (('batch', (1, 2, 4)), ('channels', (64, 128,
                                                                256))):
            for value in values:
                grown = block.grown(**{key: value})
                yield 'growth', f'backbone, {key} {value}', {
                    name: (train_block, norms[name], grown, setting)
                    for name in some
                }
    if 'host' in levels:
        yield 'host', '50 blocks, 2x64x4x4, 3x3', {
            name: (train_stack, norm, setting, tempfile.mkdtemp())
            for name, norm in real.items()
        }
    if 'latency' in levels:
        for side in sides:
            make = {}
            for name in (n for n in DEPLOYED if n in norms):
                make[name] = (infer_network, norms[name], side, setting)
                if name != 'GN':
                    make[f'{name}, folded'] = (*make[name], True)
            yield 'latency', f'R50-FPN, 1x3x{side}x{side}', make
    if 'detector' in levels:
        for kind, config in DETECTORS.items():
            for place in PLACES:
                yield 'detector', f'{kind}, norms in {place}', {
                    name: (train_detector, str(CONFIGS / config), place, norm,
                           setting, *detector.values())
                    for name, norm in real.items()
                }


def measure(level: str, case: str, make: Dict[str, tuple], setting: Setting,
            rounds: int, tell: Callable[[], None] = lambda: None
            ) -> List[Dict[str, Any]]:
    """Measure the contenders of one case in turn.

    Args:
        level, case, make: One result of :func:`contests`.
        setting (Setting): Device, precision and memory format.
        rounds (int): Number of timings of each contender.
        tell (callable): Progress callback, called after each round.
    """
    contenders: Dict[str, Contender] = {}
    for name, (maker, *arguments) in make.items():
        torch.manual_seed(0)
        contenders[name] = maker(*arguments)
        for _ in range(2):
            contenders[name].run()
    times = interleave({n: c.run for n, c in contenders.items()}, rounds,
                       setting.device, tell=tell)
    memory = {
        name: contender.resident_bytes() +
        peak_memory(contender.run, setting.device)
        for name, contender in contenders.items()
    }
    return [
        dict(
            level=level,
            case=case,
            norm=name,
            seconds=sorted(times[name])[rounds // 2],
            time=ratio(times[name], times[BASELINE])._asdict(),
            memory=memory[name] / memory[BASELINE],
            bytes=memory[name],
            state_bytes=contender.state_bytes(),
            launches=launches(contender.run, setting.device))
        for name, contender in contenders.items()
    ]


def table(rows: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Return the rows of the result table; the first row is the header."""
    lines = [[
        'level', 'case', 'norm', 'time / BN', 'quartiles', 'memory / BN',
        'state, KiB', 'launches'
    ]]
    for row in rows:
        time = row['time']
        lines.append([
            row['level'], row['case'], row['norm'], f'{time["median"]:.3f}',
            f'{time["low"]:.3f}-{time["high"]:.3f}', f'{row["memory"]:.3f}',
            f'{row["state_bytes"] / 1024:.0f}',
            str(row['launches'])
        ])
    return lines


def processor() -> str:
    """Return the name of the CPU."""
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def machine(setting: Setting) -> Dict[str, Any]:
    """Return the device of the measurements and its settings."""
    on_cpu = setting.device.type == 'cpu'
    names = {dtype: name for name, dtype in DTYPES.items()}
    return dict(
        device=processor() if on_cpu else torch.cuda.get_device_name(),
        threads=torch.get_num_threads() if on_cpu else None,
        torch=torch.__version__,
        dtype=names[setting.dtype],
        channels_last=setting.channels_last,
        date=datetime.date.today().isoformat())
