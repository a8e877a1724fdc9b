"""What the norms cost, as ratios to BatchNorm measured side by side."""
import argparse
import datetime
import json
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from rich.console import Console
from rich.table import Table

from ..benchmark.cases import (BLOCKS, DEPLOYED, DETECTORS, NORMS, PLACES,
                               Contender, Setting, infer_block,
                               infer_network, train_block, train_detector,
                               train_norm, train_stack)
from ..benchmark.measure import interleave, launches, peak_memory, ratio
from ..errors import check_known, one_line_errors
from ..pictures import save_costs
from ..progress import progress_bar
from ..tables import as_markdown

BASELINE = 'BN'
LEVELS = ('norm', 'block', 'growth', 'host', 'inference', 'latency',
          'detector')
_DTYPES = dict(
    float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
_CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'cbn'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the tool."""
    parser = argparse.ArgumentParser(
        description='Measure time and memory of the norms, one after the '
        'other in each of several rounds, as ratios to BatchNorm')
    parser.add_argument(
        '--levels',
        nargs='+',
        choices=LEVELS,
        default=['norm', 'block', 'growth', 'host', 'inference'],
        help='what the norms are in; host (many small blocks in a training '
        'loop), latency (ResNet-50 with FPN on one image, folded and not) and '
        'a detector take long')
    parser.add_argument(
        '--norms', nargs='+', metavar='NAME', help='all, if not given')
    parser.add_argument('--rounds', type=int, default=25)
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--dtype', choices=_DTYPES, default='float32')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument(
        '--images', type=int, default=2, help="of a detector's batch")
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=[320, 320],
        metavar=('HEIGHT', 'WIDTH'),
        help="of a detector's images")
    parser.add_argument(
        '--sides',
        type=int,
        nargs='+',
        default=[320, 480, 640],
        metavar='PIXELS',
        help="of latency's square images")
    parser.add_argument(
        '--rois', type=int, default=64, help='regions of an image in training')
    parser.add_argument(
        '--out', help='JSON file to write; a table and a picture go beside it')
    args = parser.parse_args(argv)
    if args.rounds < 3:
        parser.error(f'--rounds {args.rounds}: quartiles need at least 3')
    return args


def chosen(names: Optional[Sequence[str]]) -> Dict[str, dict]:
    """Norms by name, the baseline first.

    Raises:
        SetupError: If a name is unknown.
    """
    check_known('--norms', names, list(NORMS))
    kept = [n for n in NORMS if names is None or n in (*names, BASELINE)]
    return {name: NORMS[name] for name in kept}


def contests(args: argparse.Namespace, norms: Dict[str, dict],
             setting: Setting) -> Iterator[tuple]:
    """Level, case, and what makes the contenders, one contest at a time."""
    makers: Dict[str, Callable] = dict(
        norm=train_norm, block=train_block, inference=infer_block)
    for level in (n for n in args.levels if n in makers):
        for case, block in BLOCKS.items():
            make = {
                name: (makers[level], norm, block, setting)
                for name, norm in norms.items()
                if level != 'norm' or norm['norm_cfg'] is not None
            }
            if level == 'inference':
                make['BN, folded'] = (infer_block, norms[BASELINE], block,
                                      setting, True)
            yield level, case, make
    if 'growth' in args.levels:
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
    if 'host' in args.levels:
        yield 'host', '50 blocks, 2x64x4x4, 3x3', {
            name: (train_stack, norm, setting, tempfile.mkdtemp())
            for name, norm in norms.items()
            if norm['norm_cfg'] is not None
        }
    if 'latency' in args.levels:
        for side in args.sides:
            make = {}
            for name in (n for n in DEPLOYED if n in norms):
                make[name] = (infer_network, norms[name], side, setting)
                if name != 'GN':
                    make[f'{name}, folded'] = (*make[name], True)
            yield 'latency', f'R50-FPN, 1x3x{side}x{side}', make
    if 'detector' in args.levels:
        for detector, config in DETECTORS.items():
            for place in PLACES:
                yield 'detector', f'{detector}, norms in {place}', {
                    name: (train_detector, str(_CONFIGS / config), place, norm,
                           setting, args.images, args.size, args.rois)
                    for name, norm in norms.items()
                    if norm['norm_cfg'] is not None
                }


def measure(level: str, case: str, make: Dict[str, tuple], setting: Setting,
            rounds: int, tell: Callable[[], None]) -> List[Dict[str, Any]]:
    """Let the contenders of one case run side by side."""
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
    """Lines of the table, the first of them its head."""
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
    """The name of the CPU."""
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def machine(args: argparse.Namespace) -> Dict[str, Any]:
    """The device that the numbers are from, and its settings."""
    on_cpu = args.device == 'cpu'
    return dict(
        device=processor() if on_cpu else torch.cuda.get_device_name(),
        threads=args.threads if on_cpu else None,
        torch=torch.__version__,
        dtype=args.dtype,
        channels_last=args.channels_last,
        date=datetime.date.today().isoformat())


def page(result: Dict[str, Any]) -> str:
    """The table as a Markdown page, with command and machine."""
    on = result['machine']
    where = f'{on["device"]}, {on["threads"]} threads' if (
        on['threads']) else on['device']
    layout = ', channels_last' if on['channels_last'] else ''
    return '\n'.join([
        f'# Time and memory beside BatchNorm, {on["dtype"]}{layout}', '',
        f'`{result["command"]}` on {where}, PyTorch {on["torch"]}, '
        f'{on["date"]}. Ratios within each round, medians and quartiles over '
        'the rounds; memory is parameters, states and the peak of a step.', '',
        as_markdown(table(result['rows'])), ''
    ])


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    setting = Setting(
        torch.device(args.device), _DTYPES[args.dtype], args.channels_last)
    rows: List[Dict[str, Any]] = []
    with one_line_errors():
        todo = list(contests(args, chosen(args.norms), setting))
        with progress_bar('measuring', len(todo) * args.rounds) as tell:
            for level, case, make in todo:
                tell(description=f'{level}: {case}')
                rows += measure(level, case, make, setting, args.rounds,
                                partial(tell, advance=1))
    head, *lines = table(rows)
    printed = Table(title='Ratios to BatchNorm, medians of the rounds')
    for column in head:
        printed.add_column(column)
    for line in lines:
        printed.add_row(*line)
    Console().print(printed)
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ' '.join(sys.argv[1:] if argv is None else argv)
        result = dict(
            command=f'python tools/benchmark.py {command}',
            machine=machine(args),
            rows=rows)
        path.write_text(json.dumps(result, indent=1) + '\n')
        path.with_suffix('.md').write_text(page(result))
        save_costs(rows, path.with_suffix('.png'))
        print(f'In {path.parent}: {path.name}, {path.stem}.md and .png')


if __name__ == '__main__':
    main()
