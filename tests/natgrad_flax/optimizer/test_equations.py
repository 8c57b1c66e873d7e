"""Outputs that are derivatives of a network: residuals of differential equations."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import natgrad_flax as ng


def test_readme_solves_an_equation(capsys):
    """u = sin(pi x) to five digits, and the layers under derivatives have a formula."""
    text = (Path(__file__).parents[3] / "docs/guides/equations.md").read_text()
    block = re.search(r"<!-- equation -->\n```python\n(.*?)```", text, re.DOTALL)
    assert block, "the page has no block after <!-- equation -->"
    scope = {"jax": jax, "jnp": jnp, "ng": ng, "nnx": nnx}
    exec(block[1], scope)
    assert float(capsys.readouterr().out) < 1e-5
    layers = ng.describe(scope["model"], scope["points"]).layers
    kernels = {layer.path: layer for layer in layers if layer.parameters[0][0] == "kernel"}
    assert {layer.formula for layer in kernels.values()} == {"shared (a, D)"}
    # the value and its derivatives are positions
    assert all(layer.positions > 1 for layer in kernels.values())
