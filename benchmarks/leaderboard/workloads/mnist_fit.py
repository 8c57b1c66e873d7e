"""The network and the samples of ``mnist-mse``, judged by the training loss alone."""

from dataclasses import replace

from benchmarks.leaderboard.workloads.mnist_mse import WORKLOAD as HELD_OUT

WORKLOAD = replace(
    HELD_OUT,
    name="mnist-fit",
    title=f"{HELD_OUT.title}, training loss",
    question="How fast is a wide network fitted whose kernel is ill-conditioned?",
    metric="train",
    expectation="Curvature should win by far: a full batch, no noise, and a kernel whose "
    "eigenvalues span decades.",
    curvature_wins=True,
)
