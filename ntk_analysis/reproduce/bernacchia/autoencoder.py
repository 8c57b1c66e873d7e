"""Figure 1D of Bernacchia et al. (2018): a deep autoencoder of MNIST."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import natgrad_datasets
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from natgrad_flax import LevenbergMarquardt
from natgrad_flax.linear import online_natural_gradient_descent
from ntk_analysis.reproduce.bernacchia.training import (
    Run,
    batches,
    compiled,
    gradient_step,
    natural_step,
)
from ntk_analysis.reproduce.images import require
from ntk_analysis.reproduce.registry import Outcome, Report, below, check

SetUp = tuple[Run, Run, dict[float, Run]]
"""Natural gradient as it counts, with Sigma~ = I and lambda_0 = 1, and SGD by learning rate."""

WIDTHS = (784, 400, 200, 100, 50, 100, 200, 400, 784)
EXAMPLES = 80_000
EVERY = 2_000
NATURAL_BATCH = 1_000
SGD_BATCH = 20
PRINTED_RATE = 0.04
RATES = (PRINTED_RATE, 0.02, 0.01, 0.005)
"""Learning rates of SGD, from the paper's downwards; the best after ``EXAMPLES`` counts."""
OUTPUT_VARIANCE = 100.0
"""Of the model's outputs, Sigma~ = 100 I: chosen from 0.01 to 100 as the learning rate of SGD is.

It only says how much of the damping the moments of errors get beside those of inputs. One sampled
error for each of 1000 images is little to know 784 directions from.
"""
START = LevenbergMarquardt(initial=1e-3)


class Autoencoder(nnx.Module):
    """tanh after every layer but the last; weights N(0, 1 / fan-in), biases zero, float32."""

    def __init__(self, widths: Sequence[int], seed: int) -> None:
        rngs = nnx.Rngs(seed)
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.layers = nnx.List(
            nnx.Linear(a, b, kernel_init=init, rngs=rngs) for a, b in itertools.pairwise(widths)
        )

    def __call__(self, x: Array) -> Array:
        """Maps images (N, pixels) to their reconstructions."""
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


