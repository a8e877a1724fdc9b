"""The directive ``tool``: what a tool of ``tools/`` prints with ``--help``."""
import contextlib
import io
import os
import runpy
from pathlib import Path
from unittest import mock

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


def help_of(tool: str) -> str:
    """Run a tool with ``--help``, in this process: imports take long."""
    printed = io.StringIO()
    with mock.patch('sys.argv', [tool, '--help']), mock.patch.dict(
            os.environ, COLUMNS='80'), contextlib.redirect_stdout(
                printed), contextlib.suppress(SystemExit):
        runpy.run_path(str(TOOLS / tool), run_name='__main__')
    return printed.getvalue()


class Tool(SphinxDirective):
    """The help of the tool that the argument names."""
    required_arguments = 1

    def run(self):
        # Its flags may be in any file.
        self.env.note_reread()
        text = help_of(self.arguments[0])
        if not text:
            raise self.error(f'{self.arguments[0]} --help prints nothing')
        return [nodes.literal_block(text, text, language='text')]


def setup(app):
    app.add_directive('tool', Tool)
    return dict(parallel_read_safe=True)
