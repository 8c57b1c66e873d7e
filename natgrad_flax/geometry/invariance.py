"""What of a representation depends on the parametrisation (van Oostrum et al. 2022, Secs. 3, 4)."""

# ruff: noqa: F722, F821, UP037 - shapes in signatures, which the tests hold examples to
from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.geometry.projection import Map, Representation, coordinate_rank, push_forward

if TYPE_CHECKING:
    from jaxtyping import Float


def parametrisation_dependence(
    represent: Representation,
    phi: Map,
    xi: Float[Array, "d"],
    psi: Map,
    theta: Float[Array, "c"],
) -> Float[Array, ""]:
    """|d psi O(psi, theta) - d phi O(phi, xi)|: zero for all pairs only if O is (Definition 4).

    Args:
      represent: O, such as ``partial(natural_parameter_gradient, objective=...)`` of (phi, xi=...).
      phi: a parametrisation.
      xi: its parameters (d,).
      psi: another parametrisation of the model.
      theta: its parameters (c,), with psi(theta) = phi(xi).

    Raises:
      ValueError: the two points differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> objective = lambda z: jnp.sum(z)
      >>> def natural(phi, xi):
      ...     return geometry.natural_parameter_gradient(phi, objective, xi)
      >>> plain = lambda phi, xi: jax.grad(lambda xi: objective(phi(xi)))(xi)
      >>> # both at z = 1
      >>> pair = (jnp.exp, jnp.zeros(1), lambda theta: theta**2, jnp.ones(1))
      >>> dependence = geometry.parametrisation_dependence
      >>> [round(float(dependence(o, *pair)), 3) for o in (natural, plain)]
      [0.0, 3.0]
    """
    here, there = phi(xi), psi(theta)
    _check_same_point(here, there)
    return jnp.linalg.norm(
        push_forward(psi, theta, represent(psi, theta)) - push_forward(phi, xi, represent(phi, xi))
    )


def model_violation(
    represent: Representation, phi: Map, change: Map, theta: Float[Array, "d"]
) -> Float[Array, ""]:
    """|d psi O(psi, theta) - d phi O(phi, f(theta))| for psi = phi o f (Definition 5).

    Zero for the natural parameter gradient with every generalised inverse (Theorem 2).

    Args:
      represent: O.
      phi: the parametrisation.
      change: f, a diffeomorphism of parameters.
      theta: parameters (d,) of psi.

    Raises:
      ValueError: f has a singular derivative at theta.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> objective, doubled = (lambda z: 3 * z[0]), (lambda xi: xi[:1] + xi[1:])
      >>> def natural(phi, xi):
      ...     return geometry.natural_parameter_gradient(phi, objective, xi)
      >>> stretch = lambda theta: theta * jnp.array([1.0, 5.0])
      >>> found = geometry.model_violation(natural, doubled, stretch, jnp.ones(2))
      >>> round(float(found), 3)
      0.0
    """
    _check_diffeomorphism(change, theta)
    return parametrisation_dependence(
        represent, phi, change(theta), lambda here: phi(change(here)), theta
    )


def parameter_violation(
    represent: Representation, phi: Map, change: Map, theta: Float[Array, "d"]
) -> Float[Array, ""]:
    """|df O(psi, theta) - O(phi, f(theta))| for psi = phi o f (Definition 6).

    Zero for the natural parameter gradient where phi is an immersion; in overparametrised models it
    is not, and the difference lies in the kernel of d phi (Sec. 3.2). The arguments and errors are
    those of ``model_violation``.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> # no immersion
      >>> objective, doubled = (lambda z: 3 * z[0]), (lambda xi: xi[:1] + xi[1:])
      >>> def natural(phi, xi):
      ...     return geometry.natural_parameter_gradient(phi, objective, xi)
      >>> stretch = lambda theta: theta * jnp.array([1.0, 5.0])
      >>> bool(geometry.parameter_violation(natural, doubled, stretch, jnp.ones(2)) > 1)
      True
    """
    _check_diffeomorphism(change, theta)
    moved = push_forward(change, theta, represent(lambda here: phi(change(here)), theta))
    return jnp.linalg.norm(moved - represent(phi, change(theta)))


def finite_step_gap(
    represent: Representation, phi: Map, change: Map, theta: Float[Array, "d"], rate: float
) -> Float[Array, ""]:
    """How far apart one step of size ``rate`` ends on the model with phi and with phi o f.

    Of the order rate^2 for a representation that is invariant on the model (Sec. 4): only the flow
    does not see f. The other arguments and errors are those of ``model_violation``.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> objective, identity = (lambda z: jnp.sum(z)), (lambda xi: xi)
      >>> def natural(phi, xi):
      ...     return geometry.natural_parameter_gradient(phi, objective, xi)
      >>> arguments = (natural, identity, jnp.exp, jnp.zeros(1))
      >>> gap = lambda rate: geometry.finite_step_gap(*arguments, rate)
      >>> 3.5 < float(gap(0.2) / gap(0.1)) < 4.5  # of the order rate^2
      True
    """
    _check_diffeomorphism(change, theta)
    xi = change(theta)
    stepped = change(theta - rate * represent(lambda here: phi(change(here)), theta))
    return jnp.linalg.norm(phi(stepped) - phi(xi - rate * represent(phi, xi)))


def _check_same_point(here: Array, there: Array) -> None:
    if isinstance(here, jax.core.Tracer) or isinstance(there, jax.core.Tracer):
        return
    scale = 1 + float(jnp.abs(here).max())
    if here.shape != there.shape or float(jnp.abs(here - there).max()) > 1e-5 * scale:
        raise ValueError(
            f"the two parametrisations are at different points, {np.asarray(here)} and "
            f"{np.asarray(there)}: vectors there cannot be compared"
        )


def _check_diffeomorphism(change: Map, theta: Array) -> None:
    jacobian = jax.jacfwd(change)(theta)
    if isinstance(jacobian, jax.core.Tracer):
        return
    if jacobian.shape[0] != jacobian.shape[1] or coordinate_rank(change, theta) < len(theta):
        raise ValueError(
            f"the change of parameters has a derivative of shape {jacobian.shape} and rank "
            f"{coordinate_rank(change, theta)} here: it is no diffeomorphism"
        )
