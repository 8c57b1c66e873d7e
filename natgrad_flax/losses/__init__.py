"""Losses; the one list of them."""

from __future__ import annotations

from collections.abc import Mapping

from natgrad_flax.arguments.instances import check_instance
from natgrad_flax.losses.base import DiagonalLoss, Loss
from natgrad_flax.losses.binary import SigmoidCrossEntropy
from natgrad_flax.losses.by_head import AnyLoss, LossLike
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


def check_losses(loss: object) -> AnyLoss:
    """The loss, or the losses of several heads, which a dictionary or a tuple of losses is, too.

    Raises:
      TypeError: neither.
    """
    if isinstance(loss, Heads):
        return loss
    return Heads(loss) if isinstance(loss, (Mapping, tuple, list)) else check_loss(loss)


def check_loss(loss: object) -> Loss:
    """The loss; raises TypeError unless given an instance of one."""
    return check_instance("loss", loss, Loss, LOSSES)  # type: ignore[type-abstract]


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
