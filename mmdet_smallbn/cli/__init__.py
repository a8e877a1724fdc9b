"""The command lines behind ``tools/``."""
from ..version import check_versions

check_versions(whole=True)
