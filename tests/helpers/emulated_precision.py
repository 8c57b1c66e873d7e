"""Products as accelerators round them, on a CPU.

Unless a program asks for more, GPUs since Ampere multiply float32 in TF32 (10 bits of mantissa) and
TPUs in bfloat16 (7 bits), and add up in float32. Here both operands of each product and convolution
of default precision are rounded so before it; one of precision "highest" stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives
from jax.interpreters import mlir

MANTISSA_BITS = {"TF32": 10, "bfloat16": 7}
HIGHEST = (lax.Precision.HIGHEST,) * 2


@contextmanager
def products_rounded_to(bits: int) -> Iterator[None]:
    """Compiles all float32 products of default precision with rounded operands."""
    table = mlir._platform_specific_lowerings["cpu"]
    before = {
        p: table.get(p) for p in (primitives.dot_general_p, primitives.conv_general_dilated_p)
    }

    def rule(primitive: Any) -> Any:
        plain = before[primitive].rule if before[primitive] else mlir._lowerings[primitive].rule

        def rounded(lhs: jax.Array, rhs: jax.Array, **settings: Any) -> jax.Array:
            operands = (lax.reduce_precision(side, 8, bits) for side in (lhs, rhs))
            return primitive.bind(*operands, **{**settings, "precision": HIGHEST})

        lowered = mlir.lower_fun(rounded, multiple_results=False)

        def choose(context: Any, lhs: Any, rhs: Any, **settings: Any) -> Any:
            default = settings["precision"] in (None, (lax.Precision.DEFAULT,) * 2)
            small = all(aval.dtype == "float32" for aval in context.avals_in)
            return (lowered if default and small else plain)(context, lhs, rhs, **settings)

        return choose

    jax.clear_caches()
    for primitive in before:
        mlir.register_lowering(primitive, rule(primitive), platform="cpu")
    try:
        yield
    finally:
        for primitive, entry in before.items():
            table.pop(primitive)
            if entry is not None:
                table[primitive] = entry
        jax.clear_caches()
