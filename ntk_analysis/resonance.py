"""Dampings at which a structure with an indefinite coupling Sigma breaks down.

The damped system of a layer-wise structure is s I + (Sigma (x) I) blockdiag(K_1, ..., K_L) with
s = N rho (science: 3.3). Where Sigma has a negative eigenvalue, as the block tri-diagonal one has
for every L >= 3, the second term has negative eigenvalues too, and the system is singular wherever
-s equals one of them. Near such a resonance Theta-bar has eigenvalues of any size and sign, and
training diverges; the undamped structure and a large damping are not concerned. This is why the
curves of Karakida & Osawa (2020), Figure 1(b), do not approach the undamped one monotonically.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax import RelativeDamping, Signals, Structure
from natgrad_flax.arguments.memory import check_fits
from natgrad_flax.arguments.scalars import as_values, check_learning_rate
from natgrad_flax.optimizer.checks import check_damping, check_structure
from natgrad_flax.optimizer.gradient import resolve_damping
from ntk_analysis.coefficient import Damping, check_coefficient_fits
from ntk_analysis.empirical import Matrix, initial_signals

LARGEST_CHECK = 3000
"""The largest L N C for which ``predict_dynamics`` looks for resonances."""


class ResonanceWarning(UserWarning):
    """The damping lies among the resonances of an indefinite coupling.

    There the damped structure is singular or nearly so, and steps are large in some directions;
    take one outside of ``resonance_window``.

    Example:
      >>> import warnings, jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> structure = ng.BlockTriDiagonal()
      >>> low, high = na.resonance_window(structure, model, x)
      >>> settings = {"learning_rate": 0.1, "steps": 1, "damping": (low + high) / 2}
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always", na.ResonanceWarning)
      ...     found = na.predict_dynamics(structure, model, x, y, **settings)
      >>> caught[0].category.__name__
      'ResonanceWarning'
    """


def resonances(structure: Structure, model: nnx.Module, x: ArrayLike) -> Matrix:
    """The dampings rho > 0 at which the damped structure is singular, for the mean squared error.

    They are the negative eigenvalues of (Sigma (x) I) blockdiag(K_1, ..., K_L) / N, with the sign
    changed: N C of them for each negative eigenvalue of Sigma where every J_l has full row rank.

    Args:
      structure: any Fisher approximation.
      model: any module built of layers with signals.
      x: training inputs, shape (N, ...).

    Returns:
      Float64, sorted, in the 1/N convention; empty for a positive semi-definite coupling and for
      structures that are not layer-wise.

    Raises:
      ValueError, TypeError: bad inputs, a Sigma for another depth, or a matrix (L N C, L N C) that
        cannot fit in memory.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> # N C for one negative eigenvalue
      >>> na.resonances(ng.BlockTriDiagonal(), model, x).shape
      (4,)
      >>> na.resonances(ng.BlockDiagonal(), model, x).shape
      (0,)
    """
    check_structure(structure)
    return signal_resonances(structure, initial_signals(model, x).train)


def resonance_window(
    structure: Structure, model: nnx.Module, x: ArrayLike
) -> tuple[float, float] | None:
    """Between which dampings a structure can be singular: smallest and largest of ``resonances``.

    None where there are none.

    Args:
      structure: any Fisher approximation.
      model: any module built of layers with signals.
      x: training inputs, shape (N, ...).

    Raises:
      ValueError, TypeError: as for ``resonances``.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> low, high = na.resonance_window(ng.BlockTriDiagonal(), model, x)
      >>> 0 < low < high
      True
      >>> na.resonance_window(ng.Exact(), model, x) is None
      True
    """
    return window_of(resonances(structure, model, x))


def spectral_radius(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    learning_rate: float,
    dampings: Sequence[float] | Matrix,
) -> Matrix:
    """The spectral radius of I - eta Theta-bar_rho(x, x) for each damping rho.

    The linearised network converges where it is below 1 (Karakida & Osawa 2020, Section 4.2); at
    rho = 0 an isotropic structure has |1 - eta alpha|.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()`` with dampings 0.
      model: any module built of layers with signals.
      x: training inputs, shape (N, ...).
      learning_rate: eta > 0.
      dampings: values of rho, at least 0, in the 1/N convention.

    Returns:
      Float64, one value a damping.

    Raises:
      ValueError, TypeError: bad arguments, or a structure that does not suit the network.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> radii = na.spectral_radius(
      ...     ng.Exact(), model, x, learning_rate=0.7, dampings=[0.0, 1e-2]
      ... )
      >>> print(radii.round(3)[0], radii[1] > radii[0])  # |1 - eta alpha| undamped
      0.3 True
    """
    check_structure(structure)
    learning_rate = check_learning_rate(learning_rate)
    values = as_values("dampings", dampings)
    check_damping(values)
    return signal_radii(structure, initial_signals(model, x).train, learning_rate, values)


def signal_resonances(structure: Structure, signals: Signals) -> Matrix:
    """``resonances`` from float64 signals of the training samples, of any output directions."""
    depth, n = len(signals.layers), signals.size
    sigma = structure.coupling(depth)
    if sigma is None:
        return np.empty(0)
    signs = np.linalg.eigvalsh(sigma)
    if signs[0] >= -1e-12 * np.abs(signs).max():
        return np.empty(0)
    check_fits(depth * n, 8, "the matrix of the resonances", 3.0)
    with jax.enable_x64(True):
        grams = [np.asarray(layer.gram()) for layer in signals.layers]
    # K_l = C_l C_l^T makes the product similar to a symmetric matrix, up to zero eigenvalues
    factors = [_square_root(gram) for gram in grams]
    matrix = np.block(
        [
            [weight * (left.T @ right) for weight, right in zip(row, factors, strict=True)]
            for row, left in zip(sigma, factors, strict=True)
        ]
    )
    values = np.linalg.eigvalsh(matrix / signals.num_samples)
    cutoff = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    found: Matrix = -values[values < -cutoff][::-1]
    return found


def signal_radii(
    structure: Structure, signals: Signals, learning_rate: float, dampings: Matrix
) -> Matrix:
    """``spectral_radius`` from float64 signals of the plain outputs on the training samples."""
    check_coefficient_fits(structure, signals)
    for value in np.unique(np.sign(dampings)):
        structure.check(signals, float(value))
    with jax.enable_x64(True):
        # one program for every positive damping; zero is a case of its own in every structure
        damped = jax.jit(lambda here, rho: structure.coefficient(here, here, rho))
        matrices = (
            damped(signals, rho) if rho else structure.coefficient(signals, signals, 0.0)
            for rho in map(float, dampings)
        )
        return np.array([iteration_radius(np.asarray(m), learning_rate) for m in matrices])


def iteration_radius(coefficient_train: Matrix, learning_rate: float) -> float:
    """The spectral radius of I - eta Theta-bar(x, x), infinite for a matrix that is not finite.

    Args:
      coefficient_train: Theta-bar(x, x), shape (N C, N C); symmetric up to rounding, as every
        metric G is.
      learning_rate: eta.
    """
    if not np.isfinite(coefficient_train).all():
        return float("inf")
    values = np.linalg.eigvalsh((coefficient_train + coefficient_train.T) / 2)
    return float(np.abs(1 - learning_rate * values).max())


def window_of(values: Matrix) -> tuple[float, float] | None:
    """The smallest and the largest of sorted resonances, None where there are none."""
    return (float(values[0]), float(values[-1])) if len(values) else None


def warn_of_resonance(structure: Structure, signals: Signals, damping: Damping) -> None:
    """Warns where a positive damping lies among the resonances of a structure.

    Does nothing for L N C above ``LARGEST_CHECK``, where looking would take long.

    Args:
      structure: any Fisher approximation.
      signals: float64 signals of the training samples.
      damping: rho in the 1/N convention, or an ``ng.RelativeDamping``.
    """
    if len(signals.layers) * signals.size > LARGEST_CHECK:
        return
    if not isinstance(damping, RelativeDamping) and damping == 0:
        return
    window = window_of(signal_resonances(structure, signals))
    if window is None:
        return
    with jax.enable_x64(True):
        rho = float(resolve_damping(structure, signals, damping))
    if window[0] <= rho <= window[1]:
        warnings.warn(
            f"the damping {rho:.3g} of {structure.name} lies among its resonances, "
            f"{window[0]:.3g} to {window[1]:.3g}: Sigma is indefinite, so the damped matrix is "
            "nearly singular there and training can diverge. Use damping=0, one well below or "
            "above these values, or look at na.spectral_radius",
            ResonanceWarning,
            stacklevel=3,
        )


def _square_root(gram: Matrix) -> Matrix:
    """C with K = C C^T for a positive semi-definite K of any rank."""
    values, vectors = np.linalg.eigh(gram)
    root: Matrix = vectors * np.sqrt(np.maximum(values, 0))
    return root
