"""What the commands and tables make of a structure that was added to the list; run by a test.

Arguments: a folder for results, and the JSON file to write. Started with a copy of natgrad_flax
that has one more file and one more line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import warnings
from pathlib import Path

# before the first use of JAX; behind the flags of the tests
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from natgrad_flax.structures.scalar import Scalar
from typer.testing import CliRunner

import natgrad_flax as ng
from benchmarks import problems, step
from benchmarks.peer_comparison import ours
from natgrad_flax import devices
from natgrad_flax.optimizer.checks import check_structure
from ntk_analysis.cli import app
from ntk_analysis.methods import STRUCTURES, find_structure, select_methods
from ntk_analysis.palette import STYLES

DATA = ("--dataset", "digits", "--num-train", "8", "--num-test", "8")
TINY = problems.Line("tiny", (4, 6, 2), 4, ng.MeanSquaredError(), "exact", False)


def command(*arguments: object) -> str:
    with warnings.catch_warnings():
        # a dependency of Matplotlib's font search, not ours
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib.*")
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def on_two_devices() -> float:
    """How far the step of two devices is from that of one."""
    model = ng.MLP((3, 5, 2), bias_variance=0.1, rngs=nnx.Rngs(0))
    x, y = jax.random.normal(jax.random.key(1), (4, 3)), jnp.ones((4, 2))
    options = {"structure": Scalar(), "loss": ng.MeanSquaredError(), "damping": 0.1}
    one = ng.natural_gradient(model, x, y, **options)
    mesh = jax.make_mesh((2,), ("data",))
    many = devices.sharded_natural_gradient(model, x, y, mesh=mesh, **options)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)


def refusal() -> str:
    """What is said to something that is no structure."""
    try:
        check_structure(0)
    except TypeError as error:
        return str(error)
    return ""


def usage() -> str:
    """What the step benchmark says to a structure without a target."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        step.main(["--structure", "scal."])
    return said.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("found", type=Path)
    options = parser.parse_args()
    chosen = ("--structures", "scalar", "--out")
    sizes = ("--values", "8", "--seeds", "0", "--num-samples", "4", "--num-inputs", "6")
    measured = step.measure(TINY, problems.STRUCTURES["scal."], 5)
    found = {
        "names": [list(STRUCTURES), list(problems.STRUCTURES), list(ours.STRUCTURES)],
        "lookup": [find_structure(name) for name in ("Scalar", "one_number", "scalar-metric")],
        "style": STYLES["Scalar"],
        "method": dataclasses.asdict(select_methods(("scalar",), 1.0, None)[0]),
        "help": {name: command(name, "--help") for name in ("isotropy", "dynamics", "predict")},
        "isotropy": command("isotropy", *sizes, *chosen, options.folder / "isotropy"),
        "dynamics": command(
            "dynamics", *DATA, "--widths", "8", "--steps", "2", *chosen, options.folder / "dynamics"
        ),
        "predict": command(
            "predict", *DATA, "--widths", "8", "--kernels", "empirical",
            *chosen, options.folder / "predict",
        ),
        "devices": on_two_devices(),
        "refusal": refusal(),
        "ratio": measured.ratio,
        "usage": usage(),
    }  # fmt: skip
    options.found.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
