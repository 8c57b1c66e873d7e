"""The command ``natgrad``; one module a subcommand."""

import sys
from importlib import import_module
from io import TextIOWrapper

import ntk_analysis.cli._requirements  # noqa: F401 - before what needs them
from ntk_analysis.cli.app import app

COMMANDS = ("report", "dynamics", "predict", "isotropy", "datasets", "reproduce")
"""Modules of this package, each of which adds its command to ``app``, in the order of --help."""

for _name in COMMANDS:
    import_module(f"{__name__}.{_name}")


def main() -> None:
    """The entry point."""
    import scipy.linalg  # noqa: F401 - its BLAS must be there when it is limited
    from threadpoolctl import threadpool_limits

    # a locale without the signs of formulas shows others in their place
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    # threads of OpenBLAS fight with XLA's for the cores; some parts then take 20 times as long
    with threadpool_limits(1, user_api="blas"):
        app()


__all__ = ["COMMANDS", "app", "main"]
