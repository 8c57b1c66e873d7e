"""Whether what was given is a loss, or losses of several heads."""

from __future__ import annotations

from collections.abc import Mapping

from natgrad_flax.arguments.instances import check_instance
from natgrad_flax.losses.base import Loss
from natgrad_flax.losses.by_head import AnyLoss
from natgrad_flax.losses.heads import Heads


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
    return check_instance("loss", loss, Loss)  # type: ignore[type-abstract]
