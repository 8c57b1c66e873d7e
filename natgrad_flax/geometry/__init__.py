"""Natural gradients of overparametrised models, and what of them depends on the parametrisation.

A parametrisation phi maps parameters xi (d,) to points z (D,) of a space with a Riemannian metric
g. Its coordinate vectors are the columns of J = d phi, its Gram matrix is G = J^T g J, and the
natural parameter gradient of an objective L(z) is G^- J^T dL (van Oostrum, Mueller & Ay 2022).
"""

from natgrad_flax.geometry.invariance import (
    finite_step_gap,
    model_violation,
    parameter_violation,
    parametrisation_dependence,
)
from natgrad_flax.geometry.projection import (
    Map,
    Metric,
    Objective,
    Representation,
    ambient_gradient,
    any_generalised_inverse,
    coordinate_rank,
    euclidean,
    fisher_rao_gaussian,
    gram_matrix,
    is_proper,
    natural_parameter_gradient,
    push_forward,
    span_projection,
    wasserstein_gaussian,
)

__all__ = [
    "Map",
    "Metric",
    "Objective",
    "Representation",
    "ambient_gradient",
    "any_generalised_inverse",
    "coordinate_rank",
    "euclidean",
    "finite_step_gap",
    "fisher_rao_gaussian",
    "gram_matrix",
    "is_proper",
    "model_violation",
    "natural_parameter_gradient",
    "parameter_violation",
    "parametrisation_dependence",
    "push_forward",
    "span_projection",
    "wasserstein_gaussian",
]
