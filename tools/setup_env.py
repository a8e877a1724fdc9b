"""Make the environment: a virtual one with the toolbox and its operators.

Standard library only; safe to run again. Called by ``make setup``.
"""
import argparse
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Small and quick operators: no debug symbols, little optimisation.
CFLAGS = os.environ.get('CFLAGS', '-g0 -O1')
CHECK = 'import mmcv.ops, mmdet.models, pycocotools.mask'
STEP = re.compile(r'\[(\d+)/(\d+)\]')


def has_operators(python: Path) -> bool:
    """Whether mmcv's compiled operators and mmdet import."""
    result = subprocess.run([str(python), '-W', 'ignore', '-c', CHECK],
                            capture_output=True)
    return result.returncode == 0


def pinned_mmcv(toolbox: str) -> str:
    """The requirement of setup.cfg that is a toolbox's mmcv."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    lines = setup['options.extras_require'][toolbox].split()
    return next(line for line in lines if 'mmcv' in line)


def is_cached(python: Path, requirement: str) -> bool:
    """Whether pip's cache holds a wheel that was built of a requirement."""
    name, version = requirement.replace('-', '_').split('==')
    tag = 'cp%d%d' % sys.version_info[:2]
    result = subprocess.run(
        [str(python), '-m', 'pip', 'cache', 'list', '--format', 'abspath',
         f'{name}-{version}-{tag}-*'], capture_output=True, text=True)
    return bool(result.stdout.strip())


def environment(flags: str) -> dict:
    """The variables that pip and the compiler run with."""
    variables = dict(
        os.environ, MMCV_WITH_OPS='1', PYTHONUNBUFFERED='1', CFLAGS=flags)
    variables.setdefault('MAX_JOBS', str(os.cpu_count()))
    # torch calls ccache if it is there. pip builds in a new folder each time.
    variables.setdefault('CCACHE_BASEDIR', tempfile.gettempdir())
    variables.setdefault('CCACHE_SLOPPINESS', 'pch_defines,time_macros')
    return variables


def precompile(python: Path, header: Path, log: Path) -> str:
    """Compile torch's header, which every file of mmcv starts with, once.

    If a compiler cannot use the result, it reads the header instead: that is
    slower, but not wrong.

    Returns:
        str: The flags of a compiler that includes it.
    """
    header.write_text('#include <torch/types.h>\n')
    code = ('from torch.utils.cpp_extension import include_paths\n'
            'print(*include_paths(), sep="\\n")')
    paths = subprocess.check_output([str(python), '-c', code], text=True)
    # With the flags of torch and of mmcv's setup.py.
    command = [
        *(['ccache'] if shutil.which('ccache') else []),
        os.environ.get('CXX', 'c++'), *CFLAGS.split(), '-fPIC', '-std=c++17',
        *(f'-I{path}' for path in paths.splitlines()), '-x', 'c++-header',
        '-c', str(header), '-o', f'{header}.gch'
    ]
    print('torch\'s header ...', flush=True)
    started = time.time()
    with log.open('a') as file:
        try:
            subprocess.run(command, env=environment(CFLAGS), stdout=file,
                           stderr=subprocess.STDOUT)
        except OSError as error:  # no compiler: mmcv's build says so
            file.write(f'{error}\n')
    print(f'  done in {time.time() - started:.0f} s', flush=True)
    return f'{CFLAGS} -include {shlex.quote(str(header))} -Winvalid-pch'


def build_operators(python: Path, mmcv: str, log: Path, *options) -> None:
    """Build mmcv, or take it from pip's cache."""
    arguments = ['--no-build-isolation', '--no-deps', *options, mmcv]
    if is_cached(python, mmcv) and '--no-cache-dir' not in options:
        return pip_install(python, arguments, log, mmcv)
    header = log.with_name('torch_types.h')
    try:
        flags = precompile(python, header, log)
        pip_install(python, arguments, log, mmcv, flags)
    finally:
        for path in header.parent.glob(f'{header.name}*'):
            path.unlink()


def pip_install(python: Path,
                arguments,
                log: Path,
                title: str,
                flags: str = CFLAGS) -> None:
    """Run pip, write what it prints to a file, show progress in one line."""
    command = [str(python), '-m', 'pip', 'install', '-v', *arguments]
    started, shown = time.time(), -1
    with log.open('a') as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(flags),
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
    mmcv = pinned_mmcv(args.toolbox)
    if not has_operators(python):
        print(
            'mmcv is built from source, with its operators: about 2 minutes '
            'on 2 cores the first time, seconds from pip\'s cache after that',
            flush=True)
        build_operators(python, mmcv, log)
    pip_install(python, ['--no-build-isolation', '-e', f'.[{args.toolbox}]'],
                log, f'the toolbox ({args.toolbox})')
    if not has_operators(python):
        # A wheel without operators may have come from pip's cache.
        build_operators(python, mmcv, log, '--no-cache-dir',
                        '--force-reinstall')
    if not has_operators(python):
        fail(f'"{CHECK}" does not work after installation', log)
    print(f'ready: {folder}')


if __name__ == '__main__':
    main()
