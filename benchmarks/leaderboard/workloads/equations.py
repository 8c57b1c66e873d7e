"""Partial differential equations by the residuals of a network, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
from flax import nnx
from numpy.typing import NDArray

import natgrad_flax as ng
from benchmarks.equations import BOUNDARY, INSIDE, VALUE, Residuals
from benchmarks.leaderboard.workload import Data, Workload

Doubles = NDArray[np.float64]


def sines(x: Doubles) -> Doubles:
    """u = prod_i sin(pi x_i)."""
    return np.prod(np.sin(np.pi * x), axis=1)


def cosines(x: Doubles) -> Doubles:
    """u = sum_i cos(pi x_i)."""
    return np.sum(np.cos(np.pi * x), axis=1)


def decaying(x: Doubles) -> Doubles:
    """u(x, t) = exp(-pi^2 t / 4) sin(pi x), points being (x, t)."""
    return np.exp(-(np.pi**2) * x[:, 1] / 4) * np.sin(np.pi * x[:, 0])


def nothing(x: Doubles) -> Doubles:
    """0."""
    return np.zeros(len(x))


# solution and right-hand side of each equation
EQUATIONS: Mapping[str, tuple[Callable[[Doubles], Doubles], Callable[[Doubles], Doubles]]] = {
    "poisson-2d": (sines, lambda x: 2 * np.pi**2 * sines(x)),
    "poisson-5d": (cosines, lambda x: np.pi**2 * cosines(x)),
    "heat": (decaying, nothing),
}


def on_faces(rng: np.random.Generator, count: int, settings: Mapping[str, Any]) -> Doubles:
    """Points on the faces of the unit cube; without that at the end of time, if there is time."""
    dimension = settings["widths"][0]
    x = rng.random((count, dimension))
    faces = [(axis, side) for axis in range(dimension) for side in (0.0, 1.0)]
    if settings["first"][-1]:
        faces.remove((dimension - 1, 1.0))
    for row, face in enumerate(rng.integers(len(faces), size=count)):
        axis, side = faces[face]
        x[row, axis] = side
    return x


@lru_cache(maxsize=4)
def _drawn(name: str, frozen: tuple[tuple[str, Any], ...]) -> Data:
    settings = dict(frozen)
    solution, right = EQUATIONS[name]
    rng = np.random.default_rng(settings["data_seed"])
    dimension = settings["widths"][0]
    inside = rng.random((settings["num_inside"], dimension))
    boundary = on_faces(rng, settings["num_train"] - len(inside), settings)
    held_out = rng.random((settings["num_held_out"], dimension))
    order = rng.permutation(settings["num_train"])

    def rows(x: Doubles, kind: int) -> Doubles:
        return np.column_stack([x, np.full(len(x), float(kind))])

    x = np.concatenate([rows(inside, INSIDE), rows(boundary, BOUNDARY)])
    factor = math.sqrt(settings["boundary_weight"])
    y = np.concatenate([right(inside), factor * solution(boundary)])[:, None]
    asked = rows(held_out, VALUE)
    return Data(x[order], y[order], asked, solution(held_out)[:, None])


def data(name: str, settings: Mapping[str, Any]) -> Data:
    """Rows of an equation: points inside and on the boundary, and fresh ones to judge by.

    Args:
      name: key of ``EQUATIONS``.
      settings: of the workload; lists are taken as tuples.
    """
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return _drawn(name, tuple(frozen.items()))


def model(settings: Mapping[str, Any], seed: int) -> nnx.Module:
    """The residuals of a network at its initial parameters."""
    names = ("first", "second", "boundary_weight")
    return Residuals(
        settings["widths"], **{name: settings[name] for name in names}, rngs=nnx.Rngs(seed)
    )


def _workload(name: str, settings: dict[str, Any], **further: Any) -> Workload:
    common = {
        "dtype": "float64",
        "parametrisation": "standard",
        "data_seed": 0,
        "boundary_weight": 50.0,
        "num_held_out": 4000,
        "num_validation": 2000,
    }
    settings = {**common, **settings}
    return Workload(
        name=name,
        settings=settings,
        data=partial(data, name, settings),
        model=partial(model, settings),
        loss=ng.MeanSquaredError(),
        metric="relative",
        curvature_wins=True,
        **further,
    )


# of Adam 0.6 ms each on the machine of the board: who needs them all trains for 20 s, beside which
# compilation does not count
STEPS = 35_000

WORKLOADS = (
    _workload(
        "poisson-2d",
        {
            "widths": [2, 32, 32, 1],
            "first": [0.0, 0.0],
            "second": [1.0, 1.0],
            "num_train": 500,
            "num_inside": 400,
        },
        title="Poisson equation in 2 dimensions, 2-32-32-1 tanh, 400 points inside and 100 on the "
        "boundary, residuals, full batch, float64",
        version=3,
        question="Does curvature solve an equation to the digits that float64 has?",
        batch_size=None,
        max_steps=STEPS,
        max_seconds=60.0,
        expectation="Curvature should win by far: the residual is fitted without noise, and the "
        "Laplacian makes it so ill-conditioned that first-order methods take tens of "
        "thousands of steps.",
    ),
    _workload(
        "heat",
        {
            "widths": [2, 32, 32, 1],
            "first": [0.0, 1.0],
            "second": [0.25, 0.0],
            "num_train": 500,
            "num_inside": 350,
        },
        title="Heat equation in space and time, 2-32-32-1 tanh, 350 points inside and 150 on the "
        "boundary, residuals, full batch, float64",
        version=3,
        question="Does it also where the solution runs forward in time?",
        batch_size=None,
        max_steps=STEPS,
        max_seconds=60.0,
        expectation="Curvature should win by far, for the reasons of the Poisson equation: no "
        "noise, and an operator that ruins the condition, which many cheap steps do not make up.",
    ),
    _workload(
        "poisson-5d",
        {
            "widths": [5, 64, 64, 64, 1],
            "first": [0.0] * 5,
            "second": [1.0] * 5,
            "num_train": 8192,
            "num_inside": 7168,
        },
        title="Poisson equation in 5 dimensions, 5-64-64-64-1 tanh, 7168 points inside and 1024 on "
        "the boundary, residuals, batches of 512, float64",
        version=1,
        question="Does curvature of a batch of points help where a batch does not fill the space?",
        batch_size=512,
        max_steps=1000,
        max_seconds=90.0,
        expectation="Curvature should win: batches of points are little noise beside the condition "
        "of the Laplacian, if momentum carries over what a batch does not see.",
    ),
)
