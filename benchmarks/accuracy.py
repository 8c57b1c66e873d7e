"""What training for a few steps reaches on real images: full batches, and mini-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import natgrad_datasets
import numpy as np
from flax import nnx
from natgrad_datasets import Dataset

import natgrad_flax as ng
from benchmarks.common import Suite, by_profile, profile, unit
from benchmarks.dynamics import NAMES, check_first_step, find_method, make_model, train
from benchmarks.leaderboard.contestant import find_contestant
from benchmarks.leaderboard.program import Evaluation, OptaxProgram
from benchmarks.leaderboard.trial import batches
from benchmarks.leaderboard.workload import Workload
from benchmarks.leaderboard.workloads import cifar_conv, cifar_transformer, digits_conv
from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.dynamics import linearised_dynamics, squared_losses
from ntk_analysis.methods import theoretical_learning_rate

STEPS = (1, 5)
SMALLEST_LOSS = 1e-6
"""Smaller shares of the initial loss are rounding of float32, and are shown as this."""
TOLERANCE, LOOSE_TOLERANCE = 1e-2, 0.3
"""Of the first step in float32: as a rule, and where conditions of the structure fail."""
SLACK = 0.1


@dataclass(frozen=True)
class Images:
    """Ten-class images.

    Attributes:
      num_train: N; K-FAC needs no more of them than the images have rank.
      num_test: N'.
      costly: structures for the profiles regular and large only, with the reason.
    """

    num_train: int
    num_test: int
    costly: dict[str, str]


DATA = {
    "digits": Images(40, 360, {}),
    "mnist": Images(100, 1000, {"unit-wise": "N C = 1000 outputs take 5 s a step on two cores"}),
}


class Accuracy(Suite):
    """Training loss and test accuracy after k full-batch steps, without a single tuned number.

    ReLU networks M_0-M-M-10 in NTK parametrisation without biases, in float32, mean squared error,
    on 40 handwritten digits or 100 images of MNIST of all ten classes; learning rate 1 / alpha, or
    1 / lambda_max where a structure is not isotropic. Test accuracy is low because the training
    sets are small. A first step that is not the one of the theory fails the case, and so does a
    training loss far above its prediction.
    """

    params: ClassVar[tuple[list[Any], ...]] = (
        by_profile(smoke=["digits"], fast=list(DATA), regular=list(DATA), large=list(DATA)),
        by_profile(smoke=["exact", "ekfac"], fast=NAMES, regular=NAMES, large=NAMES),
        [by_profile(smoke=128, fast=256, regular=1024, large=4096)],
        list(STEPS),
    )
    param_names: ClassVar = ["data", "structure", "width", "steps"]

    def setup(self, folder: str, *case: Any) -> None:
        """Reads or measures the figures; one training serves all numbers of steps."""
        super().setup(folder, *case[:-1])

    def skipped(self, *case: Any) -> str | None:
        """Files that are not on this machine, and what takes too long for the profile."""
        data, structure = case[:2]
        if profile() in ("smoke", "fast") and structure in DATA[data].costly:
            return DATA[data].costly[structure]
        return missing_files("mnist") if data == "mnist" else None

    def measure(self, data: str, structure: str, width: int) -> dict[str, float]:
        """Loss and test error after each number of steps; see the class.

        Raises:
          ArithmeticError: outputs that are not finite, a first step that is not the one of the
            theory, or a training loss far above its prediction.
        """
        images = DATA[data]
        loaded = natgrad_datasets.load(
            data, num_train=images.num_train, num_test=images.num_test, dtype="float32"
        )
        return measure_accuracy(loaded, structure, width)

    @unit("share of the initial loss")
    def track_training_loss(
        self, folder: str, data: str, structure: str, width: int, steps: int
    ) -> float:
        """Loss after k steps over the loss before. A rise is slower training; 1e-6 is fitted."""
        return self.figures[f"loss {steps}"]

    @unit("% of the test set")
    def track_test_error(
        self, folder: str, data: str, structure: str, width: int, steps: int
    ) -> float:
        """100 % minus the test accuracy after k steps, since asv takes more for worse.

        A rise is worse generalisation, or slower training where the loss rises too. One image of
        digits is 0.3 %, one of MNIST 0.1 %: a few images are no finding.
        """
        return self.figures[f"error {steps}"]


def missing_files(dataset: str) -> str | None:
    """Why the files of a data set cannot be used on this machine, or None; downloads nothing."""
    found = {row.name: row for row in natgrad_datasets.status()}[dataset]
    if found.usable:
        return None
    return (
        f"the files of {dataset} are {found.checksum}; name their folder in NATGRAD_DATA, or let "
        f"`natgrad dynamics --dataset {dataset}` fetch them"
    )


def measure_accuracy(data: Dataset, structure: str, width: int) -> dict[str, float]:
    """Trains and counts.

    Args:
      data: the images, in float32.
      structure: its name.
      width: of the two hidden layers.

    Raises:
      ArithmeticError: as in ``Accuracy.measure``.
    """
    method, model, count = find_method(structure), make_model(data, width), data.num_train
    coefficient = coefficient_matrix(method.structure, model, data.x_train, damping=method.damping)
    rate = theoretical_learning_rate(method, model, count, coefficient)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    inputs = jnp.concatenate([x, jnp.asarray(data.x_test)])
    trained = train(method, rate.value, model, x, y, inputs, max(STEPS))
    theory = linearised_dynamics(
        coefficient,
        np.zeros((0, len(coefficient))),
        trained.outputs[0, :count],
        np.asarray(data.y_train, np.float64),
        rate.value,
        max(STEPS),
    )
    predicted = theory.outputs_train
    check_first_step(
        structure,
        trained.first_move[:count],
        predicted[1] - predicted[0],
        # singular kernels are inverted in float32
        LOOSE_TOLERANCE if rate.note else TOLERANCE,
    )
    losses = squared_losses(trained.outputs[:, :count], data.y_train)
    last = max(STEPS)
    if losses[last] > theory.train_losses[last] + SLACK * losses[0]:
        raise ArithmeticError(
            f"{structure}: after {last} steps {losses[last] / losses[0]:.2g} of the training loss "
            f"is left, where theory leaves {theory.train_losses[last] / losses[0]:.2g}"
        )
    classes = trained.outputs[:, count:].argmax(axis=-1)
    figures: dict[str, float] = {}
    for step in STEPS:
        figures[f"loss {step}"] = max(float(losses[step] / losses[0]), SMALLEST_LOSS)
        figures[f"error {step}"] = 100 * float(np.mean(classes[step] != data.labels_test))
    return figures


BATCH_STEPS = (5, 40)
LEARNED = 0.9
"""Most of the initial training loss that may be left after the last of these steps."""


@dataclass(frozen=True)
class Network:
    """A network with shared weights, on real images in mini-batches.

    Attributes:
      workload: data, model, loss and batch; held-out samples are counted by their class.
      rates: learning rates by contestants of the leaderboard.
    """

    workload: Workload
    rates: Mapping[str, float]


def _small_transformer(seed: int) -> nnx.Module:
    sizes = {"patch": 2, "width": 16, "depth": 1, "heads": 2, "mlp": 32}
    return ng.VisionTransformer((8, 8, 1), **sizes, rngs=nnx.Rngs(seed))


NETWORKS: dict[str, Network] = {
    "digits-conv": Network(
        replace(digits_conv.WORKLOAD, metric="error"),
        {"kfac-average": 0.01, "exact-momentum": 0.1},
    ),
    "digits-transformer": Network(
        replace(digits_conv.WORKLOAD, name="digits-transformer", metric="error",
                settings={"parametrisation": "standard"}, model=_small_transformer),
        {"kfac-average": 0.01, "exact-momentum": 0.1},
    ),
    "cifar-conv": Network(
        replace(cifar_conv.WORKLOAD, metric="error"),
        {"kfac-average": 0.01, "exact-momentum": 0.1},
    ),
    "cifar-transformer": Network(
        replace(cifar_transformer.WORKLOAD, metric="error"),
        {"kfac-average": 0.003, "exact-momentum": 0.1},
    ),
}  # fmt: skip
_METHODS = ["kfac-average", "exact-momentum"]
_EMBEDDED = ["digits-conv", "digits-transformer"]


class NetworkAccuracy(Suite):
    """Training loss and held-out error of a ConvNet and a vision transformer after k mini-batches.

    On 8 x 8 digits, which need no files, and on CIFAR-10; cross-entropy, Monte-Carlo Fisher. K-FAC
    has averaged factors and momentum, the exact structure the previous step projected: the
    contestants ``kfac-average`` and ``exact-momentum`` of the leaderboard, at learning rates that
    were tuned there once and stand fixed here. A training loss that hardly falls fails the case.
    """

    params: ClassVar[tuple[list[Any], ...]] = (
        by_profile(
            smoke=_EMBEDDED[:1], fast=_EMBEDDED, regular=list(NETWORKS), large=list(NETWORKS)
        ),
        by_profile(smoke=_METHODS[:1], fast=_METHODS, regular=_METHODS, large=_METHODS),
        list(BATCH_STEPS),
    )
    param_names: ClassVar = ["network", "method", "steps"]

    def setup(self, folder: str, *case: Any) -> None:
        """Reads or measures the figures; one training serves all numbers of steps."""
        super().setup(folder, *case[:-1])

    def skipped(self, *case: Any) -> str | None:
        """Files that are not on this machine."""
        dataset = NETWORKS[case[0]].workload.dataset
        return None if dataset is None else missing_files(dataset)

    def measure(self, network: str, method: str) -> dict[str, float]:
        """Loss and error after each number of steps.

        Raises:
          ArithmeticError: a training loss that is not finite, or has hardly fallen.
        """
        entry = NETWORKS[network]
        return measure_network(entry.workload, method, entry.rates[method])

    @unit("share of the initial loss")
    def track_training_loss(self, folder: str, network: str, method: str, steps: int) -> float:
        """Loss after k steps over the loss before. A rise is slower training."""
        return self.figures[f"loss {steps}"]

    @unit("% of the held-out samples")
    def track_held_out_error(self, folder: str, network: str, method: str, steps: int) -> float:
        """100 % minus the accuracy after k steps. One image of digits is 0.3 %, of CIFAR 0.1 %."""
        return self.figures[f"error {steps}"]


def measure_network(workload: Workload, method: str, rate: float) -> dict[str, float]:
    """Trains a network by a contestant of the leaderboard, and looks at it now and then.

    Args:
      workload: judged by its held-out error.
      method: name of the contestant.
      rate: learning rate.

    Raises:
      ArithmeticError: as in ``NetworkAccuracy.measure``.
    """
    program, evaluate = OptaxProgram(find_contestant(method), workload), Evaluation(workload)
    state, order = program.start(0, rate), batches(workload, 0)
    first, _ = evaluate(program.parameters(state))
    figures: dict[str, float] = {}
    taken = 0
    for steps in BATCH_STEPS:
        for _ in range(steps - taken):
            state = program.step(state, next(order))
        taken = steps
        loss, error = evaluate(program.parameters(state))
        figures |= {f"loss {steps}": loss / first, f"error {steps}": 100 * error}
    left = figures[f"loss {max(BATCH_STEPS)}"]
    if not (math.isfinite(left) and left < LEARNED):
        raise ArithmeticError(
            f"{method} on {workload.name}: after {taken} steps {left:.2g} of the training loss is "
            f"left, more than {LEARNED}"
        )
    return figures
