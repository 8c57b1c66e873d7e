"""Results of this project: the isotropy condition for networks that share weights."""

MODULES = ("theorem", "sharing", "limits", "training")
"""Modules of this package that register checks."""

ORDER = (
    "NG-Conv-Kernels",
    "NG-Conv-Thm4.1",
    "NG-Conv-Readout",
    "NG-Conv-Shift",
    "NG-Conv-Expand",
    "NG-Conv-Reduce",
    "NG-Conv-Unit",
    "NG-Conv-First",
    "NG-Conv-Digits",
    "NG-Conv-Training",
)
"""Identifiers in the order of the page."""
