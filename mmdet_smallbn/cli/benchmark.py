"""What the norms cost, as ratios to BatchNorm measured side by side."""
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
# The tables have all norms.
_DRAWN = ('GN', 'CBN, window 4', 'MABN', 'BRN', 'BGN', 'GhostBN')


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
    parser.add_argument('--dtype', choices=DTYPES, default='float32')
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
        '--out', help='JSON file to write; a table goes beside it')
    parser.add_argument(
        '--draw',
        action='store_true',
        help='measure nothing: draw docs/costs.png, windows.png and growth.png '
        'from the measurements in docs')
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


def draw(source: Path, target: Path) -> None:
    """Draw three pictures of stored measurements, one question each.

    Args:
        source (Path): Folder of the measurements.
        target (Path): Folder of the pictures.
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
    """Measure, print, write."""
    args = parse_args(argv)
    if args.draw:
        draw(_DOCS, _DOCS)
        return
    torch.set_num_threads(args.threads)
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
        print(f'In {path.parent}: {path.name} and {path.stem}.md')


if __name__ == '__main__':
    main()
