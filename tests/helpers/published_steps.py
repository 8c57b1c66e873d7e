"""Steps of Shampoo and SOAP as another library takes them, on a small problem, stored beside this.

Run as a script in an environment with torch and pytorch_optimizer, it writes the file anew:
``python tests/helpers/published_steps.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".json")
STEPS, SHAPES = 60, {"matrix": (5, 5), "tensor": (3, 2, 4), "vector": (5,)}
"""A quadratic loss for each, of condition number 5 along a dimension. No factor of a first gradient
is singular: the eigenvectors of a null space are anyone's choice."""

Tensors = dict[str, np.ndarray]


def start() -> Tensors:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradients(params: Tensors) -> Tensors:
    """Of sum |A_1 (x) A_2 ... p|^2 / 2 for each tensor p."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in SHAPES.items():
        gradient = params[name]
        for axis, size in enumerate(shape):
            basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
            hessian = (basis * np.geomspace(1, 0.2, size)) @ basis.T
            gradient = np.moveaxis(np.tensordot(hessian, gradient, (1, axis)), 0, axis)
        found[name] = gradient
    return found


def read() -> dict[str, Any]:
    """Of each optimizer the tensors after every tenth step, and what wrote them."""
    document: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return document


def _write() -> None:
    from importlib.metadata import version

    import pytorch_optimizer
    import torch

    def run(make: Any, repeated: float | None) -> list[dict[str, Any]]:
        params = {name: torch.tensor(p, dtype=torch.float64) for name, p in start().items()}
        optimizer, kept = make(list(params.values())), []

        def step(scale: float = 1.0) -> None:
            found = gradients({name: p.numpy() for name, p in params.items()})
            for name, p in params.items():
                p.grad = torch.tensor(scale * found[name])
            optimizer.step()

        if repeated is not None:
            step(repeated)
        for number in range(1, STEPS + 1):
            step()
            if number % 10 == 0:
                kept.append({name: p.tolist() for name, p in params.items()})
        return kept

    def soap(params: Any) -> Any:
        return pytorch_optimizer.SOAP(
            params, lr=0.05, betas=(0.9, 0.8), weight_decay=0.0, precondition_frequency=5, eps=1e-9
        )

    def shampoo(params: Any) -> Any:
        return pytorch_optimizer.Shampoo(params, lr=0.5, matrix_eps=1e-4)

    document = {
        "by": {name: version(name) for name in ("pytorch_optimizer", "torch")},
        # its first call moves nothing and takes the bases: with a gradient of 1e-5 of the length
        # it adds 1e-10 to the factors, where ours takes the bases and moves at once
        "soap": run(soap, 1e-5),
        "shampoo": run(shampoo, None),
    }
    FILE.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
