"""Which inputs of a traced program its outputs depend on."""

from __future__ import annotations

from typing import Any

from jax.extend.core import Literal

_CALLS = ("jaxpr", "call_jaxpr")


def used_inputs(jaxpr: Any, needed: list[bool] | None = None) -> list[bool]:
    """For each input whether an output may depend on it.

    Calls of programs within the program are followed; of loops and branches every input counts as
    used.

    Args:
      jaxpr: of ``jax.make_jaxpr``.
      needed: which outputs count, all of them unless told.
    """
    wanted = [True] * len(jaxpr.outvars) if needed is None else needed
    live = {
        v
        for v, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and not isinstance(v, Literal)
    }
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs):
            continue
        live.update(
            v
            for v, use in zip(equation.invars, _used_by(equation, outputs), strict=True)
            if use and not isinstance(v, Literal)
        )
    return [v in live for v in jaxpr.invars]


def _used_by(equation: Any, outputs: list[bool]) -> list[bool]:
    for name in _CALLS:
        inner = equation.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        if inner is None or equation.primitive.name in ("scan", "while"):
            continue
        if len(inner.invars) == len(equation.invars) and len(inner.outvars) == len(outputs):
            return used_inputs(inner, outputs)
    return [True] * len(equation.invars)
