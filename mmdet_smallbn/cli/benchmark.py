"""Benchmark of the norms' time and memory, relative to BatchNorm."""
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from rich.console import Console
from rich.table import Table

from ..benchmark.cases import NORMS, Setting
from ..benchmark.contests import (BASELINE, DTYPES, LEVELS, contests, machine,
                                  measure, table)
from ..errors import check_known, one_line_errors
from ..pictures import save_costs, save_lines
from ..progress import progress_bar
from ..tables import as_markdown


_DOCS = Path(__file__).resolve().parents[2] / 'docs'
# Norms in the picture. The tables list all norms.
_DRAWN = ('GN', 'CBN, window 4', 'MABN', 'BRN', 'BGN', 'GhostBN')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Measure time and memory of the norms as ratios to '
        'BatchNorm. Each round measures every norm once')
    parser.add_argument(
        '--levels',
        nargs='+',
        choices=LEVELS,
        default=['norm', 'block', 'growth', 'host', 'inference'],
        help='what to measure the norms in. Slow: host (many small blocks in '
        'a training loop), latency (ResNet-50 with FPN on one image, with and '
        'without folding) and detectors')
    parser.add_argument(
        '--norms', nargs='+', metavar='NAME',
        help='norms to measure (default: all)')
    parser.add_argument(
        '--rounds', type=int, default=25,
        help='rounds of measurements, at least 3 (default: 25)')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device to run on (default: cuda if there is one)')
    parser.add_argument(
        '--threads', type=int, default=torch.get_num_threads(),
        help="number of torch's CPU threads")
    parser.add_argument('--dtype', choices=DTYPES, default='float32',
                        help='data type (default: float32)')
    parser.add_argument('--channels-last', action='store_true',
                        help='use the channels_last memory format')
    parser.add_argument(
        '--images', type=int, default=2,
        help="batch size of the detectors (default: 2)")
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=[320, 320],
        metavar=('HEIGHT', 'WIDTH'),
        help="image size of the detectors (default: 320 320)")
    parser.add_argument(
        '--sides',
        type=int,
        nargs='+',
        default=[320, 480, 640],
        metavar='PIXELS',
        help='sides of the square images of latency (default: 320 480 640)')
    parser.add_argument(
        '--rois', type=int, default=64,
        help='regions of interest per image in training (default: 64)')
    parser.add_argument(
        '--out', help='JSON file to write; a Markdown table is saved next to '
        'it')
    parser.add_argument(
        '--draw',
        action='store_true',
        help='only draw docs/costs.png, windows.png and growth.png from the '
        'measurements stored in docs')
    args = parser.parse_args(argv)
    if args.rounds < 3:
        parser.error('--rounds must be at least 3 for quartiles, but got '
                     f'{args.rounds}')
    return args


def chosen(names: Optional[Sequence[str]]) -> Dict[str, dict]:
    """Return the requested norms by name, always with the baseline.

    Raises:
        SetupError: If a name is unknown.
    """
    check_known('--norms', names, list(NORMS))
    kept = [n for n in NORMS if names is None or n in (*names, BASELINE)]
    return {name: NORMS[name] for name in kept}


def page(result: Dict[str, Any]) -> str:
    """Return a Markdown page: the table, the command and the machine."""
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


def draw(source: Path, target: Path) -> None:
    """Draw three pictures from stored measurements.

    Args:
        source (Path): Folder with the measurements.
        target (Path): Folder to write the pictures to.
    """
    stored = {
        name: json.loads((source / name).read_text())
        for name in ('benchmark_cpu.json', 'benchmark_detectors_cpu.json',
                     'results/gpu.json')
    }
    cpu, detectors, gpu = stored.values()
    detectors, gpu_name = detectors['rows'], gpu['machine']['gpu']
    cpu, gpu = cpu['rows'], gpu['costs']['float32']
    block = 'bottleneck, 2x256x32x32, 1x1'

    def ratios(rows: List[Dict[str, Any]], level: str, case: str) -> dict:
        return {row['norm']: row['time'] for row in rows
                if (row['level'], row['case']) == (level, case)}

    panels = {
        'Faster R-CNN on a CPU, norms in neck and heads':
        ratios(detectors, 'detector', 'Faster R-CNN, norms in heads'),
        'Faster R-CNN on a CPU, norms everywhere':
        ratios(detectors, 'detector', 'Faster R-CNN, norms in all'),
        f'one block on a CPU ({block})': ratios(cpu, 'block', block),
        f'one block on {gpu_name} ({block})': ratios(gpu, 'block', block)
    }
    save_costs(
        {title: {name: bars[name] for name in _DRAWN if name in bars}
         for title, bars in panels.items()}, target / 'costs.png')
    cases = dict.fromkeys(r['case'] for r in cpu if r['level'] == 'block')
    save_lines(
        {'a block with CBN, on a CPU': {
            case.partition(',')[0]: {
                str(k): [ratios(cpu, 'block', case)[f'CBN, window {k}']
                         ['median']] for k in (1, 2, 4, 8, 16)
            } for case in cases
        }}, target / 'windows.png', 'window, iterations',
        'time / BatchNorm\'s')
    save_lines(
        {f'a block over its {grown}, on a CPU': {
            norm: {
                row['case'].split()[-1]: [row['time']['median']]
                for row in cpu if row['level'] == 'growth'
                and grown in row['case'] and row['norm'] == norm
            } for norm in ('CBN, window 4', 'MABN')
        } for grown in ('batch', 'channels')}, target / 'growth.png',
        'images of a batch, or channels', 'time / BatchNorm\'s')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, print the table and write the files."""
    args = parse_args(argv)
    if args.draw:
        draw(_DOCS, _DOCS)
        return
    torch.set_num_threads(args.threads)
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)
    setting = Setting(
        torch.device(args.device), DTYPES[args.dtype], args.channels_last)
    rows: List[Dict[str, Any]] = []
    with one_line_errors():
        todo = list(contests(
            args.levels, chosen(args.norms), setting, args.sides,
            images=args.images, size=args.size, rois=args.rois))
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
            machine=machine(setting),
            rows=rows)
        path.write_text(json.dumps(result, indent=1) + '\n')
        path.with_suffix('.md').write_text(page(result))
        print(f'written to {path.parent}: {path.name}, {path.stem}.md')


if __name__ == '__main__':
    main()
