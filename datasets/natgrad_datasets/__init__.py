"""Data sets of the natural-gradient benchmark suite, prepared as in the literature.

Depends on NumPy, SciPy, scikit-learn, pooch and rich only; usable without the rest of the project.
"""

from . import _requirements  # noqa: F401 - before what needs them
from .catalogue import names
from .errors import DataFileError, DatasetError, DownloadError
from .forster import ForsterTransform, forster_transform
from .linear_teacher import LINEAR_TEACHER_SETTINGS, linear_teacher, random_linear_network
from .loading import Dataset, load
from .low_rank import low_rank_matrix, observed_mask
from .preparation import encode_labels, prepare, standardise, unit_norm
from .separable import planar, sparse_classification
from .store import DatasetStatus, best_available, status

__all__ = [
    "LINEAR_TEACHER_SETTINGS",
    "DataFileError",
    "Dataset",
    "DatasetError",
    "DatasetStatus",
    "DownloadError",
    "ForsterTransform",
    "best_available",
    "encode_labels",
    "forster_transform",
    "linear_teacher",
    "load",
    "low_rank_matrix",
    "names",
    "observed_mask",
    "planar",
    "prepare",
    "random_linear_network",
    "sparse_classification",
    "standardise",
    "status",
    "unit_norm",
]
