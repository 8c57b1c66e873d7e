"""Kerekes, Meszaros & Huszar 2021, Depth without the magic: inductive bias of natural gradient."""

MODULES = (
    "invariance",
    "logistic",
    "stable_solve",
    "diagonal",
    "matrices",
    "toy",
    "kernel_maps",
    "sparse",
    "small_sparse",
    "completion",
    "natural_completion",
)
"""Modules of this package that register checks."""

ORDER = (
    "KE-Stmt",
    "KE-Lem1",
    "KE-Lem2",
    "KE-RemRank",
    "KE-Thm1",
    "KE-Thm2",
    "KE-Concl",
    "KE-Thm3/4",
    "KE-AppD",
    "KE-AppG",
    "KE-NGF-limit",
    "KE-SVP",
    "KE-B1",
    "KE-B2",
    "KE-NGD-MF",
    "KE-Eq51",
    "KE-Fig2",
    "KE-Fig3",
    "KE-Fig4",
    "KE-Fig5",
    "KE-Fig6",
)
"""Identifiers, or what they begin with, in the order of the paper."""
