"""Prints XLA_FLAGS for programs that run once on a few numbers, behind those of the environment.

Compiling is 2 to 4 times as cheap with them, and programs are slower.
"""

import os

import jaxlib.version

# one piece a program: on the processors of the suite, which are busy anyway, pieces are overhead
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.version.__version__.startswith("0.10."):
    # the emitters of before; jaxlib 0.12 has no others, and ends the process over the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

if __name__ == "__main__":
    print(os.environ.get("XLA_FLAGS", ""), *FLAGS)
