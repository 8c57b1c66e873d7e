"""natgrad without its extras: the library works, the rest says in one sentence what to install."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import natgrad_flax as ng
from natgrad_flax.arguments.extras import MissingExtraError, require_extra

EXTRAS = (
    "diffrax", "jinja2", "matplotlib", "neural_tangents", "pandas", "pooch", "seaborn", "sklearn",
    "threadpoolctl", "typer",
)  # fmt: skip
"""Modules that no installation without extras has."""


def run_without(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_the_library_needs_no_extra() -> None:
    done = run_without(
        "import jax.numpy as jnp, natgrad_flax as ng\n"
        "from flax import nnx\n"
        "model = ng.MLP((3, 4, 1), rngs=nnx.Rngs(0))\n"
        "x, y = jnp.ones((2, 3)), jnp.ones((2, 1))\n"
        "settings = {'structure': ng.KFAC(), 'loss': ng.MeanSquaredError(), 'damping': 0.1}\n"
        "print(len(ng.natural_gradient(model, x, y, **settings)))\n"
        "import natgrad_flax.checkpoint, natgrad_flax.devices, natgrad_flax.linear\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("module", "extra"), [("ntk_analysis", "theory"), ("natgrad_datasets", "datasets")]
)
def test_what_needs_an_extra_names_it(module: str, extra: str) -> None:
    done = run_without(f"import {module}")
    assert done.returncode == 1
    assert f"pip install 'natgrad[{extra}]'" in done.stderr.splitlines()[-1]


def test_the_command_says_what_to_install() -> None:
    code = "import natgrad_flax.command as c, sys; sys.exit(c.main())"
    done = run_without(code, "report")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: ntk_analysis needs diffrax, pooch, sklearn, which come with an extra: "
        "pip install 'natgrad[theory]'\n"
    )
    done = run_without(code, "--version")
    assert (done.returncode, done.stdout) == (0, f"natgrad {version('natgrad')}\n")


def test_one_missing_package() -> None:
    require_extra("report", "the page", "jax", "numpy")
    with pytest.raises(MissingExtraError, match=r"^the page needs no_such, which comes with an ex"):
        require_extra("report", "the page", "numpy", "no_such")


def test_the_version_stands_in_one_place() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    assert ng.__version__ == stated == version("natgrad")


def test_what_stands_beside_the_sources_says_the_same() -> None:
    """CITATION.cff has the version, and workflows call what make has."""
    root = Path(__file__).parents[2]
    assert f"\nversion: {ng.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z0-9-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    files = sorted((root / ".github" / "workflows").glob("*.yml"))
    called = [
        re.findall(r"\bmake ([a-z0-9-]+)", file.read_text(encoding="utf-8")) for file in files
    ]
    assert len(files) == len(list(filter(None, called)))
    assert {target for targets in called for target in targets} <= known
