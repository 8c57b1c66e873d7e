"""The one place that imports neural-tangents.

Release 0.6.5, the last, imports names that JAX has moved or dropped, and TensorFlow for one
experimental module. The names are lent to JAX while neural-tangents is imported and taken back
afterwards; the experimental module is replaced by an empty one, so TensorFlow is never needed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NoReturn

_MOVED = ("Jaxpr", "JaxprEqn", "ClosedJaxpr", "Literal", "Primitive", "Var", "jaxpr_as_fun")
_EXPERIMENTAL = "neural_tangents.experimental"


@cache
def neural_tangents() -> Any:
    """The package neural-tangents, imported at the first call.

    Stax kernels, ``predict``, ``batch``, ``monte_carlo_kernel_fn``, ``linearize`` and the empirical
    kernel by Jacobian contraction or by NTK-vector products work on JAX 0.10 to 0.12. Structured
    derivatives do not, and raise ``NotImplementedError``.

    Raises:
      ImportError: it is not installed, or this JAX has changed in yet another way.
    """
    loaded = sys.modules.get("neural_tangents")
    if loaded is not None:
        return loaded
    try:
        with _lent_names(), _without_experimental():
            package = importlib.import_module("neural_tangents")
            empirical = importlib.import_module("neural_tangents._src.empirical")
    except (ImportError, AttributeError) as error:
        import jax

        for name in [n for n in sys.modules if n.split(".")[0] == "neural_tangents"]:
            del sys.modules[name]
        raise ImportError(
            f"neural-tangents cannot be imported on JAX {jax.__version__} ({error}); natgrad is "
            "tested with neural-tangents 0.6.5 on JAX 0.10, 0.11 and 0.12"
        ) from error
    structured = package.NtkImplementation.STRUCTURED_DERIVATIVES
    empirical._implementation_to_ntk_fn[structured] = _refuse_structured_derivatives
    return package


def stax() -> Any:
    """The module ``neural_tangents.stax``."""
    return neural_tangents().stax


def _refuse_structured_derivatives(*args: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError(
        "structured derivatives of neural-tangents 0.6.5 do not work on this JAX; use "
        "NtkImplementation.JACOBIAN_CONTRACTION or NTK_VECTOR_PRODUCTS, or "
        "ntk_analysis.empirical_layer_kernels, which needs less time and memory than both"
    )


@contextmanager
def _lent_names() -> Iterator[None]:
    """Gives jax the names that neural-tangents imports, and takes them back."""
    import jax.core
    import jax.extend.core
    import jax.interpreters.ad

    lent: list[tuple[Any, str]] = []

    def lend(owner: Any, name: str, value: object) -> None:
        if name not in vars(owner):
            setattr(owner, name, value)
            lent.append((owner, name))

    for name in _MOVED:
        if not _has(jax.core, name):
            lend(jax.core, name, getattr(jax.extend.core, name))
    ad = jax.interpreters.ad
    if not _has(ad, "zeros_like_p"):
        lend(ad, "zeros_like_p", jax.extend.core.Primitive("zeros_like"))
    util = None
    if "jax.util" not in sys.modules and not _has(jax, "util"):
        util = ModuleType("jax.util")
        vars(util).update(safe_map=_safe_map, safe_zip=_safe_zip)
        sys.modules["jax.util"] = util
        lend(jax, "util", util)
    try:
        yield
    finally:
        for owner, name in lent:
            delattr(owner, name)
        if util is not None:
            del sys.modules["jax.util"]


@contextmanager
def _without_experimental() -> Iterator[None]:
    """An empty stand-in, which stays: without it any later import would want TensorFlow."""
    stand_in = ModuleType(_EXPERIMENTAL, "Left out: it needs TensorFlow.")
    sys.modules[_EXPERIMENTAL] = stand_in
    try:
        yield
    except BaseException:
        sys.modules.pop(_EXPERIMENTAL, None)
        raise


def _has(module: ModuleType, name: str) -> bool:
    """Whether a module has a name, where a deprecated one that raises counts as absent."""
    try:
        getattr(module, name)
    except AttributeError:
        return False
    return True


def _safe_map(function: Any, *sequences: Any) -> list[Any]:
    return [function(*entries) for entries in _safe_zip(*sequences)]


def _safe_zip(*sequences: Any) -> list[tuple[Any, ...]]:
    return list(zip(*sequences, strict=True))
