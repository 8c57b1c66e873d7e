"""Options that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

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
    typer.Option(
        help="gd, exact, block-diagonal, block-tri-diagonal, kfac, ekfac, unit-wise, "
        "diagonal, quasi-diagonal [default: all]"
    ),
]
DampingOption = Annotated[
    float | None,
    typer.Option(
        help="rho, added to every Fisher in the 1/N convention [default: 0, but relative damping "
        "0.001 for unit-wise, diagonal and quasi-diagonal]"
    ),
]
SeedOption = Annotated[int, typer.Option(help="of the initial parameters")]
