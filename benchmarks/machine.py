"""Registers this machine with asv under a name of its processor and of the device that JAX uses.

asv keeps results by machine, so runs on a GPU never mix with runs on the CPU beside it.
``python -m benchmarks.machine`` prints the name: ``asv run --machine "$(python -m ...)"``.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import jax

VARIABLE = "NATGRAD_BENCH_MACHINE"
"""Set by `make bench` to the registered name; every measurement is refused on another device."""


def processor() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    rows = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [row.split(":", 1)[1].strip() for row in rows if row.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device() -> str:
    """The kind of JAX's default device: "cpu", or the model of the accelerator."""
    return jax.devices()[0].device_kind


def machine_name() -> str:
    """Device, processor and cores in lower case with hyphens: ``cpu-amd-epyc-2-cores``.

    The device comes first: asv's page cuts long names.
    """
    return _hyphened(f"{device()} {processor()} {cores()} cores")


def _hyphened(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", text.lower())).strip("-")


def check_machine() -> None:
    """Raises RuntimeError where results are to be kept for a machine with another device."""
    expected = os.environ.get(VARIABLE)
    if expected and not expected.startswith(f"{_hyphened(device())}-"):
        raise RuntimeError(
            f"results are kept for the machine {expected!r}, but JAX runs on {device()!r} here: "
            "install JAX for that device in asv's environment (asv.conf.json, matrix), or "
            "set JAX_PLATFORMS=cpu and register again with python -m benchmarks.machine"
        )


def register(path: Path | None = None) -> str:
    """Writes the record of this machine to asv's machine file, and returns its name.

    Args:
      path: another file than the one in the home folder.
    """
    # asv is not in the environments that it runs the benchmarks in
    from asv.machine import Machine, MachineCollection  # type: ignore[import-untyped]

    name = machine_name()
    defaults = Machine.get_defaults()
    record = defaults | {
        "machine": name,
        # without its release, which would begin a history of its own with every update
        "os": platform.system(),
        "cpu": f"{processor()}; JAX runs on {device()}",
        "num_cpu": str(cores()),
        "ram": f"{int(defaults['ram']) / 2**30:.0f} GiB",
        "device": device(),
    }
    MachineCollection.save(name, record, _path=None if path is None else str(path))
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers the machine and prints its name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__)
    parser.add_argument(
        "--file", type=Path, help="instead of asv's machine file in the home folder"
    )
    print(register(parser.parse_args(arguments).file))


if __name__ == "__main__":
    main()
