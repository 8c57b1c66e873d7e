"""Benchmarks of natgrad: asv suites, and the same measurements from the command line.

SciPy's OpenBLAS, whose LAPACK JAX calls on the CPU, keeps threads of its own spinning after a call;
on few cores they fight with XLA's. One BLAS thread has to be asked for before JAX is imported.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
