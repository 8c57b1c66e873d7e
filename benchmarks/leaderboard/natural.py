"""The variants of a Fisher structure on the leaderboard, and the workloads that do not suit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import optax
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import (
    CROSS_ENTROPY_MINIMUM,
    TUNING_TRIALS,
    Contestant,
    Damping,
    RateRule,
)
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.damping import is_zero
from natgrad_flax.fisher import FisherKind
from natgrad_flax.gradient import model_geometry
from natgrad_flax.plans import dense_layers

THEORY = ng.RelativeDamping(1e-3)
# what a batch leaves out of its own Fisher, a step divides by the damping alone: less than this
# and training on mini-batches, or with one sampled target, blows up
TUNED = ng.RelativeDamping(0.1)
SAMPLED = ng.RelativeDamping(1.0)
# a perfect step at 1/alpha has the reduction ratio 1 / (2 - 1/alpha), which is 1 for the exact
# Fisher and nears 1/2 for large alpha: that is what "good" has to mean for all of them
ADAPTIVE = ng.LevenbergMarquardt(initial=0.1, lower=0.2, upper=0.45, minimum=1e-4)

# the side of a dense system that a step can factorise within the budget of a workload
LARGEST_SYSTEM = 2500
# derivatives of all outputs with respect to all units, float32: half a gigabyte
LARGEST_SIGNALS = 128 * 1024**2


def variants(
    name: str,
    title: str,
    structure: ng.Structure,
    *,
    damping: Damping = THEORY,
    rates: tuple[float, ...],
    damped: ng.Structure | None = None,
) -> tuple[Contestant, ...]:
    """A structure with true and Monte-Carlo Fisher, fixed and adaptive damping, and tuned rates.

    Args:
      name: key of the first variant, and prefix of the others.
      title: what the board calls it.
      structure: the Fisher approximation.
      damping: of the first variant, the one of the theory.
      rates: learning rates of the tuned variants, TUNING_TRIALS of them.
      damped: the approximation of all variants but the first; the same without it.
    """
    assert len(rates) == TUNING_TRIALS
    table: tuple[tuple[str, str, FisherKind, Damping, RateRule], ...] = (
        ("", "", "exact", damping, "theoretical"),
        ("-lm", ", adaptive damping", "exact", ADAPTIVE, "theoretical"),
        ("-tuned", ", tuned", "exact", TUNED, "tuned"),
        ("-mc", ", Monte-Carlo", "mc", SAMPLED, "theoretical"),
        ("-mc-lm", ", Monte-Carlo, adaptive damping", "mc", ADAPTIVE, "theoretical"),
        ("-mc-tuned", ", Monte-Carlo, tuned", "mc", SAMPLED, "tuned"),
    )
    return tuple(
        Contestant(
            name=f"{name}{suffix}",
            title=f"{title}{words}",
            family="natural-gradient",
            rate_rule=rule,
            optimizer=partial(_optimizer, chosen, fisher, rho),
            rates=rates if rule == "tuned" else (),
            structure=chosen,
            fisher=fisher,
            damping=rho,
            unsuitable=partial(unsuitable, chosen, fisher, rho),
        )
        for suffix, words, fisher, rho, rule in table
        for chosen in (damped if damped and suffix else structure,)
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
        damping=damping_on(workload, damping),
        fisher=fisher_on(workload, fisher),
        seed=seed,
    )


def fisher_on(workload: Workload, fisher: FisherKind) -> FisherKind:
    """The kind of Fisher on a workload: where one backward pass gives the true one, that."""
    return "exact" if true_seeds(workload) == 1 else fisher


def damping_on(workload: Workload, damping: Damping) -> Damping:
    """The damping on a workload: an adaptive one has a higher floor under cross-entropy."""
    entropy = isinstance(workload.loss, ng.SoftmaxCrossEntropy)
    if entropy and isinstance(damping, ng.LevenbergMarquardt):
        return replace(damping, minimum=CROSS_ENTROPY_MINIMUM)
    return damping


def true_seeds(workload: Workload) -> int:
    """Backward passes of the true Fisher; cross-entropy has an output Fisher of rank C - 1."""
    outputs = workload.data().y_train.shape[1]
    return outputs - isinstance(workload.loss, ng.SoftmaxCrossEntropy)


def unsuitable(
    structure: ng.Structure, fisher: FisherKind, damping: Damping, workload: Workload
) -> str:
    """Why a variant has no place on a workload, or ""; by sizes alone.

    Args:
      structure: the Fisher approximation.
      fisher: "exact" or "mc".
      damping: of the variant.
      workload: its data must be at hand.
    """
    data, model = workload.data(), workload.model(0)
    samples = workload.batch_size or len(data.x_train)
    seeds = 1 if fisher == "mc" else true_seeds(workload)
    layers = model_geometry(model, samples).layers
    if isinstance(structure, ng.QuasiDiagonal) and not _has_biases(model):
        return "without biases it is the diagonal"
    full_batch = workload.batch_size is None and isinstance(workload.loss, ng.MeanSquaredError)
    if is_zero(damping) and not full_batch:
        return (
            "without damping each batch would be fitted to its end: for squared error, full batch"
        )
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
    if isinstance(structure, ng.Exact):
        return min(rows, sum(sizes))
    if isinstance(structure, ng.BlockTriDiagonal):
        # every other layer is eliminated
        return min(len(layers) // 2 * rows, sum(sizes))
    if isinstance(structure, ng.KFAC):
        return max(min(rows, units) for _, units in layers)
    return 0


def _has_biases(model: nnx.Module) -> bool:
    return any(getattr(layer, "bias", None) is not None for layer in dense_layers(model).values())
