"""Exact natural gradients of linear models.

``deep_linear`` holds the theory of deep linear networks on sequences of weights,
``deep_linear_fisher`` and ``deep_linear_bottleneck`` its matrices and projections; the
transformations for Flax modules are exported here.
"""

from natgrad_flax.linear.deep_linear_optimizer import (
    DeepLinearState,
    deep_linear_descent,
)
from natgrad_flax.linear.inverse_moments import (
    DirectInverse,
    InverseMoment,
    MovingInverse,
    RandomisedSVD,
)
from natgrad_flax.linear.online import online_natural_gradient_descent

__all__ = [
    "DeepLinearState",
    "DirectInverse",
    "InverseMoment",
    "MovingInverse",
    "RandomisedSVD",
    "deep_linear_descent",
    "online_natural_gradient_descent",
]
