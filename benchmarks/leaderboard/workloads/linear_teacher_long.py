"""The data and the network of ``linear-teacher``, with time to come near the noise."""

from dataclasses import replace

from benchmarks.leaderboard.workloads.linear_teacher import SETTINGS
from benchmarks.leaderboard.workloads.linear_teacher import WORKLOAD as SHORT

WORKLOAD = replace(
    SHORT,
    name="linear-teacher-long",
    title=f"{SHORT.title}, to the end",
    version=1,
    settings={name: value for name, value in SETTINGS.items() if name != "num_validation"},
    question="What does tuned training reach on the linear teacher with patience, and how soon "
    "does curvature?",
    max_steps=6000,
    max_seconds=30.0,
)
