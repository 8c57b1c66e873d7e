"""The equation that benchmarks.pinn solves has the solution that errors are measured against."""

import json

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import pinn


def test_the_solution_leaves_no_residual(x64):
    """cos sums in place of the network: residuals inside and on the boundary are the targets."""
    points, targets = pinn.draw(jax.random.key(0), 5, 30, 2)
    x, inside = np.asarray(points["x"]), np.asarray(points["inside"])
    assert inside.sum() == 5
    np.testing.assert_array_equal(((x == 0) | (x == 1)).sum(axis=1), np.where(inside, 0, 1))
    assert ((x >= 0) & (x <= 1)).all()
    assert len({(face, x[n, face]) for n, face in np.argwhere((x == 0) | (x == 1))}) == 4
    model = pinn.Residuals(2, 3, nnx.Rngs(0))
    model.network = pinn.solution
    np.testing.assert_allclose(model(points), targets, atol=1e-12)
    assert pinn.relative_error(model, jax.random.key(1), 2) == 0


def test_a_run_and_its_table(tmp_path, monkeypatch, capsys):
    """One method in one dimension for an instant; what is written is what was trained."""
    made = []

    def sgd(rate):
        made.append(rate)
        return optax.sgd(rate)

    monkeypatch.setattr(pinn, "METHODS", {"Adam": (sgd, (0.01,))})
    monkeypatch.setattr(pinn, "TEST_POINTS", 10)
    out = tmp_path / "pinn.json"
    pinn.main(["--method", "Adam", "--seconds", "0.01", "--width", "3", "--out", str(out)])
    (run,) = json.loads(out.read_text())["runs"]
    assert run["method"] == "Adam"
    assert run["steps"] >= 1
    assert 0 < run["error"] < 10
    assert made
    assert f"{run['error']:.2e}" in capsys.readouterr().out
