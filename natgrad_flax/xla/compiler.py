"""Faults of one version of XLA's CPU compiler that give wrong results, and the way round them."""

from __future__ import annotations

import os
import warnings

import jaxlib.version

_NAME = "xla_cpu_experimental_ynn_fusion_type"
WITHOUT_FAULTY_FUSIONS = (
    f"--{_NAME}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)
"""Products and convolutions by the library, each by itself."""


def avoid_faulty_fusions() -> None:
    """Switches off the fused products and reductions of jaxlib 0.10 on CPUs, by ``XLA_FLAGS``.

    Fused reductions miscompile programs such as a LayerNorm's derivatives of several outputs: of S
    cotangents all but the first come out wrong by tens of per cent. Fused products miscompile
    x @ w where w holds one number everywhere, and run tanh(x @ x + 1) @ x.T at a thirtieth of the
    speed. Flags that choose these fusions already are left as they are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not jaxlib.version.__version__.startswith("0.10.") or _NAME in flags:
        return
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        warnings.warn(
            "XLA's CPU compiler of jaxlib 0.10 can give wrong gradients, and JAX was at work "
            "before natgrad_flax could switch its faulty fusions off: import natgrad_flax "
            "before the first computation, or set "
            f"XLA_FLAGS={WITHOUT_FAULTY_FUSIONS}",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = f"{flags} {WITHOUT_FAULTY_FUSIONS}".strip()


def flags_of_others(flags: str) -> str:
    """XLA_FLAGS for a process with another version of JAX, which may not know this one."""
    return " ".join(flag for flag in flags.split() if _NAME not in flag)
