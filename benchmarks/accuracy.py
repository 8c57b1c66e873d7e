"""What training for a few steps at the theoretical learning rate reaches, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import natgrad_datasets
import numpy as np
from natgrad_datasets import Dataset

from benchmarks.common import Suite, by_profile, profile, unit
from benchmarks.dynamics import NAMES, check_first_step, find_method, make_model, train
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
        by_profile(smoke=["exact"], fast=NAMES, regular=NAMES, large=NAMES),
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
