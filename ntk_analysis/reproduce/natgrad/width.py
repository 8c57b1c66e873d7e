"""What one step of natural gradient at the rate of theory leaves, against the width."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax import (
    KFAC,
    MLP,
    BlockDiagonal,
    BlockTriDiagonal,
    Exact,
    Structure,
)
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.natgrad.common import dense_net, mean_loss, natural_step, sphere
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
    close,
)

_SMOOTH = ("tanh", "softplus")
_ACTIVATIONS = (*_SMOOTH, "relu")


class Softplus(MLP):
    """An MLP with log(1 + e^u) as its activation."""

    def __call__(self, x: Array) -> Array:
        """Maps inputs of shape (N, M_0) to outputs (N, M_L)."""
        for layer in self.layers[:-1]:
            x = jax.nn.softplus(layer(x))
        return self.layers[-1](x)


def _net(activation: str, widths: tuple[int, ...], seed: int = 0) -> MLP:
    if activation == "softplus":
        return Softplus(widths, weight_variance=1.0, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
    return dense_net(widths, activation, seed, jnp.float64)


@partial(jax.jit, static_argnames=("graphdef", "structures"))
def _left(
    graphdef: Any,
    state: nnx.State,
    x: Array,
    distance: Array,
    rates: Array,
    structures: tuple[Structure, ...],
) -> Array:
    """loss_1 / loss_0 of one step of each structure towards targets f_0 + distance.

    In one program, which runs the passes through the first weights once for all structures.
    """
    target = nnx.merge(graphdef, state)(x) + distance
    first = jnp.mean(jnp.sum(distance**2, axis=1)) / 2
    moved = [
        natural_step(graphdef, state, x, target, rate, structure)
        for rate, structure in zip(rates, structures, strict=True)
    ]
    return jnp.stack([mean_loss(graphdef, state, x, target) for state in moved]) / first


def _slope(widths: tuple[int, ...], losses: Matrix) -> float:
    """p of loss ~ M^-p by least squares of the mean logarithms; losses (widths, seeds)."""
    return float(-np.polyfit(np.log(widths), np.log(losses).mean(axis=1), 1)[0])


def _interval(widths: tuple[int, ...], losses: Matrix, draws: int = 1000) -> tuple[float, float]:
    """95 % of the bootstrap over seeds, drawn anew for each width."""
    rng = np.random.default_rng(0)
    picks = rng.integers(losses.shape[1], size=(draws, *losses.shape))
    slopes = [_slope(widths, np.take_along_axis(losses, pick, axis=1)) for pick in picks]
    low, high = np.quantile(slopes, [0.025, 0.975])
    return float(low), float(high)


# ----- one hidden layer: the constants, too


class KinkLaw(NamedTuple):
    """What a kink leaves of |r|^2 after one exact step in one hidden ReLU layer.

    Attributes:
      mean: M |E[r]|^2, from flips that go one way only.
      spread: M^1.5 E|r - E[r]|^2, from their number.
    """

    mean: float
    spread: float

    def at(self, width: int, size: float = 1.0) -> float:
        """loss_1 / loss_0 for a distance of this size, 1 for that which the law was made for."""
        return size**2 * self.mean / width + size * self.spread / width**1.5


def kink_law(x: Matrix, distance: Matrix, draws: int = 20_000) -> KinkLaw:
    """The law for f = sqrt(2 / M) sum_i a_i relu(h_i), h = sqrt(2 / M_0) W x.

    The step is J^T v with v = K^-1 distance, K that of infinite width, so sample n moves the unit
    by sqrt(2 / M) 2 a (w + v_n [h_n > 0]), w = sum_(m != n) v_m [h_m > 0] x_n x_m / M_0: by another
    length where it is active. A unit at h_n = u flips where the move is larger than |u| and
    opposite to it, and relu leaves |move| - |u|. Means over u (density 1 / sqrt(4 pi) at 0), over
    a, and over the signs of the other h_m.

    Args:
      x: inputs (N, M_0) of norm sqrt(M_0).
      distance: y - f_0, shape (N, 1).
      draws: of the signs, given that h_n = 0.
    """
    model = dense_net((x.shape[1], 4, 1), "relu")
    kernel = sum(analytic_kernels(model, x).tangent)
    v = np.linalg.solve(kernel, distance[:, 0])
    cosines = x @ x.T / x.shape[1]
    density = 1 / np.sqrt(4 * np.pi)
    third, fifth = 2 * np.sqrt(2 / np.pi), 8 * np.sqrt(2 / np.pi)  # E|a|^3, E|a|^5
    signals = np.random.default_rng(0).multivariate_normal(
        np.zeros(len(x)), cosines, size=draws, method="eigh"
    )
    mean = spread = 0.0
    for n, row in enumerate(cosines):
        active = signals - np.outer(signals[:, n], row) > 0
        active[:, n] = False
        passive = active @ (v * row)
        own = passive + v[n]
        one_way = np.mean(own * np.abs(own) - passive * np.abs(passive))
        mean += (2**3.5 * density * third / 4 * one_way) ** 2
        spread += 2**5.5 * density * fifth / 6 * np.mean(np.abs(own) ** 3 + np.abs(passive) ** 3)
    total = float(np.sum(distance**2))
    return KinkLaw(float(mean) / total, float(spread) / total)


def _exact_left(
    graphdef: Any, state: nnx.State, x: Array, distance: Array, rate: float = 1.0
) -> float:
    """``_left`` of the exact Fisher."""
    return float(_left(graphdef, state, x, distance, jnp.array([rate]), (Exact(),))[0])


_SAMPLES, _FEATURES = 10, 32
_WIDTHS, _SEEDS = (256, 1024, 4096), range(16)
_SMALL = 0.25


@check(
    "NG-Width-Kink",
    "What one step leaves falls as M^-2 if smooth, as M^-1 with a kink",
    claim="One step at 1/alpha of an isotropic Fisher reaches the targets to first order, at any "
    "width. Left is what the Taylor series has beyond. Smooth: (1/2) v_a v_b J_a^T H_n J_b is odd "
    "in the weights of the last layer and so of mean 0 and of order 1/M, as is the third order, "
    "whose mean is not 0 (Dyer & Gur-Ari 2020); loss_1/loss_0 ~ M^-2. With a kink, sqrt(M) of M "
    "units flip, each by a move of order 1/sqrt(M). Sample n moves a unit more where it is active "
    "there: active units flip when they go down, passive ones when they go up, the two do not "
    "cancel, and M units leave a mean of order M^-1/2 and a spread of order M^-3/4. So "
    "loss_1/loss_0 = c e^2/M + d e/M^1.5 for targets at a distance e from f_0, with c and d in "
    "closed form but for a mean over signs.",
    setting=f"one hidden layer of {', '.join(map(str, _WIDTHS))} units, exact Fisher, N = "
    f"{_SAMPLES} Gaussian inputs of {_FEATURES} features and norm sqrt(M_0), targets f_0 + e z, "
    f"z ~ N(0, 1), e = 1 and {_SMALL}, {len(_SEEDS)} seeds, float64; tanh and softplus with "
    "sigma_w^2 = 1, ReLU with 2, no biases; zero damping",
    origin="ours",
    fast=True,
)
@in_float64
def kink(report: Report) -> Outcome:
    """Exponents, the dependence on the distance, the constants of ReLU, and half a step."""
    inputs = sphere(_SAMPLES, _FEATURES)
    distance = np.random.default_rng(5).normal(size=(_SAMPLES, 1))
    law = kink_law(inputs, distance)
    x, z = jnp.asarray(inputs), jnp.asarray(distance)
    expected = np.array([law.at(width) for width in _WIDTHS])
    found: dict[str, Matrix] = {}
    small = {}
    for activation in _ACTIVATIONS:
        report(activation)
        models = [
            [nnx.split(_net(activation, (_FEATURES, width, 1), seed)) for seed in _SEEDS]
            for width in _WIDTHS
        ]
        found[activation] = np.array([[_exact_left(*one, x, z) for one in row] for row in models])
        small[activation] = np.array([_exact_left(*one, x, _SMALL * z) for one in models[-1]])
    half = [_exact_left(*row[0], x, z, 0.5) for row in models]
    slopes = {name: _slope(_WIDTHS, losses) for name, losses in found.items()}
    means = found["relu"].mean(axis=1)
    gain = {name: float(np.mean(found[name][-1]) / np.mean(small[name])) for name in small}
    measurements: list[Measurement] = [
        *(close(f"{name}: p of M^-p", slopes[name], 2, 0.3) for name in _SMOOTH),
        close(
            "relu: p less that of the law at these widths",
            slopes["relu"] - float(-np.polyfit(np.log(_WIDTHS), np.log(expected), 1)[0]),
            0,
            0.2,
        ),
        *(
            between(f"{name}: loss at e = 1 over that at {_SMALL}", gain[name], 12, 24)
            for name in _SMOOTH
        ),
        between(
            "relu: the same, over that of the law",
            gain["relu"] * law.at(_WIDTHS[-1], _SMALL) / expected[-1],
            0.6,
            1.6,
        ),
        *(
            between(f"relu, M = {width}: mean loss over that of the law", mean / theory, 0.7, 1.4)
            for width, mean, theory in zip(_WIDTHS, means, expected, strict=True)
        ),
        below(
            "half the step, relu: |p|",
            abs(float(np.polyfit(np.log(_WIDTHS), np.log(half), 1)[0])),
            0.05,
        ),
        above("half the step, relu: loss_1/loss_0, smallest", min(half), 0.2),
    ]
    data: dict[str, Any] = {
        "widths": _WIDTHS,
        "losses": {name: losses.mean(axis=1) for name, losses in found.items()},
        "law": {"mean": law.mean, "spread": law.spread},
    }
    return Outcome(tuple(measurements), data)


# ----- two hidden layers, every isotropic structure

_DEEP_SAMPLES, _DEEP_FEATURES = 20, 64
_DEEP_WIDTHS, _DEEP_SEEDS = (256, 512, 1024, 2048, 4096, 8192), range(20)
_STRUCTURES: tuple[Structure, ...] = (Exact(), BlockDiagonal(), BlockTriDiagonal(), KFAC())
_EXPONENTS = {"tanh": (2, 2), "softplus": (2, 2), "relu": (1, 1.5)}
"""From least to largest what p may be in theory."""


@check(
    "NG-Width-Law",
    "The finite-width law of every isotropic structure: kinks cost a power of the width",
    claim="The orders of NG-Width-Kink do not depend on the depth nor on which isotropic Fisher it "
    "is, since each gives every pre-activation a move of order 1/sqrt(M): with one step at 1/alpha "
    "loss_1/loss_0 falls as M^-2 for tanh and softplus. For ReLU it falls as c/M + d/M^1.5: the "
    "exponent lies between 1 and 1.5 and tends to 1. At half the rate a quarter is left at any "
    "width. Every interval of p is to hold such an exponent, and to be narrow enough to say so.",
    setting=f"two hidden layers of {', '.join(map(str, _DEEP_WIDTHS))} units, N = {_DEEP_SAMPLES} "
    f"Gaussian inputs of {_DEEP_FEATURES} features and norm sqrt(M_0), targets f_0 + z, z ~ "
    f"N(0, 1), {len(_DEEP_SEEDS)} seeds, each one draw of weights for all activations, float64; "
    "tanh and softplus with sigma_w^2 = 1, ReLU with 2, no biases; least squares of mean "
    "logarithms, intervals of 95 % by the bootstrap over seeds; zero damping",
    origin="ours",
)
@in_float64
def width_law(report: Report) -> Outcome:
    """p with its interval, by activation and structure."""
    losses, half = _measure_widths(report)
    measurements: list[Measurement] = []
    data: dict[str, Any] = {"widths": _DEEP_WIDTHS, "curves": {}}
    ends: dict[str, list[tuple[float, float]]] = {}
    for activation, of_all in losses.items():
        ends[activation] = [_interval(_DEEP_WIDTHS, of_one) for of_one in of_all]
        data["curves"][activation] = {
            structure.name: {
                "losses": np.exp(np.log(of_one).mean(axis=1)),
                "p": _slope(_DEEP_WIDTHS, of_one),
                "interval": interval,
            }
            for structure, of_one, interval in zip(
                _STRUCTURES, of_all, ends[activation], strict=True
            )
        }
        least, most = _EXPONENTS[activation]
        for structure, (low, high) in zip(_STRUCTURES, ends[activation], strict=True):
            name = f"{activation}, {structure.name}: p, end of the interval"
            measurements += [
                below(f"{name}, low", low, most),
                above(f"{name}, high", high, least),
            ]
    measurements += [
        below(
            "width of the intervals, largest",
            max(high - low for of_all in ends.values() for low, high in of_all),
            0.4,
        ),
        above(
            "low end of p if smooth, less the high end of ReLU, smallest",
            min(low for name in _SMOOTH for low, _ in ends[name])
            - max(high for _, high in ends["relu"]),
            0,
        ),
        between("half the rate: loss_1/loss_0, smallest", half, 0.2, 0.26),
    ]
    return Outcome(tuple(measurements), data)


def _drawn(shapes: nnx.State, seed: int) -> nnx.State:
    """Standard normal weights; the generator of JAX takes as long for many as all the steps."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)


