"""Losses; the one list of them."""

from __future__ import annotations

from natgrad_flax.losses.base import DiagonalLoss, Loss
from natgrad_flax.losses.binary import SigmoidCrossEntropy
from natgrad_flax.losses.by_head import AnyLoss, LossLike
from natgrad_flax.losses.checks import check_loss, check_losses
from natgrad_flax.losses.custom import GaussNewton, Likelihood
from natgrad_flax.losses.gaussian import GaussianNegativeLogLikelihood
from natgrad_flax.losses.heads import Heads
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

__all__ = [
    "LOSSES",
    "AnyLoss",
    "DiagonalLoss",
    "Heads",
    "Loss",
    "LossLike",
    "check_loss",
    "check_losses",
    *(cls.__name__ for cls in LOSSES),
]
