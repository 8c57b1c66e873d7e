"""Planted regressions that the suites must catch: wrong answers raise, asv names slow code.

Nothing here looks at times: what asv compares is XLA's count of flops.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import natgrad_flax as ng
from benchmarks import accuracy, dynamics, isotropy, problems, step
from ntk_analysis import methods

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class PlainGradient(ng.Exact):
    """Solves nothing."""

    def solve(self, signals, residual, damping):
        return residual.vector(signals.layers)


@dataclass(frozen=True)
class HalfStep(ng.Exact):
    """The right direction, and half of its length."""

    def solve(self, signals, residual, damping):
        return tuple(
            {key: part / 2 for key, part in layer.items()}
            for layer in super().solve(signals, residual, damping)
        )


@dataclass(frozen=True)
class WrongTheory(ng.Exact):
    """A coefficient matrix that is not the one of its solve."""

    def coefficient(self, test, train, damping):
        return 1.01 * super().coefficient(test, train, damping)


@pytest.mark.parametrize("wrong", [PlainGradient(), HalfStep()])
def test_a_wrong_direction_fails_what_trains(wrong, monkeypatch):
    monkeypatch.setitem(methods.STRUCTURES, "exact", wrong)
    with pytest.raises(ArithmeticError, match="first step is not the one"):
        dynamics.Dynamics().measure("exact", 24)
    small = accuracy.natgrad_datasets.load("digits", num_train=16, num_test=4)
    with pytest.raises(ArithmeticError, match="first step is not the one"):
        accuracy.measure_accuracy(small, "exact", 24)


@pytest.mark.parametrize("wrong", [PlainGradient(), HalfStep()])
def test_a_wrong_direction_fails_what_is_timed(wrong, monkeypatch):
    entry = replace(problems.STRUCTURES["exact"], structure=wrong)
    case = problems.Case(16, 3, 8, 1, "mse")
    with pytest.raises(ArithmeticError, match=f"{wrong.name} is wrong"):
        step.measure(case.line(), entry, 1)


def test_a_wrong_theory_fails_isotropy_and_dynamics(monkeypatch):
    wrong = WrongTheory()
    monkeypatch.setitem(methods.STRUCTURES, "exact", wrong)
    with pytest.raises(ArithmeticError, match="must be isotropic with alpha 1"):
        isotropy.Isotropy().measure("exact", 64)
    with pytest.raises(ArithmeticError, match="solve and coefficient contradict"):
        dynamics.Dynamics().measure("exact", 24)


SLOW = '''
from natgrad_flax.signals.gradient import Residual

_solve = Exact.solve


def _slowly(self, signals, residual, damping):
    """The same answer, four times over; scaled, since XLA drops what is repeated as it is."""
    found = []
    for scale in (1.0, 2.0, 3.0, 5.0):
        scaled = Residual(scale * residual.coefficients, None)
        found.append([
            {key: part / (4 * scale) for key, part in layer.items()}
            for layer in _solve(self, signals, scaled, damping)
        ])
    return tuple(
        {key: sum(other[key] for other in layer) for key in layer[0]}
        for layer in zip(*found, strict=True)
    )


Exact.solve = _slowly
'''


@pytest.mark.skipif(shutil.which("git") is None, reason="asv keeps results by commit")
def test_asv_names_a_structure_that_does_its_work_four_times(tmp_path):
    pytest.importorskip("asv")
    asv = _Asv(tmp_path)
    before, after = asv.commit("as it is"), asv.commit("slow")
    asv.run(before)
    slow = tmp_path / "slow"
    shutil.copytree(PROJECT / "natgrad_flax", slow / "natgrad_flax")
    with (slow / "natgrad_flax" / "structures" / "exact.py").open("a") as file:
        file.write(SLOW)
    asv.run(after, ASV_PYTHONPATH=str(slow))

    table = asv("compare", "--machine", "toy", "--factor", "1.05", before, after)
    rows = [row for row in table.splitlines() if "track_flops(" in row and "n/a" not in row]
    exact = [row for row in rows if "('exact'," in row]
    diagonal = [row for row in rows if "('diagonal'," in row]
    assert exact, table
    assert diagonal, table
    assert all(row.startswith("| + ") for row in exact), table
    assert not any(row.startswith("| + ") for row in diagonal), table


class _Asv:
    """asv on a copy of the suites, with a history, a machine and results of its own."""

    def __init__(self, folder):
        self._folder = folder
        self._environment = os.environ | {"HOME": str(folder), "NATGRAD_BENCH_PROFILE": "smoke"}
        self._environment.pop("NATGRAD_BENCH_MACHINE", None)
        # asv calls uv by name
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        self._environment["PATH"] = os.pathsep.join(path)
        shutil.copytree(
            PROJECT / "benchmarks",
            folder / "benchmarks",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        settings = json.loads(
            "\n".join(
                line
                for line in (PROJECT / "asv.conf.json").read_text().splitlines()
                if not line.lstrip().startswith("//")
            )
        )
        (folder / "asv.conf.json").write_text(json.dumps(settings))
        self._git("init", "-q", "-b", "main")
        self("machine", "--yes", "--machine", "toy")

    def __call__(self, *arguments, **environment):
        return self._output([sys.executable, "-m", "asv", *arguments], environment)

    def commit(self, message):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        self._git(*who, "commit", "-q", "--allow-empty", "-m", message)
        return self._git("rev-parse", "HEAD").strip()

    def run(self, commit, **environment):
        regex = r"^step\.Step\.track_flops\('(exact|diagonal)', .*'exact'\)"
        self(
            *("run", "--python=same", "--machine", "toy", "--quick", "--show-stderr"),
            *("--set-commit-hash", commit, "--bench", regex),
            **environment,
        )

    def _git(self, *arguments):
        return self._output(["git", *arguments], {})

    def _output(self, command, environment):
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
