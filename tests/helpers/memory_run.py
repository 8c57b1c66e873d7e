"""One process of ``test_memory_estimates.py``: what was estimated of a case, and what it took."""

from __future__ import annotations

import json
import os
import resource
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.optimizer import preflight
from natgrad_flax.structures.memory import step_bytes
from ntk_analysis import analytic

MSE = ng.MeanSquaredError()


class Embedded(nnx.Module):
    """A matrix of its own, which has no formula, and a readout."""

    def __init__(self, inputs, units, outputs):
        self.matrix = nnx.Param(jax.random.normal(jax.random.key(0), (inputs, units)))
        self.readout = nnx.Linear(units, outputs, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.readout(jnp.tanh(x @ self.matrix[...]))


def step(structure, model, shape, outputs):
    """One step of a structure."""
    x = jax.random.normal(jax.random.key(1), shape)
    y = jnp.zeros((shape[0], outputs))
    update = ng.natural_gradient(model, x, y, structure=structure, loss=MSE, damping=0.01)
    jax.block_until_ready(jax.tree.leaves(update))


def dense(structure, samples, widths=(256, 256)):
    step(structure, ng.MLP((16, *widths, 8), rngs=nnx.Rngs(0)), (samples, 16), 8)


def explicit(samples):
    step(ng.KFAC(), Embedded(64, 256, 8), (samples, 64), 8)


def images(samples):
    model = ng.ConvNet((16, 16, 3), (16, 16), 4, strides=(1, 2), rngs=nnx.Rngs(0))
    step(ng.KFAC(), model, (samples, 16, 16, 3), 4)


def theory(call, samples):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(samples, 16)), rng.normal(size=(samples, 1))
    call(ng.MLP((16, 64, 64, 1), rngs=nnx.Rngs(0)), x, y)


CASES = {
    "exact": (partial(dense, ng.Exact()), 700),
    "block-diagonal": (partial(dense, ng.BlockDiagonal()), 700),
    "block tri-diagonal": (partial(dense, ng.BlockTriDiagonal()), 500),
    "wide": (partial(dense, ng.Exact(), widths=(4096, 4096)), 500),
    "explicit block": (explicit, 1000),
    "images": (images, 2000),
    "analytic kernels": (partial(theory, lambda m, x, y: na.analytic_kernels(m, x)), 3000),
    "coefficient": (partial(theory, lambda m, x, y: na.coefficient_matrix(ng.Exact(), m, x)), 4000),
    "analytic coefficient": (
        partial(
            theory,
            lambda m, x, y: na.coefficient_matrix(ng.KFAC(), m, x, kernels="analytic"),
        ),
        3000,
    ),
    "isotropy": (partial(theory, lambda m, x, y: na.isotropy(ng.BlockDiagonal(), m, x)), 3000),
    "prediction": (
        partial(theory, lambda m, x, y: na.predict(ng.BlockTriDiagonal(), m, x, y, x[:50])),
        4000,
    ),
}


def main() -> None:
    call, size = CASES[sys.argv[1]]
    call(size // 10)  # libraries and small programs
    asked: list[float] = []

    def look(needed, what, advice):
        asked.append(needed)

    def shapes(structure, signals):
        asked.append(step_bytes(structure, signals))

    def stored(folder, names, shape, *rest, whole=analytic.open_store):
        asked.append(8 * len(names) * shape[0] * shape[1])
        return whole(folder, names, shape, *rest)

    for module in list(sys.modules.values()):
        if "check_bytes" in vars(module):
            module.check_bytes = look
    preflight.check_signals_fit, preflight.check_fits = shapes, lambda *arguments: None
    analytic.open_store = stored
    used = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    call(size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used
    print(json.dumps({"estimate": sum(asked), "peak": peak}))


if __name__ == "__main__":
    main()
