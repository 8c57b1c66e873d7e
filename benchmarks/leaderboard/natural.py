"""The variants of a Fisher structure on the leaderboard, and the workloads that do not suit it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import optax
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import TUNING_TRIALS, Contestant, Damping, RateRule
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.capture import layer_paths
from natgrad_flax.damping import is_zero
from natgrad_flax.fisher import FisherKind
from natgrad_flax.gradient import model_geometry

RELATIVE = ng.RelativeDamping(1e-3)
# a perfect step at 1/alpha has the reduction ratio 1 / (2 - 1/alpha), which is 1 for the exact
# Fisher and nears 1/2 for large alpha: that is what "good" has to mean for all of them
ADAPTIVE = ng.LevenbergMarquardt(initial=1e-2, lower=0.2, upper=0.45)

# the side of a dense system that a step can factorise within the budget of a workload
LARGEST_SYSTEM = 2500
# derivatives of all outputs with respect to all units, float32: half a gigabyte
LARGEST_SIGNALS = 128 * 1024**2


def variants(
    name: str,
    title: str,
    structure: ng.Structure,
    *,
    damping: Damping = RELATIVE,
    rates: tuple[float, ...],
) -> tuple[Contestant, ...]:
    """A structure with true and Monte-Carlo Fisher, fixed and adaptive damping, and tuned rates.

    Args:
      name: key of the first variant, and prefix of the others.
      title: what the board calls it.
      structure: the Fisher approximation.
      damping: of the first variant, the one of the theory.
      rates: learning rates of the tuned variants, TUNING_TRIALS of them.
    """
    assert len(rates) == TUNING_TRIALS
    table: tuple[tuple[str, str, FisherKind, Damping, RateRule], ...] = (
        ("", "", "exact", damping, "theoretical"),
        ("-lm", ", adaptive damping", "exact", ADAPTIVE, "theoretical"),
        ("-tuned", ", tuned", "exact", RELATIVE, "tuned"),
        ("-mc", ", Monte-Carlo", "mc", RELATIVE, "theoretical"),
        ("-mc-lm", ", Monte-Carlo, adaptive damping", "mc", ADAPTIVE, "theoretical"),
        ("-mc-tuned", ", Monte-Carlo, tuned", "mc", RELATIVE, "tuned"),
    )
    return tuple(
        Contestant(
            name=f"{name}{suffix}",
            title=f"{title}{words}",
            family="natural-gradient",
            rate_rule=rule,
            optimizer=partial(_optimizer, structure, fisher, rho),
            rates=rates if rule == "tuned" else (),
            structure=structure,
            fisher=fisher,
            damping=rho,
            unsuitable=partial(unsuitable, structure, fisher, rho),
        )
        for suffix, words, fisher, rho, rule in table
    )


def _optimizer(
    structure: ng.Structure,
    fisher: FisherKind,
    damping: Damping,
    workload: Workload,
    rate: Array | float,
    seed: int,
) -> optax.GradientTransformation:
    return ng.natural_gradient_descent(
        rate,
        structure=structure,
        loss=workload.loss,
        damping=damping,
        fisher=fisher,
        seed=seed,
    )


def unsuitable(
    structure: ng.Structure, fisher: FisherKind, damping: Damping, workload: Workload
) -> str:
    """Why a variant has no place on a workload, or ""; by sizes alone."""
    data, model = workload.data(), workload.model(0)
    samples = workload.batch_size or len(data.x_train)
    outputs = data.y_train.shape[1]
    # cross-entropy has an output Fisher of rank C - 1
    seeds = outputs - isinstance(workload.loss, ng.SoftmaxCrossEntropy)
    if fisher == "mc" and seeds == 1:
        return "the true Fisher needs one backward pass here, so there is nothing to sample"
    seeds = 1 if fisher == "mc" else seeds
    layers = model_geometry(model, samples).layers
    if isinstance(structure, ng.QuasiDiagonal) and not _has_biases(model):
        return "without biases it is the diagonal"
    if is_zero(damping) and (workload.batch_size or not isinstance(workload.loss, ng.MeanSquaredError)):
        return "without damping every batch would be fitted to its end: this is for full batches"
    signals = samples * seeds * sum(units for _, units in layers)
    if signals > LARGEST_SIGNALS:
        return (
            f"the true Fisher needs {seeds} backward passes of {samples} samples at once, "
            f"{signals * 4 / 2**30:.1f} GiB; the Monte-Carlo one is in the race"
        )
    side = dense_side(structure, layers, samples * seeds)
    if side > LARGEST_SYSTEM:
        return f"a dense system of side {side} at every step does not fit the budget"
    return ""


def dense_side(structure: ng.Structure, layers: Sequence[tuple[int, int]], rows: int) -> int:
    """The side of the largest dense system that a step solves, sample or parameter space.

    Args:
      structure: the Fisher approximation.
      layers: (fan-in with the bias, units) of every layer.
      rows: N S.
    """
    sizes = [fan_in * units for fan_in, units in layers]
    if isinstance(structure, ng.BlockDiagonal):
        return max(min(rows, size) for size in sizes)
    if isinstance(structure, ng.Exact | ng.LayerWise):
        return min(rows, sum(sizes))
    if isinstance(structure, ng.KFAC):
        return max(min(rows, units) for _, units in layers)
    return 0


def _has_biases(model: nnx.Module) -> bool:
    return any(getattr(layer, "bias", None) is not None for layer in layer_paths(model).values())
