"""A partial differential equation by a network: natural gradients beside Adam for the same seconds.

``python -m benchmarks.pinn`` solves the Poisson equation -Laplace u = f in five dimensions with
u = sum_i cos(pi x_i) on the boundary of the unit cube, which is then u everywhere (Dangel, Mueller
& Zeinhofer 2024, arXiv:2405.15603). The model returns residuals: of the equation at points inside,
of the boundary values on the boundary; the loss is the mean squared error of both. Every optimizer
draws new points at each step, has a learning rate that falls as a cosine to 0 over its seconds,
and is tried with each of its learning rates.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

import natgrad_flax as ng
from benchmarks.equations import derivatives, tanh_network
from benchmarks.step import environment

LOSS = ng.MeanSquaredError()
TEST_POINTS = 20_000


class Residuals(nnx.Module):
    """What a network leaves of an equation: minus its Laplacian inside, its value on the boundary.

    Args:
      dimension: of the space.
      width: of the three hidden layers.
      rngs: draws the weights.
    """

    def __init__(self, dimension: int, width: int, rngs: nnx.Rngs) -> None:
        self.network = tanh_network((dimension, width, width, width, 1), rngs)

    def __call__(self, points: dict[str, Array]) -> Array:
        """Residuals (N, 1), of which f and the boundary values, the targets, are not taken off."""
        x, inside = points["x"], points["inside"]
        laplacian = derivatives(self.network, x)[1].sum(0)
        return jnp.where(inside[:, None], -laplacian, self.network(x))


def solution(x: Array) -> Array:
    """u = sum_i cos(pi x_i), (N, 1)."""
    return jnp.cos(jnp.pi * x).sum(1, keepdims=True)


def draw(key: Array, inside: int, boundary: int, dimension: int) -> tuple[Any, Array]:
    """Points in the unit cube and on its faces, and the targets of their residuals."""
    where, face, side = jax.random.split(key, 3)
    x = jax.random.uniform(where, (inside + boundary, dimension))
    is_inside = jnp.arange(len(x)) < inside
    faces = jax.random.randint(face, (len(x),), 0, dimension)
    on = jax.nn.one_hot(faces, dimension, dtype=bool) & ~is_inside[:, None]
    x = jnp.where(on, jax.random.bernoulli(side, shape=(len(x), 1)).astype(x.dtype), x)
    u = solution(x)
    return {"x": x, "inside": is_inside}, jnp.where(is_inside[:, None], jnp.pi**2 * u, u)


@dataclass(frozen=True)
class Setting:
    """What is solved, and for how long.

    Attributes:
      dimension: of the space.
      width: of the hidden layers.
      inside: points inside the cube a step.
      boundary: points on its faces.
      boundary_weight: of a point on a face, that of one inside being 1.
      seconds: for each run, after compiling.
    """

    dimension: int = 5
    width: int = 64
    inside: int = 448
    boundary: int = 64
    boundary_weight: float = 50.0
    seconds: float = 60.0


@dataclass(frozen=True)
class Run:
    """What came of one optimizer at one learning rate."""

    method: str
    rate: float
    steps: int
    error: float


def natural(structure: ng.Structure, damping: float, momentum: Any = 0.0) -> Callable[..., Any]:
    """A transformation by its learning rate."""
    return partial(
        ng.natural_gradient_descent,
        structure=structure,
        loss=LOSS,
        damping=damping,
        momentum=momentum,
    )


METHODS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "Exact": (natural(ng.Exact(), 1e-3), (0.6, 1.0)),
    "SPRING": (natural(ng.Exact(), 1e-4, ng.SPRING(0.5)), (0.3,)),
    "K-FAC": (natural(ng.KFAC(), 1.0), (0.03, 0.1)),
    "Adam": (optax.adam, (3e-3, 1e-2, 3e-2)),
}
"""Transformations by their learning rate, and the rates that are tried."""


def relative_error(model: Residuals, key: Array, dimension: int) -> Array:
    """|network - u| / |u| over fresh points of the cube."""
    x = jax.random.uniform(key, (TEST_POINTS, dimension))
    u = solution(x)
    return jnp.linalg.norm(model.network(x) - u) / jnp.linalg.norm(u)


def train(method: str, rate: float, setting: Setting, seed: int = 0) -> Run:
    """One run, the clock of which starts when its program is compiled."""
    make, _ = METHODS[method]
    model = Residuals(setting.dimension, setting.width, nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    weights = jnp.ones(setting.inside + setting.boundary)
    weights = weights.at[setting.inside :].set(setting.boundary_weight)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, key: Array, rate: Array) -> tuple[Any, Any]:
        x, y = draw(key, setting.inside, setting.boundary, setting.dimension)
        tx = optax.with_extra_args_support(make(rate))
        module = nnx.merge(graphdef, params)
        grads = jax.grad(lambda p: LOSS(nnx.merge(graphdef, p)(x), y, weights))(params)
        batch = {"module": module, "x": x, "y": y, "weights": weights}
        updates, state = tx.update(grads, state, params, **batch)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(seed), 3)
    state = jax.jit(lambda params: make(0.1).init(params))(params)
    compiled = step.lower(params, state, keys[0], jnp.asarray(rate)).compile()
    steps, start, share = 0, time.perf_counter(), 0.0
    while share < 1:
        now = jnp.asarray(rate * (1 + math.cos(math.pi * share)) / 2)
        params, state = compiled(params, state, jax.random.fold_in(keys[1], steps), now)
        jax.block_until_ready(params)
        steps, share = steps + 1, (time.perf_counter() - start) / setting.seconds
    error = relative_error(nnx.merge(graphdef, params), keys[2], setting.dimension)
    return Run(method, rate, steps, float(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Solves the equation by every method and prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.pinn")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=Setting.seconds, help="for each run")
    parser.add_argument("--width", type=int, default=Setting.width, help="of the hidden layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float64", action="store_true", help="instead of float32")
    parser.add_argument("--out", type=Path, help="a JSON file with every run")
    options = parser.parse_args(argv)
    setting = Setting(seconds=options.seconds, width=options.width)
    console = Console()
    table = Table("optimizer", "learning rate", "steps", "relative L2 error")
    runs = []
    with jax.enable_x64(options.float64):
        for method in options.method:
            for rate in METHODS[method][1]:
                run = train(method, rate, setting, options.seed)
                runs.append(run)
                table.add_row(method, f"{rate:g}", str(run.steps), f"{run.error:.2e}")
                console.print(f"{method}, learning rate {rate:g}: {run.error:.2e}")
    console.print(table)
    if options.out is not None:
        found = {"setting": asdict(setting), "runs": [asdict(run) for run in runs]}
        options.out.write_text(json.dumps(found | {"environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
