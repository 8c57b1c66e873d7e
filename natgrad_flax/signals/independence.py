"""Whether the outputs of a sample depend on that sample alone, by trying it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.core import jaxpr_as_fun

from natgrad_flax.arguments.arrays import batch_size, is_concrete
from natgrad_flax.models import NETWORKS
from natgrad_flax.signals.recording import outputs_of
from natgrad_flax.signals.usage import coarsest_dtype

_KEPT = 64
_checked: dict[Any, None] = {}
"""Models and shapes that were found to be in order, the latest last."""


def check_samples_alone(model: nnx.Module, x: Any) -> None:
    """Refuses a model that makes of a batch something else than of its samples one by one.

    Both are run once for a model and the shapes of a batch, at the first batch whose values are
    known; parameters that are all zero are given others, behind which a coupling would hide. The
    networks of ``natgrad_flax.models``, a model that is traced, a batch that lies with several
    processes, and one of a single sample pass.

    Args:
      model: the model, all else about it checked.
      x: inputs, an array (N, ...) or a tree of them.

    Raises:
      ValueError: they differ by more than rounding does, 3 sqrt(eps) of the outputs of a sample,
        eps that of the coarsest dtype that the model computes in.
    """
    if type(model) in NETWORKS or batch_size(x) == 1:
        return
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    leaves, tree = jax.tree.flatten((graphdef, params, rest, x))
    if not all(is_concrete(a) and getattr(a, "is_fully_addressable", True) for a in leaves):
        return
    key = (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if key in _checked:
        return
    with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
        difference, tolerance = map(float, _difference(graphdef, params, rest, x))
    if difference > tolerance:
        size = f"differ by {difference:.2g} of their size"
        raise ValueError(
            f"the outputs of a sample depend on the other samples of its batch: those that "
            f"{type(model).__name__} makes of this batch and of its samples one by one "
            f"{size if difference < float('inf') else 'differ, the latter are NaN'} (rounding "
            f"explains {tolerance:.1g}), so no sample has a Jacobian, and no Fisher, of its own. "
            "Let nothing in the model count or mix samples, or pass check_samples=False for the "
            "natural gradient of the samples one by one"
        )
    _checked[key] = None
    if len(_checked) > _KEPT:
        del _checked[next(iter(_checked))]


# it runs once: compiling is what costs
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _difference(graphdef: Any, params: Any, rest: Any, x: Any) -> tuple[Array, Array]:
    """The largest difference over the samples, and the one that rounding explains."""
    params = jax.tree.map(_some, params)

    def run(x: Any) -> Array:
        return outputs_of(nnx.merge(graphdef, params, rest, copy=True), x)

    program = jax.make_jaxpr(run)(x)
    (together,) = jaxpr_as_fun(program)(*jax.tree.leaves(x))
    alone = jax.vmap(lambda sample: run(jax.tree.map(lambda leaf: leaf[None], sample))[0])(x)
    together, alone = map(_at_least_single, (together, alone))
    sizes, others = jnp.linalg.norm(together, axis=1), jnp.linalg.norm(alone, axis=1)
    apart = jnp.linalg.norm(together - alone, axis=1)
    scale = jnp.maximum(sizes, jnp.mean(sizes))
    relative = jnp.where(apart > 0, apart / jnp.where(scale > 0, scale, 1), 0)
    # NaN on both sides says nothing about samples
    unlike = jnp.isfinite(sizes) & ~jnp.isfinite(others)
    found = jnp.where(unlike, jnp.inf, jnp.where(jnp.isfinite(relative), relative, 0))
    tolerance = 3 * jnp.finfo(coarsest_dtype(program.jaxpr)).eps ** 0.5
    return jnp.max(found), jnp.asarray(tolerance)


def _at_least_single(array: Array) -> Array:
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)


def _some(leaf: Array) -> Array:
    """A parameter, or small numbers in place of zeros alone."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    wave = 0.1 * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).astype(leaf.dtype)
    return jnp.where(jnp.any(leaf != 0), leaf, wave.reshape(leaf.shape))
