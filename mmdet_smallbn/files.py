"""Text and JSON files that stay complete if the program stops."""
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable


def write_whole(path: Path, text: str) -> None:
    """Write a text file; if this is interrupted, the old file stays."""
    unfinished = path.with_suffix('.part')
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_runs(path: Path, runs: Iterable[Dict[str, Any]],
               **head: Any) -> None:
    """Write runs as JSON, one in a line, after the entries of ``head``."""
    lines = ',\n'.join(f'  {json.dumps(run)}' for run in runs)
    entries = [f'{json.dumps(name)}: {json.dumps(value)}'
               for name, value in head.items()]
    entries.append(f'"runs": [\n{lines}\n]')
    text = ',\n '.join(entries)
    write_whole(path, f'{{{text}}}\n')
