"""Kernel theory of natural-gradient training: empirical kernels, coefficient matrices, dynamics.

Stands on ``natgrad_flax``. All theory is computed in float64, whatever the precision of the model.
"""

from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.dynamics import LinearisedDynamics, predict_dynamics
from ntk_analysis.empirical import empirical_layer_kernels
from ntk_analysis.gradient_descent import GradientDescent

__all__ = [
    "GradientDescent",
    "LinearisedDynamics",
    "coefficient_matrix",
    "empirical_layer_kernels",
    "predict_dynamics",
]