def _measure_widths(report: Report) -> tuple[dict[str, Matrix], float]:
    """loss_1 / loss_0 by activation (structures, widths, seeds), and the least at half the rate."""
    x = jnp.asarray(sphere(_DEEP_SAMPLES, _DEEP_FEATURES))
    z = jnp.asarray(np.random.default_rng(5).normal(size=(_DEEP_SAMPLES, 1)))
    shape = (len(_STRUCTURES), len(_DEEP_WIDTHS), len(_DEEP_SEEDS))
    losses = {activation: np.empty(shape) for activation in _ACTIVATIONS}
    halves = []
    for at, width in enumerate(_DEEP_WIDTHS):
        nets = {
            activation: nnx.split(
                nnx.eval_shape(partial(_net, activation, (_DEEP_FEATURES, width, width, 1)))
            )
            for activation in _ACTIVATIONS
        }
        geometry = model_geometry(nnx.merge(*nets["tanh"]), _DEEP_SAMPLES)
        rates = jnp.array([1 / structure.alpha(geometry) for structure in _STRUCTURES])
        for seed in _DEEP_SEEDS:
            report(f"width {width}, seed {seed}")
            state = _drawn(nets["tanh"][1], seed)
            for activation, (graphdef, _) in nets.items():
                found = partial(_left, graphdef, state, x, z, structures=_STRUCTURES)
                losses[activation][:, at, seed] = found(rates=rates)
                if seed == 0:
                    halves.append(float(jnp.min(found(rates=rates / 2))))
    return losses, min(halves)
