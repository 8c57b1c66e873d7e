"""Natural-gradient descent for Flax models with every Fisher approximation of the literature.

The one idea: a forward pass and a batched backward pass give the per-layer signals (a, D), and
every Fisher structure is a small formula over them. No Jacobian is ever built.
"""

from natgrad_flax.averages import MovingAverage
from natgrad_flax.capture import jacobian_signals
from natgrad_flax.compiler import avoid_faulty_reductions
from natgrad_flax.convolution import conv_general_dilated
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping, SmallDampingWarning
from natgrad_flax.describe import describe
from natgrad_flax.fisher_kinds import fisher_signals
from natgrad_flax.gradient import natural_gradient
from natgrad_flax.information import FisherOperator, fisher
from natgrad_flax.layers import Conv, Dense
from natgrad_flax.learning_rate import optimal_learning_rate
from natgrad_flax.losses import Loss, MeanSquaredError, SoftmaxCrossEntropy
from natgrad_flax.models import MLP, Autoencoder, ConvNet, ResidualNet, VisionTransformer
from natgrad_flax.operators.gradient import Residual
from natgrad_flax.optimizer import natural_gradient_descent
from natgrad_flax.signals import DenseSignals, Signals
from natgrad_flax.structures import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    BlockTriDiagonal,
    Diagonal,
    Exact,
    IsotropyWarning,
    LayerWise,
    QuasiDiagonal,
    SingularCouplingWarning,
    Structure,
    UnitWise,
)

__all__ = [
    "EKFAC",
    "KFAC",
    "MLP",
    "Autoencoder",
    "BlockDiagonal",
    "BlockTriDiagonal",
    "Conv",
    "ConvNet",
    "Dense",
    "DenseSignals",
    "Diagonal",
    "Exact",
    "FisherOperator",
    "IsotropyWarning",
    "LayerWise",
    "LevenbergMarquardt",
    "Loss",
    "MeanSquaredError",
    "MovingAverage",
    "QuasiDiagonal",
    "RelativeDamping",
    "Residual",
    "ResidualNet",
    "Signals",
    "SingularCouplingWarning",
    "SmallDampingWarning",
    "SoftmaxCrossEntropy",
    "Structure",
    "UnitWise",
    "VisionTransformer",
    "conv_general_dilated",
    "describe",
    "fisher",
    "fisher_signals",
    "jacobian_signals",
    "natural_gradient",
    "natural_gradient_descent",
    "optimal_learning_rate",
]

avoid_faulty_reductions()
