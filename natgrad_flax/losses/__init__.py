"""Losses; the one list of them."""

from __future__ import annotations

from natgrad_flax.arguments.instances import check_instance
from natgrad_flax.losses.base import DiagonalLoss, Loss
from natgrad_flax.losses.binary import SigmoidCrossEntropy
from natgrad_flax.losses.custom import GaussNewton, Likelihood
from natgrad_flax.losses.gaussian import GaussianNegativeLogLikelihood
from natgrad_flax.losses.huber import Huber
from natgrad_flax.losses.mean_squared_error import MeanSquaredError
from natgrad_flax.losses.poisson import Poisson
from natgrad_flax.losses.softmax import SoftmaxCrossEntropy

LOSSES: tuple[type[Loss], ...] = (
    MeanSquaredError,
    SoftmaxCrossEntropy,
    SigmoidCrossEntropy,
    Poisson,
    GaussianNegativeLogLikelihood,
    Huber,
    GaussNewton,
    Likelihood,
)


def check_loss(loss: object) -> Loss:
    """The loss; raises TypeError unless given an instance of one."""
    return check_instance("loss", loss, Loss, LOSSES)  # type: ignore[type-abstract]


__all__ = [
    "LOSSES",
    "DiagonalLoss",
    "Loss",
    "check_loss",
    *(cls.__name__ for cls in LOSSES),
]
