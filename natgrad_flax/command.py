"""The entry point ``natgrad``, which says what to install where an extra is missing."""

from __future__ import annotations

import sys
from importlib import import_module

import natgrad_flax as ng
from natgrad_flax.arguments.extras import MissingExtraError


def main() -> int | None:
    """Runs the command; 2 where it is not installed as a whole."""
    if sys.argv[1:] == ["--version"]:
        print(f"natgrad {ng.__version__}")
        return 0
    try:
        # by name: this package stands below the one with the commands
        commands = import_module("ntk_analysis.cli")
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    commands.main()
    return None
