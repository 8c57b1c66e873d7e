"""van Oostrum, Mueller & Ay 2022, Invariance Properties of the Natural Gradient."""

MODULES = ("theorems", "examples")
"""Modules of this package that register checks."""

ORDER = (
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
)
"""Identifiers, or what they begin with, in the order of the paper."""
