"""The site: ``make docs``. Its pages are the Markdown files of the repository.

The source folder is the repository's root, so that a link means the same in a
file and on the site.
"""
import sys
from pathlib import Path

from sphinx.addnodes import pending_xref
from sphinx.errors import ConfigError

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from mmdet_smallbn.version import __version__  # noqa: E402

project = 'mmdet_smallbn'
copyright = 'the authors of mmdet_smallbn'
version = release = __version__
extensions = [
    'myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'tool_help'
]
root_doc = 'docs/index'
html_theme = 'furo'
html_title = f'mmdet_smallbn {__version__}'
html_extra_path = ['_extra']

include_patterns = [
    'README.md', 'CHANGELOG.md', 'docs/**.md', 'configs/**README.md'
]
# Environments, data and what was built: the folders are large.
exclude_patterns = sorted({'build'} | {
    path.name
    for path in ROOT.iterdir() if path.is_dir()
} - {'docs', 'configs'})

myst_enable_extensions = ['dollarmath', 'html_image']
myst_heading_anchors = 4
nitpicky = True
# Types of other packages, and words beside types.
nitpick_ignore_regex = [
    ('py:class', r'optional|callable|Path|Tensor|Config|Hook|Runner|'
     r'RemovableHandle|(torch|nn|np|mmengine|mmcv|mmdet)\..+')
]

autodoc_typehints = 'none'
autodoc_member_order = 'bysource'


def skip_field(app, what, name, obj, skip, options):
    """The fields of a named tuple are in its docstring."""
    return type(obj).__name__ == '_tuplegetter' or None


def unlink_folders(app, doctree):
    """A folder of the repository is no page: its link becomes text."""
    for link in list(doctree.findall(pending_xref)):
        page = ROOT / link.get('refdoc', '')
        if link['reftype'] == 'myst' and (page.parent /
                                          link['reftarget']).is_dir():
            link.replace_self(link.children)


def search_everywhere(app, env, node, contnode):
    """Docstrings name what another module has without its path."""
    if node.get('refdomain') != 'py' or node.get('refspecific'):
        return None
    node['refspecific'] = True
    return env.domains['py'].resolve_xref(env, node['refdoc'], app.builder,
                                          node['reftype'], node['reftarget'],
                                          node, contnode)


def setup(app):
    if app.srcdir != ROOT:
        raise ConfigError('links of the pages lead beyond docs/. Build with: '
                          'make docs, or sphinx-build -c docs . FOLDER')
    app.connect('autodoc-skip-member', skip_field)
    app.connect('doctree-read', unlink_folders)
    app.connect('missing-reference', search_everywhere)
