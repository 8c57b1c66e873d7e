"""Options that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from ntk_analysis.methods import STRUCTURES, default_dampings

DatasetOption = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, fashion_mnist, cifar10 or gaussian [default: mnist where it is on "
        "this machine, else digits]"
    ),
]
NetworkOption = Annotated[
    str,
    typer.Option(
        help="mlp, conv-flatten (the readout sees every position) or conv-average (their mean)"
    ),
]
ActivationOption = Annotated[
    str, typer.Option(help="relu, tanh, erf, gelu, leaky_relu or identity")
]
WeightVarianceOption = Annotated[float, typer.Option(help="sigma_w^2")]
BiasVarianceOption = Annotated[float, typer.Option(help="sigma_b^2; 0 means no biases")]
StructuresOption = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(STRUCTURES)} [default: all]"),
]
DampingOption = Annotated[
    float | None,
    typer.Option(
        help="rho, added to every Fisher in the 1/N convention [default: 0"
        + "".join(f", but {kind} {value} for {names}" for kind, value, names in default_dampings())
        + "]"
    ),
]
SeedOption = Annotated[int, typer.Option(help="of the initial parameters")]
