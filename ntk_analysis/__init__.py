"""Kernel theory of natural-gradient training, at finite and at infinite width.

Stands on ``natgrad_flax``. All theory is computed in float64, whatever the precision of the model.
"""

import ntk_analysis._requirements  # noqa: F401 - before what needs them
from natgrad_flax.arguments.renamed import renamed_names
from ntk_analysis.analytic import AnalyticKernels, analytic_kernels, analytic_layer_kernels
from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.coordinates import CoordinateCheck, coordinate_check
from ntk_analysis.cost import StructureCost, structure_cost
from ntk_analysis.displacement import parameter_displacement
from ntk_analysis.drift import KernelDrift, kernel_drift
from ntk_analysis.dynamics import LinearisedDynamics, predict_dynamics
from ntk_analysis.empirical import empirical_layer_kernels
from ntk_analysis.flow import LinearisedFlow, predict_flow
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.infinite_width import InfiniteWidthLimit, infinite_width_limit
from ntk_analysis.isotropy import IsotropyReport, isotropy
from ntk_analysis.prediction import Prediction, predict
from ntk_analysis.resonance import ResonanceWarning, resonance_window, resonances, spectral_radius
from ntk_analysis.sweep import SweepSettings, isotropy_sweep

__all__ = [
    "AnalyticKernels",
    "CoordinateCheck",
    "GradientDescent",
    "InfiniteWidthLimit",
    "IsotropyReport",
    "KernelDrift",
    "LinearisedDynamics",
    "LinearisedFlow",
    "Prediction",
    "ResonanceWarning",
    "StructureCost",
    "SweepSettings",
    "analytic_kernels",
    "analytic_layer_kernels",
    "coefficient_matrix",
    "coordinate_check",
    "empirical_layer_kernels",
    "infinite_width_limit",
    "isotropy",
    "isotropy_sweep",
    "kernel_drift",
    "parameter_displacement",
    "predict",
    "predict_dynamics",
    "predict_flow",
    "resonance_window",
    "resonances",
    "spectral_radius",
    "structure_cost",
]

_EARLIER = {
    "InfiniteWidthTwin": "InfiniteWidthLimit",
    "infinite_width_twin": "infinite_width_limit",
}
__getattr__ = renamed_names("ntk_analysis", _EARLIER, globals())
