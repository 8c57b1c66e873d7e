"""Bernacchia, Lengyel & Hennequin 2018, Exact natural gradient in deep linear networks."""

from ntk_analysis.reproduce.papers import Paper

PAPER = Paper(
    "BE",
    "Bernacchia, Lengyel & Hennequin",
    "Alberto Bernacchia, Máté Lengyel and Guillaume Hennequin",
    2018,
    "Exact natural gradient in deep linear networks and its application to the nonlinear case",
    "NeurIPS 2018",
    modules=(
        "identities",
        "inverses",
        "flow",
        "bottleneck",
        "damping",
        "teachers",
        "autoencoder",
        "costs",
        "figures",
    ),
    order=(
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
    ),
)
