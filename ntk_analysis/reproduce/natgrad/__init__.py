"""Results of this project: which Fishers are isotropic, with shared weights and without."""

MODULES = (
    "theorem",
    "sharing",
    "limits",
    "training",
    "eigenbasis",
    "frontier",
    "frontier_blocks",
    "frontier_batches",
    "frontier_weights",
    "frontier_map",
    "frontier_training",
    "width",
    "sparse_networks",
    "drift",
    "drift_batches",
)
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
    "NG-Frontier-Half",
    "NG-Frontier-Shampoo",
    "NG-Frontier-Weights",
    "NG-Frontier-Projection",
    "NG-Frontier-Blocks",
    "NG-Frontier-Batches",
    "NG-Frontier-Map",
    "NG-Frontier-Training",
    "NG-Width-Kink",
    "NG-Width-Law",
    "NG-Sparse-Networks",
    "NG-Drift-Width",
    "NG-Drift-Structures",
    "NG-Drift-Batches",
)
"""Identifiers in the order of the page."""
