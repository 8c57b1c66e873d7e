"""What outputs depend on by their derivatives, and how precisely a program computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

_CALLS = ("jaxpr", "call_jaxpr")


def has_derivative(jaxpr: Any, count: int) -> bool:
    """Whether an output of a program may have a derivative with respect to one of its first inputs.

    What stands under ``stop_gradient`` has none. Of loops and branches every input counts.
    """
    return any(_reached(jaxpr, [True] * len(jaxpr.outvars))[:count])


def _reached(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    live = {
        v
        for v, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and not isinstance(v, Literal)
    }
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs) or equation.primitive.name == "stop_gradient":
            continue
        reached = zip(equation.invars, _reached_in(equation, outputs), strict=True)
        live.update(v for v, use in reached if use and not isinstance(v, Literal))
    return [v in live for v in jaxpr.invars]


def _reached_in(equation: Any, outputs: list[bool]) -> list[bool]:
    for name in _CALLS:
        inner = equation.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        if inner is None or equation.primitive.name in ("scan", "while"):
            continue
        if len(inner.invars) == len(equation.invars) and len(inner.outvars) == len(outputs):
            return _reached(inner, outputs)
    return [True] * len(equation.invars)


def coarsest_dtype(jaxpr: Any) -> Any:
    """The floating dtype of least precision among all that a program computes, float64 at best."""
    found = [jnp.dtype(jnp.float64)]
    for equation in jaxpr.eqns:
        found += [coarsest_dtype(inner) for inner in jaxprs_in_params(equation.params)]
        dtypes = [getattr(v.aval, "dtype", None) for v in equation.outvars]
        found += [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)]
    return max(found, key=lambda dtype: float(jnp.finfo(dtype).eps))
