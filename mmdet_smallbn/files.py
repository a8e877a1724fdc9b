"""Files that a stop leaves whole."""
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file, or leave the one that was there."""
    unfinished = path.with_suffix('.part')
    unfinished.write_text(text)
    os.replace(unfinished, path)
