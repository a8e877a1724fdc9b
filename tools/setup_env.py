"""Make the environment: a virtual one with the toolbox and its operators.

Standard library only; safe to run again. Called by ``make setup``.
"""
import argparse
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = 'import mmcv.ops, mmdet.models, pycocotools.mask'
STEP = re.compile(r'\[(\d+)/(\d+)\]')


def has_operators(python: Path) -> bool:
    """Whether mmcv's compiled operators and mmdet import."""
    result = subprocess.run([str(python), '-W', 'ignore', '-c', CHECK],
                            capture_output=True)
    return result.returncode == 0


def pip_install(python: Path, arguments, log: Path, title: str) -> None:
    """Run pip, write what it prints to a file, show progress in one line."""
    command = [str(python), '-m', 'pip', 'install', '-v', *arguments]
    # Small and quick operators: no debug symbols, little optimisation.
    environment = dict(os.environ, MMCV_WITH_OPS='1', PYTHONUNBUFFERED='1')
    environment.setdefault('CFLAGS', '-g0 -O1')
    environment.setdefault('MAX_JOBS', str(os.cpu_count()))
    started, shown = time.time(), -1
    with log.open('a') as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            errors='replace',
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        print(f'{title} ...', flush=True)
        for line in process.stdout:
            file.write(line)
            step = STEP.search(line)
            if step:
                done, total = map(int, step.groups())
                if done * 10 // total != shown:
                    shown = done * 10 // total
                    print(
                        f'  compiling {done}/{total}, '
                        f'{time.time() - started:.0f} s',
                        flush=True)
        code = process.wait()
    if code:
        fail(f'{title} failed', log)
    print(f'  done in {time.time() - started:.0f} s', flush=True)


def fail(what: str, log: Path) -> None:
    """Say what failed, show the end of the log, and what to do."""
    tail = log.read_text().splitlines()[-15:] if log.exists() else []
    print('\n'.join(tail), file=sys.stderr)
    sys.exit(f'error: {what}. The log is {log}. A C++ compiler and the Python '
             'headers are needed (Debian: g++ python3-dev), 5 GB of disk, and '
             'the package index within reach. To start over, remove '
             f'{log.parent} and run make setup again')


def main() -> None:
    """Make or complete the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='virtual environment to make')
    parser.add_argument(
        '--toolbox',
        choices=['openmmlab', 'onedl'],
        default='openmmlab',
        help='which family of mmengine, mmcv and mmdet')
    args = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit('error: the pinned versions need Python 3.11 to 3.13, this is '
                 f'{sys.version.split()[0]}. Remedy: make setup '
                 'PYTHON=python3.11')
    folder = Path(args.folder).absolute()
    if folder.is_symlink():
        sys.exit(f'error: {folder} is a link to {folder.resolve()}, and what '
                 'is installed would change that environment. Remove the '
                 'link, or run the tools with that environment\'s python '
                 'after pip install -e .')
    python = folder / 'bin' / 'python'
    log = folder / 'setup.log'
    ready, wanted = folder / 'ready', ROOT / 'setup.cfg'
    if ready.exists() and ready.stat().st_mtime < wanted.stat().st_mtime:
        print('setup.cfg is newer than the environment: bringing it up to '
              'date', flush=True)
    if not python.exists():
        print(f'making {folder}', flush=True)
        try:
            venv.create(folder, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f'error: no virtual environment in {folder} ({error}). '
                     f'Remove it, install venv (Debian: python3-venv), and '
                     'run make setup again')

    pip_install(python, ['-e', '.[build,tools,onnx,tests,docs]'], log,
                'torch and build tools')
    print(
        'mmcv is built from source, with its operators: about 5 minutes on 2 '
        'cores the first time, seconds from pip\'s cache after that',
        flush=True)
    toolbox = ['--no-build-isolation', '-e', f'.[{args.toolbox}]']
    pip_install(python, toolbox, log, f'the toolbox ({args.toolbox})')
    if not has_operators(python):
        # A wheel without operators may have come from pip's cache.
        name = 'mmcv' if args.toolbox == 'openmmlab' else 'onedl-mmcv'
        pinned = subprocess.check_output(
            [str(python), '-m', 'pip', 'freeze'], text=True)
        version = re.search(rf'^{name}==\S+', pinned, re.M)
        rebuild = ['--no-cache-dir', '--no-build-isolation', '--no-deps']
        pip_install(
            python,
            [*rebuild, '--force-reinstall',
             version.group() if version else name], log,
            'mmcv again, without the cache')
    if not has_operators(python):
        fail(f'"{CHECK}" does not work after installation', log)
    print(f'ready: {folder}')


if __name__ == '__main__':
    main()
