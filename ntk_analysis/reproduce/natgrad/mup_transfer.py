"""Whether the rate and the damping of a narrow network are those of a wide one."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import optax
from flax import nnx
from jax import Array

from natgrad_flax import (
    KFAC,
    MLP,
    Foof,
    MeanSquaredError,
    fisher_signals,
    natural_gradient,
    scale_by_width,
    shampoo,
)
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    between,
    check,
)

_LOSS = MeanSquaredError()
_SAMPLES, _STEPS, _SEEDS, _RATIO = 64, 10, (0, 1), 0.1
_WIDTHS = (64, 256, 1024, 4096)
_OTHER_WIDTHS = {"Shampoo": (64, 128, 256, 512)}
"""Of an optimizer of which a step at the width 4096 takes minutes."""
_RATES = {
    "SGD": np.arange(-11.0, 0.0),
    "K-FAC": np.arange(-9.0, -4.0),
    "FOOF": np.arange(-3.0, 2.0),
    "Shampoo": np.arange(-5.0, 1.0),
}
"""Logarithms of the rates that are tried, to the base 2."""
_DAMPINGS = np.arange(-8.0, 1.0, 2.0)
"""Likewise; of K-FAC at its best rate, relative. As many as rates: so they share a program."""
_DAMPING_RATE, _DIVERGED = 2.0**-7, 1e3


@partial(jax.jit, static_argnames=("graphdef", "name"))
def _trained(
    graphdef: Any,
    start: nnx.State,
    x: Array,
    y: Array,
    settings: tuple[Array, Array],
    name: str,
) -> Array:
    """The training loss after some steps of the whole batch, one for each setting.

    Args:
      graphdef: of the network.
      start: its parameters.
      x: inputs.
      y: targets.
      settings: rates, and dampings relative to the mean diagonals of the factors, both (S,).
      name: of the optimizer.
    """
    model = nnx.merge(graphdef, start)
    in_mup = model.layers[-1].init_power == 1
    inner = shampoo(1.0) if name == "Shampoo" else optax.scale(-1.0)
    scaled = scale_by_width(model, name, base_width=64) if in_mup else optax.identity()
    optimizer = optax.chain(inner, scaled)

    def gradient(params: nnx.State, damping: Array, key: Array) -> nnx.State:
        if name in ("SGD", "Shampoo"):
            return jax.grad(lambda p: _LOSS(nnx.merge(graphdef, p)(x), y))(params)
        structure = KFAC(split="pi") if name == "K-FAC" else Foof("inputs")
        drawn: dict[str, Any] = {"fisher": "mc", "key": key, "loss": _LOSS}
        module = nnx.merge(graphdef, params)
        # ng.RelativeDamping takes numbers alone, of which each would be a program
        scale = structure.damping_scale(fisher_signals(module, x, y, **drawn)[0])
        options = drawn | {"damping": damping * scale, "check_samples": False}
        return natural_gradient(module, x, y, structure=structure, **options)

    def run(setting: tuple[Array, Array]) -> Array:
        rate, damping = setting

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            params, memory = carry
            update, memory = optimizer.update(gradient(params, damping, key), memory, params)
            return (jax.tree.map(lambda p, u: p + rate * u, params, update), memory), None

        keys = jax.random.split(jax.random.key(0), _STEPS)
        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), keys)
        return _LOSS(nnx.merge(graphdef, params)(x), y)

    return jax.lax.map(run, settings)


def _sweep(kind: str, name: str, rates: Matrix, dampings: Matrix) -> list[list[float | None]]:
    """Geometric means of the losses of all seeds, a list a width; None where one diverges."""
    digits = natgrad_datasets.load("digits", num_train=_SAMPLES, num_test=1)
    x = jnp.float32(np.sqrt(digits.input_dim) * digits.x_train)
    settings = (jnp.float32(rates), jnp.float32(dampings))
    found = []
    for width in _widths(name):
        losses = []
        for seed in _SEEDS:
            graphdef, start = nnx.split(
                MLP(
                    (digits.input_dim, width, width, 10),
                    activation="tanh",
                    weight_variance=1.0,
                    parametrization=kind,
                    rngs=nnx.Rngs(seed),
                )
            )
            y = jnp.float32(digits.y_train)
            losses.append(_trained(graphdef, start, x, y, settings, name))
        means = np.exp(np.mean(np.log(np.asarray(losses, np.float64)), axis=0))
        found.append([float(one) if one < _DIVERGED else None for one in means])
    return found


def _widths(name: str) -> tuple[int, ...]:
    return _OTHER_WIDTHS.get(name, _WIDTHS)


def best_of(losses: list[float | None]) -> int:
    """Where the smallest of them stands."""
    return int(np.nanargmin(np.array(losses, float)))


def steps_of_best(losses: list[list[float | None]]) -> float:
    """Steps of the grid from the best of the narrowest width to that of the widest."""
    return float(best_of(losses[-1]) - best_of(losses[0]))


@check(
    "NG-MuP-Transfer",
    "The rate of a narrow network is that of a wide one in muP; K-FAC's anywhere",
    claim="In the maximal-update parametrisation the best rate does not depend on the width "
    "(Ishikawa & Karakida 2024 for K-FAC and Shampoo), nor does the best relative damping of "
    "K-FAC. In the standard parametrisation that of SGD falls, as 1/M for very wide layers (6 "
    "steps of 2 here), and the rate of a narrow network makes a wide one diverge. The best rates "
    "of K-FAC and FOOF stay there, too: alpha of a (nearly) isotropic Fisher does not know the "
    "width. What muP changes for them is that features move (na.coordinate_check), and a lower "
    "loss at the best rate.",
    setting=f"{_SAMPLES} digits of 8 x 8 pixels and norm 8, ten classes, one-hot targets, mean "
    "squared error; two hidden layers of tanh units, no biases, widths "
    f"{', '.join(map(str, _WIDTHS))} (Shampoo to {_OTHER_WIDTHS['Shampoo'][-1]}, as its "
    f"eigenvectors at {_WIDTHS[-1]} take minutes a step), geometric mean of {len(_SEEDS)} seeds, "
    f"loss after {_STEPS} steps of the whole batch; rates in steps of 2, dampings of 4; relative "
    f"damping {_RATIO} for K-FAC and FOOF, sampled targets; Shampoo on batch gradients, power "
    "-1/4, renewed at every step; float32",
    origin="ours",
)
def transfer(report: Report) -> Outcome:
    """Steps of the grid by which the best setting moves."""
    panels: dict[str, dict[str, Any]] = {}
    dampings: dict[str, Any] = {}
    measurements: list[Measurement] = []
    for kind in ("standard", "mup"):
        panels[kind] = {}
        for name, logs in _RATES.items():
            report(f"{kind}, {name}")
            losses = _sweep(kind, name, 2.0**logs, np.full(len(logs), _RATIO))
            panels[kind][name] = _panel(name, "rate", logs, losses)
            steps = steps_of_best(losses)
            where = f"{kind}, {name}: steps of 2 of the best rate"
            if kind == "mup" or name in ("K-FAC", "FOOF"):
                measurements.append(between(where, steps, -1, 1))
            elif name == "SGD":
                at = losses[-1][best_of(losses[0])]
                over = math.inf if at is None else at / np.nanmin(np.array(losses[-1], float))
                measurements += [
                    between(where, steps, -7, -3),
                    above(f"{kind}, {name}: widest at the best rate of the narrowest", over, 2),
                ]
        report(f"{kind}, damping of K-FAC")
        rates = np.full(len(_DAMPINGS), _DAMPING_RATE)
        losses = _sweep(kind, "K-FAC", rates, 2.0**_DAMPINGS)
        dampings[kind] = _panel("K-FAC", "relative damping", _DAMPINGS, losses)
    steps = steps_of_best(dampings["mup"]["losses"])
    measurements.append(between("mup, K-FAC: steps of 4 of the best damping", steps, -1, 1))
    data = {"panels": panels, "dampings": dampings, "steps": _STEPS}
    return Outcome(tuple(measurements), data)


def _panel(name: str, what: str, logs: Matrix, losses: list[list[float | None]]) -> dict[str, Any]:
    return {"what": what, "grid": 2.0**logs, "widths": _widths(name), "losses": losses}
