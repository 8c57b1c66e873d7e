"""Networks in NTK parametrisation, and two small ones of stock Flax layers."""

from natgrad_flax.models.autoencoder import Autoencoder
from natgrad_flax.models.convnet import ConvNet
from natgrad_flax.models.mlp import MLP
from natgrad_flax.models.residual import ResidualNet
from natgrad_flax.models.transformer import VisionTransformer

__all__ = ["MLP", "Autoencoder", "ConvNet", "ResidualNet", "VisionTransformer"]

NETWORKS = (MLP, Autoencoder, ConvNet, ResidualNet, VisionTransformer)
"""All networks: each says what it takes and returns, and treats every sample alone."""
