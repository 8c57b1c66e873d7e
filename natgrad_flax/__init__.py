"""Natural-gradient descent for Flax models with every Fisher approximation of the literature.

The one idea: a forward pass and a batched backward pass give the per-layer signals (a, D), and
every Fisher structure is a small formula over them. No Jacobian is ever built.
"""

from importlib.metadata import PackageNotFoundError, version

from natgrad_flax.costs.describe import describe
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping, SmallDampingWarning
from natgrad_flax.losses import (
    GaussianNegativeLogLikelihood,
    GaussNewton,
    Heads,
    Huber,
    Likelihood,
    Loss,
    MeanSquaredError,
    Poisson,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
)
from natgrad_flax.models import (
    MLP,
    Autoencoder,
    ConvNet,
    LanguageModel,
    ResidualNet,
    VisionTransformer,
)
from natgrad_flax.models.layers import Conv, Dense
from natgrad_flax.models.wrapped import from_function, from_linen
from natgrad_flax.optimizer.averages import MovingAverage
from natgrad_flax.optimizer.descent import natural_gradient_descent
from natgrad_flax.optimizer.fisher_operator import FisherOperator
from natgrad_flax.optimizer.gradient import natural_gradient
from natgrad_flax.optimizer.information import fisher
from natgrad_flax.optimizer.learning_rate import optimal_learning_rate
from natgrad_flax.optimizer.momentum import SPRING
from natgrad_flax.optimizer.quadratic_model import QuadraticModel
from natgrad_flax.signals.capture import jacobian_signals
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.fisher import fisher_signals
from natgrad_flax.signals.gradient import Residual
from natgrad_flax.structures import (
    EKFAC,
    KFAC,
    KFOC,
    BlockDiagonal,
    BlockTriDiagonal,
    Diagonal,
    Exact,
    Foof,
    IsotropyWarning,
    LayerWise,
    LowRankUnits,
    MiniBlock,
    Nystroem,
    QuasiDiagonal,
    Shampoo,
    SingularCouplingWarning,
    Structure,
    UnitBlocks,
    UnitWise,
)
from natgrad_flax.transformations.shampoo import shampoo
from natgrad_flax.transformations.soap import soap
from natgrad_flax.transformations.width import scale_by_width
from natgrad_flax.xla.compiler import avoid_faulty_fusions
from natgrad_flax.xla.convolution import conv_general_dilated

__all__ = [
    "EKFAC",
    "KFAC",
    "KFOC",
    "MLP",
    "SPRING",
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
    "Foof",
    "GaussNewton",
    "GaussianNegativeLogLikelihood",
    "Heads",
    "Huber",
    "IsotropyWarning",
    "LanguageModel",
    "LayerWise",
    "LevenbergMarquardt",
    "Likelihood",
    "Loss",
    "LowRankUnits",
    "MeanSquaredError",
    "MiniBlock",
    "MovingAverage",
    "Nystroem",
    "Poisson",
    "QuadraticModel",
    "QuasiDiagonal",
    "RelativeDamping",
    "Residual",
    "ResidualNet",
    "Shampoo",
    "SigmoidCrossEntropy",
    "Signals",
    "SingularCouplingWarning",
    "SmallDampingWarning",
    "SoftmaxCrossEntropy",
    "Structure",
    "UnitBlocks",
    "UnitWise",
    "VisionTransformer",
    "conv_general_dilated",
    "describe",
    "fisher",
    "fisher_signals",
    "from_function",
    "from_linen",
    "jacobian_signals",
    "natural_gradient",
    "natural_gradient_descent",
    "optimal_learning_rate",
    "scale_by_width",
    "shampoo",
    "soap",
]

try:
    __version__ = version("natgrad")
except PackageNotFoundError:  # sources that are on the path and were never installed
    __version__ = "unknown"

avoid_faulty_fusions()
