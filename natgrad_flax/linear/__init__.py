"""Exact natural gradients of linear models.

``deep_linear`` holds the theory of deep linear networks on sequences of weights,
``deep_linear_fisher`` and ``deep_linear_bottleneck`` its matrices and projections; the
transformations for Flax modules are exported here. ``logistic``, ``diagonal_network`` and
``matrix_factorization`` have fields for ``descend``, ``completion`` runs on observed entries, and
``references`` has the solutions that they converge to.
"""

from natgrad_flax.linear import (
    completion,
    diagonal_network,
    logistic,
    matrix_factorization,
    references,
)
from natgrad_flax.linear.deep_linear_optimizer import deep_linear_descent
from natgrad_flax.linear.descent import Descent, descend
from natgrad_flax.linear.inverse_moments import (
    DirectInverse,
    InverseMoment,
    MovingInverse,
    RandomisedSVD,
)
from natgrad_flax.linear.online import online_natural_gradient_descent

__all__ = [
    "Descent",
    "DirectInverse",
    "InverseMoment",
    "MovingInverse",
    "RandomisedSVD",
    "completion",
    "deep_linear_descent",
    "descend",
    "diagonal_network",
    "logistic",
    "matrix_factorization",
    "online_natural_gradient_descent",
    "references",
]
