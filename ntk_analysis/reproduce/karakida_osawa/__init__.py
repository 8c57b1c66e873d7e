"""Karakida & Osawa 2020, Understanding Approximate Fisher Information for Fast Convergence."""

MODULES = (
    "identities",
    "layer_wise",
    "kfac",
    "unit_wise",
    "unit_wise_damping",
    "figure1",
    "figure1b",
    "figure3",
    "cross_entropy",
    "classes",
    "kernels",
    "figure2",
)
"""Modules of this package that register checks."""

ORDER = (
    "KO-Eq5",
    "KO-Eq9",
    "KO-Eq10",
    "KO-Thm4.1",
    "KO-Cor4.2",
    "KO-Eq18",
    "KO-Lem4.3",
    "KO-Fig1a",
    "KO-Fig1b-left",
    "KO-Fig1b-right",
    "KO-Eq20",
    "KO-KFAC-lowdim",
    "KO-Forster",
    "KO-Eq22",
    "KO-Fig2-left",
    "KO-Fig2-center",
    "KO-Fig2-right",
    "KO-Fig2-kfac",
    "KO-Thm5.1",
    "KO-Unit-lowdim",
    "KO-Fig3",
    "KO-SecD",
    "KO-SecE",
    "KO-NZ",
)
"""Beginnings of identifiers, in the order of the catalogue."""
