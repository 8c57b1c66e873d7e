"""Results of this project: the isotropy condition for shared weights, and for EKFAC."""

MODULES = ("theorem", "sharing", "limits", "training", "eigenbasis")
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
    "NG-EKFAC",
)
"""Identifiers in the order of the page."""
