"""The installer, as far as it goes without installing."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_environment_behind_a_link_is_left_alone(tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    link = tmp_path / '.venv'
    link.symlink_to(other)
    result = subprocess.run(
        [sys.executable, 'tools/setup_env.py', str(link)],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f'{link} is a link to {other}' in result.stderr
    assert list(other.iterdir()) == []
