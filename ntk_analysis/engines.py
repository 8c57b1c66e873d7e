"""What works out how activations act on covariances: our formulas, or neural-tangents."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array

from ntk_analysis._neural_tangents import neural_tangents, stax
from ntk_analysis.activation_kernels import ACTIVATION_KERNELS, Moments

Engine = Literal["auto", "neural-tangents", "natgrad"]

Activate = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]
"""From covariances (n1, n2, ...) and variances (n1, ...) and (n2, ...) of pre-activations to those
behind the activation, with E[phi' phi'] in the second place."""


def chosen_engine(engine: str) -> str:
    """The engine of a name; "auto" is neural-tangents where it is installed, else our own.

    Raises:
      ValueError: an unknown name.
      ImportError: neural-tangents is asked for and not installed.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    installed = find_spec("neural_tangents") is not None
    if engine == "neural-tangents" and not installed:
        raise ImportError(
            "neural-tangents is not installed: pip install 'natgrad[neural-tangents]', or use "
            'engine="natgrad", which gives the same kernels'
        )
    if engine == "auto":
        return "neural-tangents" if installed else "natgrad"
    return engine


@cache
def activation_through(name: str, engine: str) -> Activate:
    """How an activation acts, the same object for the same arguments.

    Args:
      name: of the activation.
      engine: "neural-tangents" or "natgrad".
    """
    if engine == "natgrad":
        return partial(_by_moments, ACTIVATION_KERNELS[name].moments)
    return partial(_by_stax, stax_activation(name)[2])


def _by_moments(
    moments: Moments, covariance: Array, first: Array, second: Array
) -> tuple[Array, Array, Array, Array]:
    value, slope = moments(covariance, first[:, None], second[None])
    return value, slope, moments(first, first, first)[0], moments(second, second, second)[0]


def _by_stax(
    layer: Any, covariance: Array, first: Array, second: Array
) -> tuple[Array, Array, Array, Array]:
    """An incoming tangent kernel of ones comes out as E[phi' phi']."""
    kernel = layer(
        neural_tangents().Kernel(
            nngp=covariance,
            ntk=jnp.ones_like(covariance),
            cov1=first,
            cov2=second,
            x1_is_x2=jnp.zeros((), bool),
            is_gaussian=True,
            is_reversed=False,
            is_input=False,
            diagonal_batch=True,
            diagonal_spatial=True,
            shape1=(*first.shape, 1),
            shape2=(*second.shape, 1),
            batch_axis=0,
            channel_axis=first.ndim,
            mask1=None,
            mask2=None,
        )
    )
    return kernel.nngp, kernel.ntk, kernel.cov1, kernel.cov2


@cache
def stax_activation(name: str) -> tuple[Any, Any, Any]:
    """The layer of an activation in neural-tangents: (init_fn, apply_fn, kernel_fn)."""
    kernel = ACTIVATION_KERNELS[name]
    if kernel.stax:
        layer, *arguments = kernel.stax
        found: tuple[Any, Any, Any] = getattr(stax(), layer)(*arguments)
        return found
    from natgrad_flax.models.activations import ACTIVATIONS

    parts = (lambda *args: kernel.moments(*args)[0], lambda *args: kernel.moments(*args)[1])
    made: tuple[Any, Any, Any] = stax().Elementwise(ACTIVATIONS[name].function, *parts)
    return made
