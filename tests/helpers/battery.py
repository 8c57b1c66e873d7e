"""What tests share: every approximation with its constructor options, once, and how to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jaxlib.version
import numpy as np

import natgrad_flax as ng

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of programs that run once: compiling is what costs."""

AS_USERS = {"xla_backend_optimization_level": 3}
"""Options that take back the flags of `make test`."""
if jaxlib.version.__version__.startswith("0.10."):
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def coupling(depth: int, *, definite: bool = True) -> np.ndarray:
    """A random symmetric nonsingular Sigma, shape (L, L)."""
    sigma = np.random.default_rng(depth).normal(size=(depth, depth))
    return sigma @ sigma.T / depth + np.eye(depth) if definite else sigma + sigma.T


STRUCTURES: dict[str, Callable[[int, str], ng.Structure]] = {
    "exact": lambda depth, space: ng.Exact(space),
    "block-diagonal": lambda depth, space: ng.BlockDiagonal(space),
    "block-tri-diagonal": lambda depth, space: ng.BlockTriDiagonal(space),
    "layer-wise": lambda depth, space: ng.LayerWise(coupling(depth), space),
    "layer-wise-indefinite": lambda depth, space: ng.LayerWise(
        coupling(depth, definite=False), space
    ),
    "kfac": lambda depth, space: ng.KFAC(space=space),
    "kfac-literal-pi": lambda depth, space: ng.KFAC("literal", "pi", "scaled", space),
    "kfac-reduce": lambda depth, space: ng.KFAC(space=space, sharing="reduce"),
    "ekfac": lambda depth, space: ng.EKFAC(),
    "ekfac-reduce": lambda depth, space: ng.EKFAC("reduce"),
    "unit-wise": lambda depth, space: ng.UnitWise(space),
    "diagonal": lambda depth, space: ng.Diagonal(),
    "quasi-diagonal": lambda depth, space: ng.QuasiDiagonal(),
    "foof": lambda depth, space: ng.Foof("inputs", space),
    "foof-units": lambda depth, space: ng.Foof("units", space),
    "unit-blocks": lambda depth, space: ng.UnitBlocks(3),
    "shampoo": lambda depth, space: ng.Shampoo(0.25),
    "kfoc": lambda depth, space: ng.KFOC(200),
    "low-rank-units": lambda depth, space: ng.LowRankUnits(2),
    "nystroem": lambda depth, space: ng.Nystroem(7, seed=3),
    "mini-block": lambda depth, space: ng.MiniBlock("inputs"),
    "mini-block-units": lambda depth, space: ng.MiniBlock("units"),
}
"""By name: from the number of layers and a space ("auto", "sample", "parameter") to the structure.

Those without a space take none.
"""

OF_CLASSES: dict[type[ng.Structure], str] = {}
for _name, _make in STRUCTURES.items():
    OF_CLASSES.setdefault(type(_make(2, "auto")), _name)

ONE_OF_EACH = tuple(
    name for cls, name in OF_CLASSES.items() if cls.style.command or cls is ng.LayerWise
)
"""Names of structures, one of each class that has a name on command lines, and layer-wise.

The other classes share their code, and are in the battery alone.
"""


def made(
    depth: int, names: Iterable[str] = ONE_OF_EACH, space: str = "auto"
) -> dict[str, ng.Structure]:
    """These structures by name, for a network of this depth."""
    return {name: STRUCTURES[name](depth, space) for name in names}
