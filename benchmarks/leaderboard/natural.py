"""The variants of a Fisher structure on the leaderboard, and the workloads that do not suit it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import (
    CROSS_ENTROPY_MINIMUM,
    STANDARD_DAMPING,
    Contestant,
    Damping,
    RateRule,
    is_standard,
)
from benchmarks.leaderboard.studies import Space
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.damping import is_zero
from natgrad_flax.signals.fisher import FisherKind
from natgrad_flax.signals.model import dense_layers
from natgrad_flax.structures import AveragedStructure
from natgrad_flax.structures.memory import sample_jacobian_entries, signal_entries

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
# the same for an eigendecomposition, 9 n^3 flops where a Cholesky factorisation has n^3 / 3
LARGEST_EIGENSYSTEM = 800
# what a step holds of all layers, and builds of one besides, in float32: half a gigabyte
LARGEST_SIGNALS = 128 * 1024**2

# over 20 batches, new in every step; what is dear is done in every tenth
AVERAGE = ng.MovingAverage(decay=0.95, every=1, inverse_every=10)
MOMENTUM = 0.9


def variants(
    structure: ng.Structure,
    *,
    damping: Damping = THEORY,
    rates: Space,
    damped: ng.Structure | None = None,
) -> tuple[Contestant, ...]:
    """A structure with true and Monte-Carlo Fisher, fixed and adaptive damping, and tuned rates.

    Args:
      structure: the Fisher approximation; its style has the key of the first variant, which is the
        prefix of the others, and what the board calls it.
      damping: of the first variant, the one of the theory.
      rates: the ends of the search space of the tuned variants.
      damped: the approximation of all variants but the first; the same without it.
    """
    table: tuple[tuple[str, str, FisherKind, Damping, RateRule], ...] = (
        ("", "", "exact", damping, "theoretical"),
        ("-lm", ", adaptive damping", "exact", ADAPTIVE, "theoretical"),
        ("-tuned", ", tuned", "exact", TUNED, "tuned"),
        ("-mc", ", Monte-Carlo", "mc", SAMPLED, "theoretical"),
        ("-mc-lm", ", Monte-Carlo, adaptive damping", "mc", ADAPTIVE, "theoretical"),
        ("-mc-tuned", ", Monte-Carlo, tuned", "mc", SAMPLED, "tuned"),
    )
    return tuple(
        of_structure(
            chosen,
            suffix,
            words,
            rate_rule=rule,
            optimizer=partial(descent, chosen, fisher, rho),
            rates=rates if rule == "tuned" else (),
            fisher=fisher,
            damping=rho,
            unsuitable=partial(_unsuitable_variant, chosen, fisher, rho, rule),
        )
        for suffix, words, fisher, rho, rule in table
        for chosen in (damped if damped and suffix else structure,)
    )


def of_structure(structure: ng.Structure, ending: str, words: str, **further: Any) -> Contestant:
    """A contestant that is called after its structure.

    Args:
      structure: the Fisher approximation.
      ending: of its name, with the hyphen.
      words: of its title, with the comma.
      **further: what else it is.
    """
    style = structure.style
    return Contestant(
        name=f"{style.command or style.label.lower().replace(' ', '-')}{ending}",
        title=f"{style.label}{words}",
        family="natural-gradient",
        structure=structure,
        **further,
    )


def descent(
    structure: ng.Structure,
    fisher: FisherKind,
    damping: Damping,
    workload: Workload,
    rate: optax.ScalarOrSchedule,
    seed: int,
    **further: Any,
) -> optax.GradientTransformation:
    """The natural-gradient descent of a workload, with its Fisher and damping there."""
    return ng.natural_gradient_descent(
        rate,
        structure=structure,
        loss=workload.loss,
        damping=damping_on(workload, damping),
        fisher=fisher_on(workload, fisher),
        seed=seed,
        **further,
    )


def averaged(structure: AveragedStructure, *, damping: Damping, rates: Space) -> Contestant:
    """A structure as people run it on mini-batches: averages over batches, and momentum behind.

    Args:
      structure: one that is a function of means over samples.
      damping: of the averaged Fisher.
      rates: the ends of its search space.
    """

    def optimizer(
        workload: Workload, rate: Array | float, seed: int
    ) -> optax.GradientTransformation:
        further = {"average": AVERAGE, "example": example_of(workload)}
        return optax.chain(
            descent(structure, "mc", damping, workload, rate, seed, **further),
            optax.trace(MOMENTUM),
        )

    return of_structure(
        structure,
        "-average",
        f", averaged, momentum {MOMENTUM:g}, Monte-Carlo, tuned",
        rate_rule="tuned",
        optimizer=optimizer,
        rates=rates,
        fisher="mc",
        damping=damping,
        unsuitable=lambda workload: (
            _full_batch(workload) or unsuitable_average(structure, workload)
        ),
    )


def example_of(workload: Workload) -> tuple[nnx.Module, jax.ShapeDtypeStruct]:
    """The model and a batch of a workload, as shapes alone."""
    x = workload.data().x_train
    shape = (workload.batch_size or len(x), *x.shape[1:])
    return nnx.eval_shape(lambda: workload.model(0)), jax.ShapeDtypeStruct(shape, x.dtype)


def projected_momentum(structure: ng.Structure, *, damping: Damping, rates: Space) -> Contestant:
    """A structure that solves every batch anew, with the previous step projected (SPRING).

    Args:
      structure: ``ng.Exact`` or ``ng.BlockDiagonal``.
      damping: positive, and not adaptive.
      rates: the ends of its search space.
    """
    return of_structure(
        structure,
        "-momentum",
        f", projected momentum {MOMENTUM:g}, Monte-Carlo, tuned",
        rate_rule="tuned",
        optimizer=partial(descent, structure, "mc", damping, momentum=MOMENTUM),
        rates=rates,
        fisher="mc",
        damping=damping,
        unsuitable=lambda workload: (
            _full_batch(workload) or unsuitable(structure, "mc", damping, workload)
        ),
    )


def fisher_on(workload: Workload, fisher: FisherKind) -> FisherKind:
    """The kind of Fisher on a workload: where one backward pass gives the true one, that."""
    return "exact" if true_seeds(workload) == 1 else fisher


def damping_on(workload: Workload, damping: Damping) -> Damping:
    """The damping on a workload.

    An adaptive one has a higher floor under cross-entropy, and one in units of the Fisher is larger
    in standard parametrisation.
    """
    scale = STANDARD_DAMPING if is_standard(workload) else 1.0
    if isinstance(damping, ng.LevenbergMarquardt):
        entropy = isinstance(workload.loss, ng.SoftmaxCrossEntropy)
        minimum = CROSS_ENTROPY_MINIMUM if entropy else damping.minimum
        return replace(damping, initial=scale * damping.initial, minimum=scale * minimum)
    return damping if isinstance(damping, ng.RelativeDamping) else scale * damping


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
    signals = signal_shapes(workload, fisher)
    layers = signals.layers
    if structure.without_biases and all(a.bias_scale is None for a in layers):
        return f"without biases it is the {structure.without_biases}"
    if is_zero(damping) and not is_fit(workload):
        return (
            "without damping each batch would be fitted to its end: for squared error, full batch"
        )
    held = sum(map(signal_entries, layers))
    built = max(sample_jacobian_entries(structure, layer) for layer in layers)
    if held + built > LARGEST_SIGNALS:
        size = f"{(held + built) * 4 / 2**30:.1f} GiB"
        if signals.num_directions == 1:
            return f"what a step holds of {signals.num_samples} samples, {size}, does not fit"
        return (
            f"the true Fisher needs {signals.num_directions} backward passes of "
            f"{signals.num_samples} samples at once, {size}; the Monte-Carlo one is in the race"
        )
    side = structure.largest_system(signals)
    if structure.eigensystems and side > LARGEST_EIGENSYSTEM:
        return f"an eigendecomposition of side {side} at every step does not fit the budget"
    if side > LARGEST_SYSTEM:
        return f"a dense system of side {side} at every step does not fit the budget"
    return ""


def _unsuitable_variant(
    structure: ng.Structure,
    fisher: FisherKind,
    damping: Damping,
    rule: RateRule,
    workload: Workload,
) -> str:
    if rule == "theoretical" and workload.data().y_train.dtype.kind in "iu":
        return "its learning rate is that of a coefficient matrix of samples, and these are tokens"
    return unsuitable(structure, fisher, damping, workload)


def unsuitable_average(structure: AveragedStructure, workload: Workload) -> str:
    """Why matrices that are kept from batch to batch have no place on a workload, or ""."""
    side = structure.factor_size(signal_shapes(workload, "mc"))
    if side > LARGEST_SYSTEM:
        return f"averages are kept as matrices, here of side {side}, which do not fit the budget"
    return ""


def is_fit(workload: Workload) -> bool:
    """Whether it is squared error on a full batch, of which nothing is drawn."""
    return workload.batch_size is None and isinstance(workload.loss, ng.MeanSquaredError)


def _full_batch(workload: Workload) -> str:
    return "" if workload.batch_size else "it is for mini-batches, and this is a full batch"


def signal_shapes(workload: Workload, fisher: FisherKind) -> ng.Signals:
    """The signals of a step, as shapes: nothing is computed.

    Args:
      workload: its data must be at hand.
      fisher: "exact" or "mc"; where one backward pass gives the true Fisher, they are the same.
    """
    data, (graphdef, state) = workload.data(), nnx.split(workload.model(0))
    size = workload.batch_size or len(data.x_train)
    inputs, targets = (
        jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for array in (data.x_train, data.y_train)
    )
    kind = fisher_on(workload, fisher)
    traced = partial(_signals, graphdef=graphdef, loss=workload.loss, fisher=kind)
    found: ng.Signals = jax.eval_shape(traced, state, inputs, targets)
    return found


# through jit, so that only the first of equal calls is traced
@partial(jax.jit, static_argnames=("graphdef", "loss", "fisher"))
def _signals(
    state: Any, x: Array, y: Array, *, graphdef: Any, loss: ng.Loss, fisher: FisherKind
) -> ng.Signals:
    model = nnx.merge(graphdef, state)
    return ng.fisher_signals(model, x, y, loss=loss, fisher=fisher, key=jax.random.key(0))[0]


def is_dense(model: nnx.Module) -> bool:
    """Whether all layers with parameters are fully connected, so that theory knows their sizes."""
    try:
        dense_layers(model)
    except TypeError:
        return False
    return True
