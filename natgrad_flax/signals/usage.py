"""Which inputs of a traced program its outputs depend on, and how precisely it computes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

_CALLS = ("jaxpr", "call_jaxpr")


def used_inputs(
    jaxpr: Any, needed: list[bool] | None = None, *, by_derivative: bool = False
) -> list[bool]:
    """For each input whether an output may depend on it.

    Calls of programs within the program are followed; of loops and branches every input counts as
    used.

    Args:
      jaxpr: of ``jax.make_jaxpr``.
      needed: which outputs count, all of them unless told.
      by_derivative: what stands under ``stop_gradient`` does not count.
    """
    wanted = [True] * len(jaxpr.outvars) if needed is None else needed
    live = {
        v
        for v, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and not isinstance(v, Literal)
    }
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs) or (by_derivative and equation.primitive.name == "stop_gradient"):
            continue
        uses = _used_by(equation, outputs, by_derivative)
        live.update(
            v
            for v, use in zip(equation.invars, uses, strict=True)
            if use and not isinstance(v, Literal)
        )
    return [v in live for v in jaxpr.invars]


def _used_by(equation: Any, outputs: list[bool], by_derivative: bool) -> list[bool]:
    for name in _CALLS:
        inner = equation.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        if inner is None or equation.primitive.name in ("scan", "while"):
            continue
        if len(inner.invars) == len(equation.invars) and len(inner.outvars) == len(outputs):
            return used_inputs(inner, outputs, by_derivative=by_derivative)
    return [True] * len(equation.invars)


def coarsest_dtype(jaxpr: Any) -> Any:
    """The floating dtype of least precision among all that a program computes, float64 at best."""
    found = [jnp.dtype(jnp.float64)]
    for equation in jaxpr.eqns:
        found += [coarsest_dtype(inner) for inner in jaxprs_in_params(equation.params)]
        dtypes = [getattr(v.aval, "dtype", None) for v in equation.outvars]
        found += [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)]
    return max(found, key=lambda dtype: float(jnp.finfo(dtype).eps))
