"""The command lines behind ``tools/``."""
