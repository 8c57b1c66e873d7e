"""What one short session on a GPU should leave behind: ``make gpu``.

The figures of Karakida & Osawa (2020) that the report compares between devices, networks at the
paper's width and at four times it, the ratios of steps, and a part of asv's large profile:
each in a process of its own, all within ten minutes. What a stage wrote before its time ran out is
kept. The documents go to ``results/``, named by device and date.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console

from benchmarks.common import VARIABLE, profile
from ntk_analysis.results import FILE_NAME, write_json

_NATGRAD = (sys.executable, "-c", "from ntk_analysis.cli import main; main()")
_LOG = "log.txt"


@dataclass(frozen=True)
class Stage:
    """One command, which writes into a folder of its own.

    Attributes:
      name: of the folder, and of the document in ``results/``; "" for the checks of the papers.
      command: what is run.
      seconds: after which it is ended.
    """

    name: str
    command: tuple[str, ...]
    seconds: float


def stages(out: Path, machine: str, smoke: bool) -> tuple[Stage, ...]:
    """What is run, the most wanted first.

    Args:
      out: folder of the runs.
      machine: its name for asv.
      smoke: at sizes that a CPU manages in a minute.
    """
    checks = ("VO-Thm1",) if smoke else ("KO-Fig1a", "KO-Fig1a-width", "KO-Fig1b-left")
    small = ("--dataset", "digits", "--num-train", "8", "--num-test", "8", "--structures", "exact")
    few = ("--structure", "quasi-diag", "--line", "mse-4096", "--repeats", "1")
    suites = "growth" if smoke else "(step.Step|kernels.AnalyticNtk|kernels.EmpiricalLayers)"
    found = [Stage("", (*_NATGRAD, "reproduce", *checks, "--out", str(out / "checks")), 150)]
    for width in ("16", "32") if smoke else ("4096", "16384"):
        name = f"dynamics-{width}"
        command = (*_NATGRAD, "dynamics", "--widths", width, width, "--out", str(out / name))
        found.append(Stage(name, command + (small if smoke else ()), 90))
    steps = (sys.executable, "-m", "benchmarks.step", "--out", str(out / "steps" / FILE_NAME))
    found.append(Stage("steps", steps + (few if smoke else ()), 150))
    asv = (sys.executable, "-m", "asv", "run", "--python=same", "--quick", "--dry-run")
    found.append(Stage("asv", (*asv, "--machine", machine, "--bench", suites), 120))
    return tuple(found)


def run(stage: Stage, out: Path, results: Path, prefix: str) -> str:
    """Runs a stage, copies its document to ``results``, and says in a word how it ended.

    Args:
      stage: the stage.
      out: folder of the runs.
      results: folder of the documents.
      prefix: device and date.
    """
    folder = out / (stage.name or "checks")
    folder.mkdir(parents=True, exist_ok=True)
    size = "smoke" if profile() == "smoke" else "large"
    with (folder / _LOG).open("w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(
                stage.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=stage.seconds,
                env={**os.environ, VARIABLE: size},
                check=False,
            )
            how = "done" if ended.returncode == 0 else f"exit code {ended.returncode}"
        except subprocess.TimeoutExpired:
            how = f"ended after {stage.seconds:g} s"
    document = folder / FILE_NAME
    if document.exists():
        content = json.loads(document.read_text(encoding="utf-8"))
    else:
        text = (folder / _LOG).read_text(encoding="utf-8", errors="replace")
        content = {"command": " ".join(stage.command[1:4]), "output": text.splitlines()}
    ending = f"-{stage.name}" if stage.name else ""
    write_json(results / f"{prefix}{ending}.json", content)
    return how


def _printed(*arguments: str) -> str:
    """What another Python prints."""
    command = (sys.executable, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every stage; exit code 1 where one of them did not end by itself with success."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("natgrad-gpu"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="of the documents")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    # in a process of its own: JAX would keep most of the memory of the device for itself
    platform = _printed("-c", "import jax; print(jax.devices()[0].platform)")
    smoke = profile() == "smoke"
    if platform == "cpu" and not smoke:
        parser.error(
            f"JAX sees no accelerator here; {VARIABLE}=smoke tries the commands on a CPU, and "
            "make gpu installs JAX for CUDA (WHEELS=folder: from wheels in a folder)"
        )
    prefix = f"{platform}-{date.today().isoformat()}"
    endings = []
    machine = _printed("-m", "benchmarks.machine")
    for stage in stages(options.out, machine, smoke):
        title = stage.name or "checks of the papers"
        with console.status(f"{title}, at most {stage.seconds:g} s"):
            endings.append(run(stage, options.out, options.results, prefix))
        console.print(f"{title}: {endings[-1]}", highlight=False)
    console.print(f"wrote {options.results / prefix}*.json; logs are below {options.out}")
    if set(endings) != {"done"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
