"""Bernacchia, Lengyel & Hennequin 2018, Exact natural gradient in deep linear networks."""

MODULES = (
    "identities",
    "inverses",
    "flow",
    "bottleneck",
    "damping",
    "teachers",
    "autoencoder",
    "costs",
)
"""Modules of this package that register checks."""

ORDER = (
    "BE-Eq7",
    "BE-Eq22",
    "BE-Eq14",
    "BE-Eq10",
    "BE-Eq16",
    "BE-Eq23",
    "BE-supp37",
    "BE-supp34",
    "BE-Eq18",
    "BE-discrete",
    "BE-Eq19",
    "BE-bottleneck",
    "BE-Eq20",
    "BE-Eq21",
    "BE-Fig1A",
    "BE-Fig1B",
    "BE-Fig1C",
    "BE-Fig1D",
    "BE-Cost",
)
"""Identifiers, or what they begin with, in the order of the paper."""
