"""Command line programs that the scripts in ``tools/`` run."""
from ..version import check_versions

check_versions(whole=True)
