"""Networks in NTK parametrisation, and some of stock Flax layers."""

from natgrad_flax.models.autoencoder import Autoencoder
from natgrad_flax.models.convnet import ConvNet
from natgrad_flax.models.language import LanguageModel
from natgrad_flax.models.mlp import MLP
from natgrad_flax.models.residual import ResidualNet
from natgrad_flax.models.transformer import VisionTransformer

__all__ = ["MLP", "Autoencoder", "ConvNet", "LanguageModel", "ResidualNet", "VisionTransformer"]

NETWORKS = (MLP, Autoencoder, ConvNet, ResidualNet, VisionTransformer)
"""Networks of arrays of one shape; each says what it takes and returns."""
