"""van Oostrum, Mueller & Ay 2022, Invariance Properties of the Natural Gradient."""

from ntk_analysis.reproduce.papers import Paper

PAPER = Paper(
    "VO",
    "van Oostrum, Müller & Ay",
    "Jesse van Oostrum, Johannes Müller and Nihat Ay",
    2022,
    "Invariance properties of the natural gradient in overparametrised systems",
    "Information Geometry",
    modules=("theorems", "examples", "figures"),
    order=(
        "VO-Eq2",
        "VO-Eq4",
        "VO-Thm1",
        "VO-Thm2",
        "VO-Rem1",
        "VO-Ex1",
        "VO-Ex2",
        "VO-Sec3.2",
        "VO-A3",
        "VO-traj",
        "VO-Prop1",
        "VO-Prop2",
    ),
)
