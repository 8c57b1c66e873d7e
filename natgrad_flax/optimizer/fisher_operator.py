"""A Fisher information as a linear operator on trees of parameters."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.flatten_util import ravel_pytree

from natgrad_flax.arguments.arrays import check_real, is_concrete, own_promotion
from natgrad_flax.arguments.memory import check_fits
from natgrad_flax.damping import RelativeDamping, is_zero
from natgrad_flax.linalg.dense import full_products, rank_cutoff
from natgrad_flax.optimizer.checks import (
    check_model_inputs,
    check_one_damping,
)
from natgrad_flax.optimizer.gradient import Damping, resolve_damping, static_damping
from natgrad_flax.optimizer.preflight import check_damping_on_batch
from natgrad_flax.optimizer.trees import as_state, by_path
from natgrad_flax.signals.base import LayerUpdate, layer_updates, named_updates, ravel, unravel
from natgrad_flax.signals.capture import jacobian_signals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import check_key
from natgrad_flax.signals.gradient import ParameterGradient
from natgrad_flax.signals.model import dotted
from natgrad_flax.structures import Structure

if TYPE_CHECKING:
    import lineax  # type: ignore[import-untyped]
    from scipy.sparse.linalg import LinearOperator


class Conditioning(NamedTuple):
    """How well a system with F + rho can be solved.

    Attributes:
      rank: eigenvalues of F that are more than the rounding of the largest.
      condition: largest over smallest eigenvalue of F + rho; infinite where it is singular.
      pseudo_inverse: whether ``solve`` takes the pseudo-inverse.
    """

    rank: int
    condition: float
    pseudo_inverse: bool


class FisherOperator:
    """A Fisher information F that is known by its products and solves; made by ``ng.fisher``.

    A damping rho is added to F, and the number 0 stands for the pseudo-inverse; ``ng.KFAC`` adds it
    to both factors, ``ng.QuasiDiagonal`` to the matrix whose entries it keeps. Vectors are trees
    like ``nnx.state(model, wrt)``; raveled, P numbers in the order of
    ``jax.flatten_util.ravel_pytree``.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> F = ng.fisher(model, x, structure=ng.Exact(), loss=ng.MeanSquaredError())
      >>> F
      FisherOperator(Exact(space='auto'), N=4, P=40)
      >>> v = nnx.state(model, nnx.Param)
      >>> u = F.solve(v, damping=0.1)
      >>> bool(jnp.isclose(F.quadratic_form(u) + 0.1 * F.inner(u, u), F.inner(u, v)))
      True
      >>> F.to_dense().shape, F.conditioning().rank
      ((40, 40), 4)
    """

    def __init__(self, structure: Structure, signals: Signals, params: Any, wrt: Any) -> None:
        self.structure = structure
        self._wrt = wrt
        self._signals = signals
        self._params = params

    def __repr__(self) -> str:
        n, p = self._signals.num_samples, self.num_params
        return f"FisherOperator({self.structure!r}, N={n}, P={p})"

    @property
    def num_params(self) -> int:
        """P."""
        return self._signals.num_params

    @property
    def dtype(self) -> Any:
        """Of the products and solves."""
        return self._signals.outputs.dtype

    def matvec(self, vector: Any) -> Any:
        """F v.

        Raises:
          ValueError: v is no tree of these parameters.
        """
        return self._tree(self._run("matvec", self._layers(vector)))

    def __matmul__(self, vector: Any) -> Any:
        return self.matvec(vector)

    def solve(self, gradient: Any, damping: Damping = 0.0) -> Any:
        """(F + rho)^{-1} g, for any g.

        Raises:
          ValueError: g is no tree of these parameters; a damping that is negative or not finite.
        """
        right = ParameterGradient(self._layers(gradient))
        return self._tree(self._run("solve", right, damping=damping))

    def sample(self, key: Array, damping: Damping = 0.0) -> Any:
        """A draw from N(0, F + rho).

        Raises:
          ValueError: F is not positive semi-definite (layer-wise structures with such a Sigma).
        """
        check_key("mc", key)
        return self._tree(self._definite(self._run("sample", key, damping=damping)))

    def sample_inverse(self, key: Array, damping: Damping) -> Any:
        """A draw from N(0, (F + rho)^{-1}), as Laplace posteriors ask for.

        Raises:
          ValueError: as ``sample``.
        """
        check_key("mc", key)
        return self._tree(self._definite(self._run("sample_inverse", key, damping=damping)))

    def inner(self, left: Any, right: Any) -> Array:
        """<u, v>, shape (): the plain inner product of two vectors."""
        pairs = zip(self._layers(left), self._layers(right), strict=True)
        return sum((jnp.vdot(ravel((a,)), ravel((b,))) for a, b in pairs), start=jnp.zeros(()))

    def quadratic_form(self, vector: Any) -> Array:
        """v^T F v, shape ()."""
        return self.inner(vector, self.matvec(vector))

    def diagonal(self) -> Any:
        """F_ii, a tree like the parameters."""
        return self._tree(self._run("diagonal"))

    def trace(self) -> Array:
        """The sum of the diagonal, shape ()."""
        return self._run("trace")

    def eigenvalues(self) -> Array:
        """Eigenvalues of F in ascending order; those left out, up to P of them, are zero."""
        return jnp.sort(self._run("eigenvalues"))

    def logdet(self, damping: Damping) -> Array:
        """log det(F + rho), shape ().

        Raises:
          ValueError: F + rho is not positive definite.
        """
        value = self._run("logdet", damping=damping)
        if is_concrete(value) and not jnp.isfinite(value):
            raise ValueError(
                f"the log-determinant of {self!r} with damping {damping!r} is not finite: the "
                "matrix is singular or indefinite; pass a larger damping"
            )
        return value

    def cross(self, model: nnx.Module, x: Any, damping: Damping = 0.0) -> Array:
        """J(x') (F + rho)^{-1} J_s^T / N between test inputs and the rows J_s of F.

        It carries a step along the rows to the outputs at x': the coefficient matrix Theta-bar of
        Karakida & Osawa (2020), Eq. 11.

        Args:
          model: the model, for its Jacobian at x'.
          x: test inputs (N', ...).
          damping: rho.

        Returns:
          Shape (N' C, N S) for S rows a sample.
        """
        test = jacobian_signals(model, check_model_inputs(model, x), self._wrt)
        return self._run("coefficient", test, damping=damping)

    def conditioning(self, damping: Damping = 0.0) -> Conditioning:
        """What ``solve`` is up against: rank, condition, and whether it is the pseudo-inverse's."""
        values = np.asarray(self._run("eigenvalues"), np.float64)
        low, high = (float(v) for v in self._run("extremes", damping=damping))
        cutoff = rank_cutoff(len(values), self.dtype) * np.abs(values).max(initial=0.0)
        rank = int((np.abs(values) > cutoff).sum())
        zero = static_damping(damping) == 0.0
        singular = zero and rank < self.num_params
        condition = np.inf if singular or low <= 0 else high / low
        return Conditioning(rank, float(condition), zero)

    def to_dense(self, damping: Damping = 0.0) -> Array:
        """F + rho, shape (P, P), parameters raveled.

        Raises:
          ValueError: it does not fit into memory.
        """
        check_fits(self.num_params, jnp.dtype(self.dtype).itemsize, f"the matrix of {self!r}", 3.0)
        dense = self._run("to_dense", damping=damping)
        return dense[self._order][:, self._order]

    def to_scipy(self, damping: Damping | None = None) -> LinearOperator:
        """v -> F v on raveled parameters, or (F + rho)^{-1} v where there is a damping."""
        from scipy.sparse.linalg import LinearOperator

        def times(vector: Any) -> Any:
            return np.asarray(self._times(jnp.asarray(vector, self.dtype).reshape(-1), damping))

        shape = (self.num_params, self.num_params)
        return LinearOperator(shape, matvec=times, rmatvec=times, dtype=np.dtype(self.dtype))

    def to_lineax(self, damping: Damping | None = None) -> lineax.FunctionLinearOperator:
        """As ``to_scipy``, an operator of lineax with its tags."""
        import lineax

        sigma = self.structure.coupling(len(self._signals.layers))
        definite = sigma is None or np.linalg.eigvalsh(sigma)[0] >= 0
        tag = lineax.positive_semidefinite_tag if definite else lineax.symmetric_tag
        shape = jax.ShapeDtypeStruct((self.num_params,), self.dtype)
        return lineax.FunctionLinearOperator(partial(self._times, damping=damping), shape, tag)

    def _times(self, vector: Array, damping: Damping | None) -> Array:
        """F v or (F + rho)^{-1} v for a raveled v, (P,)."""
        layers = unravel(self._signals.layers, vector[np.argsort(self._order)])
        if damping is None:
            found = self._run("matvec", layers)
        else:
            found = self._run("solve", ParameterGradient(layers), damping=damping)
        return ravel(found)[self._order]

    @cached_property
    def _order(self) -> np.ndarray:
        """Where the entries of a raveled tree stand among those of the layers."""
        with jax.ensure_compile_time_eval():
            places = unravel(self._signals.layers, jnp.arange(self.num_params))
            return np.asarray(ravel_pytree(self._tree(places, cast=False))[0])

    def _definite(self, found: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        leaves = [leaf for leaf in jax.tree.leaves(found) if is_concrete(leaf)]
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
            raise ValueError(f"{self!r} is not positive semi-definite, so it is no covariance")
        return found

    @own_promotion()
    def _run(self, name: str, *arguments: Any, damping: Damping | None = None) -> Any:
        """A method of the operator, with a damping or without."""
        given, static = None, None
        if damping is not None:
            check_one_damping(damping)
            check_damping_on_batch(self.structure, self._signals, damping, inside=False)
            if is_zero(damping):
                self.structure.check(self._signals, damping)
            static = static_damping(damping)
            given = None if static is not None else jnp.asarray(damping, self.dtype)
        return _run(
            self._signals,
            given,
            *arguments,
            structure=self.structure,
            name=name,
            static=static,
            damped=damping is not None,
        )

    def _layers(self, vector: Any) -> tuple[LayerUpdate, ...]:
        """A tree of parameters as one update a layer."""
        wanted = {path: jnp.shape(leaf) for path, leaf in by_path(self._params).items()}
        found = by_path(vector)
        for path in {**wanted, **found}:
            have, want = (jnp.shape(found[path]) if path in found else None), wanted.get(path)
            if have != want:
                raise ValueError(
                    f"a vector of {self!r} is a tree like nnx.state(model, wrt): at {dotted(path)} "
                    f"it has {_said(have)}, and the parameters have {_said(want)}"
                )
            check_real(found[path], f"the vector at {dotted(path)}")
        arrays = {path: jnp.asarray(leaf).astype(self.dtype) for path, leaf in found.items()}
        return layer_updates(self._signals.layers, arrays)

    def _tree(self, updates: tuple[LayerUpdate, ...], *, cast: bool = True) -> Any:
        """Updates of layers in the tree of the parameters, with their dtypes unless told."""
        params = self._params
        if not cast:
            dtype = jax.tree.leaves(updates)[0].dtype
            params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
        return as_state(params, named_updates(self._signals.layers, updates))


def _said(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"


@partial(jax.jit, static_argnames=("structure", "name", "static", "damped"))
def _run(
    signals: Signals,
    damping: Array | None,
    *arguments: Any,
    structure: Structure,
    name: str,
    static: float | RelativeDamping | None,
    damped: bool,
) -> Any:
    """A method of the operator, or ``Structure.coefficient``."""
    with full_products():
        if not damped:
            return getattr(structure.operator(signals), name)(*arguments)
        chosen = static if damping is None else damping
        assert chosen is not None
        rho = resolve_damping(structure, signals, chosen)
        if name == "coefficient":
            return structure.coefficient(arguments[0], signals, rho)
        return getattr(structure.operator(signals), name)(*arguments, rho)