def pixels(num_train: int, num_test: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Training and test images of MNIST, pixels in [0, 1].

    Raises:
      MissingDataError: MNIST is not on this machine.
    """
    # raises where files are missing
    require("mnist")
    data = natgrad_datasets.load("mnist", num_train=num_train, num_test=num_test, prepare=False)
    return data.x_train, data.x_test


def start(
    train: NDArray[Any], test: NDArray[Any], widths: Sequence[int], examples: int, every: int
) -> SetUp:
    """All runs before their first steps, from equal weights.

    Args:
      train: images (N, pixels), which are their own targets.
      test: images (N', pixels); the error is the root of the mean square over images and pixels.
      widths: of the autoencoder.
      examples: after which the order of the images begins anew.
      every: examples between two points of the curves.
    """
    graphdef, params = nnx.split(Autoencoder(widths, 0))
    x, held_out = jnp.asarray(train), jnp.asarray(test)

    @jax.jit
    def rmse(params: Any, x: Array) -> Array:
        return jnp.sqrt(jnp.mean((nnx.merge(graphdef, params)(x) - x) ** 2))

    def error(params: Any) -> float:
        return float(rmse(params, held_out))

    def order(batch: int) -> NDArray[Any]:
        return batches(len(train), batch, every, examples, 0)

    chosen, plain = (
        Run(
            compiled(natural_step(graphdef, optimizer)),
            error,
            (params, optimizer.init(params)),
            (x, x),
            order(NATURAL_BATCH),
        )
        for optimizer in (
            online_natural_gradient_descent(1.0, damping=START, output_variance=OUTPUT_VARIANCE),
            online_natural_gradient_descent(1.0),
        )
    )
    program = compiled(gradient_step(graphdef))
    sgd = {
        rate: Run(program, error, (params, jnp.asarray(rate)), (x, x), order(SGD_BATCH))
        for rate in RATES
    }
    return chosen, plain, sgd


@check(
    "BE-Fig1D",
    "MNIST autoencoder: natural gradient and SGD",
    claim="On a deep nonlinear autoencoder of MNIST the online natural gradient (Eqs. 20 and 21, "
    "no further modification) has a smaller test error than SGD after as many examples, and, "
    "though modestly, after as many seconds (Section 5).",
    setting="784-400-200-100-50-100-200-400-784, tanh, last layer linear, biases by augmentation, "
    "80 000 examples; natural gradient alpha = 1, M = 1000, K = 1; SGD M = 20 at the best of some "
    "learning rates from the paper's 0.04 downwards; ours: pixels in [0, 1], 60 000 + 10 000 "
    "images of MNIST, the error is the root mean square over images and pixels, weights "
    "N(0, 1 / fan-in), biases 0, output variance 100, lambda_0 = 1e-3, float32, seed 0; seconds "
    "of all runs, alternating in one process",
    origin="paper, partly",
    differs=(
        "initial weights, lambda_0, the output variance and the smaller learning rates of SGD are"
        " ours"
    ),
)
def figure_1d(report: Report) -> Outcome:
    """Everything in turns, then SGD for as long as natural gradient took."""
    report("reading MNIST")
    runs = natural, plain, sgd = start(*pixels(60_000, 10_000), WIDTHS, EXAMPLES, EVERY)
    for seen in range(0, EXAMPLES, EVERY):
        report(f"{seen} examples, natural gradient {natural.errors[-1]:.4f}")
        for run in (natural, plain, *sgd.values()):
            run.advance()
    return outcome(runs, report)


def outcome(runs: SetUp, report: Report) -> Outcome:
    """Compares runs of equally many examples; SGD goes on until its clock is equal too.

    Raises:
      ArithmeticError: natural gradient diverged, or SGD at every learning rate.
    """
    natural, plain, sgd = runs
    converged = {rate: run for rate, run in sgd.items() if run.finite}
    if not natural.finite or not converged:
        raise ArithmeticError("natural gradient diverged, or SGD at every learning rate")
    point = len(natural.examples) - 1
    equal = {rate: run.errors[point] for rate, run in converged.items()}
    best = min(equal, key=lambda rate: equal[rate])
    clock = natural.seconds[-1]
    report(f"SGD for {clock:.0f} s")
    for run in converged.values():
        while run.finite and run.seconds[-1] < clock:
            run.advance()
    timed = {rate: run.after(clock) for rate, run in converged.items() if run.finite}
    quickest = min(timed, key=lambda rate: timed[rate])
    found = natural.errors[-1]
    measurements = (
        below(f"natural gradient over SGD at {best:g}, equal examples", found / equal[best], 1.0),
        below(
            f"natural gradient over SGD at {quickest:g}, equal seconds",
            found / timed[quickest],
            1.0,
        ),
        below("test error of natural gradient", found, 0.28),
        below(f"test error of SGD at {best:g}", equal[best], 0.28),
    )
    document = {
        "natural": natural.curve(),
        "sgd": converged[best].curve(),
        "rate": best,
        "minimum": None,
        "plain": plain.curve() if plain.finite else None,
        "rates": {f"{rate:g}": equal.get(rate) for rate in sgd},
    }
    pairs = zip(natural.errors[1:], converged[best].errors[1:], strict=False)
    ahead = sum(one < other for one, other in pairs)
    notes = (
        "The bounds are for the end. After as many examples natural gradient is ahead of SGD "
        f"({best:g}) at {ahead} of {point} points of the curve; SGD is ahead at the beginning.",
        "With output variance 1 and lambda_0 = 1, as in Figures 1A to 1C, natural gradient ends at "
        f"a test error of {plain.errors[-1]:.4f} after {plain.seconds[-1]:.0f} s. SGD is at "
        f"{equal[best]:.4f} after as many examples and at {timed[quickest]:.4f} after {clock:.0f} "
        "s. The paper states neither number; we chose them as the learning rate of SGD.",
        *_printed(sgd[PRINTED_RATE], best),
    )
    return Outcome(measurements, document, notes)


def _printed(run: Run, best: float) -> tuple[str, ...]:
    """What became of the paper's learning rate."""
    if run.finite:
        return ()
    return (
        f"SGD at the paper's learning rate {PRINTED_RATE:g} diverges within {run.examples[-1]} "
        f"examples; shown is {best:g}, the best of {', '.join(f'{rate:g}' for rate in RATES)}. The "
        "paper states neither its initial weights nor how its loss counts pixels.",
    )
