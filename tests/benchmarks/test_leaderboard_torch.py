"""K-FAC of curvlinops on the leaderboard: skipped with the reason, and, with PyTorch, its steps."""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from importlib.metadata import PackageNotFoundError

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_leaderboard
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard import trial
from benchmarks.leaderboard.contestant import find_contestant
from benchmarks.leaderboard.contestants import torch_kfac
from benchmarks.leaderboard.trial import configuration, execute
from benchmarks.leaderboard.workload import Data, Workload, find_workload

MSE, ENTROPY = ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()
ROWS = np.array([4, 0, 5, 2])


def toy(
    *,
    outputs: int = 1,
    bias: float = 0.0,
    activation: str = "tanh",
    loss: ng.Loss = MSE,
    batch: int | None = None,
) -> Workload:
    """6 samples of 4 inputs, one hidden layer of 5 units, variances other than 1."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4)).astype(np.float32)
    y = rng.standard_normal((6, outputs)).astype(np.float32)
    if loss != MSE:
        y = np.eye(outputs, dtype=np.float32)[np.argmax(y, axis=1)]
    return toy_leaderboard.make_workload(
        data=lambda: Data(x, y, x, y),
        model=lambda seed: ng.MLP(
            (4, 5, outputs), activation=activation, bias_variance=bias, rngs=nnx.Rngs(seed)
        ),
        loss=loss,
        batch_size=batch,
    )


def peer(fisher="mc"):
    return dataclasses.replace(find_contestant("curvlinops-kfac"), fisher=fisher)


@pytest.fixture
def packages(monkeypatch):
    """Sets which versions are installed; None: not at all."""

    def install(versions):
        def version(name):
            if versions.get(name) is None:
                raise PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(torch_kfac, "version", version)

    return install


@pytest.fixture
def torch(monkeypatch):
    """PyTorch on one thread: its threads spin, which other processes of the tests would feel."""
    pytest.importorskip("curvlinops")
    monkeypatch.setattr(torch_kfac, "cores", lambda: 1)
    return pytest.importorskip("torch")


def test_the_register_does_not_import_pytorch(monkeypatch):
    for module in torch_kfac.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    (entry,) = runpy.run_path(torch_kfac.__file__)["CONTESTANTS"]
    assert entry.name == "curvlinops-kfac"
    assert entry.facts() == {
        "title": "K-FAC of curvlinops (PyTorch)",
        "family": "peer",
        "ruleset": "tuned",
        "structure": "",
        "fisher": "Monte-Carlo, 1 sample",
        "damping": f"{torch_kfac.DAMPING:g}, added to the Fisher (1/N), its root to both factors "
        "by pi",
        "rate_rule": "tuned, 3 studies of 5 trials",
    }


@pytest.mark.parametrize("missing", ["torch", "curvlinops-for-pytorch"])
def test_a_missing_package_is_a_result_with_its_reason(monkeypatch, packages, missing):
    versions = {"torch": "2.13.0", "curvlinops-for-pytorch": "3.0.1"}
    packages({**versions, missing: None})
    monkeypatch.setattr(torch_kfac, "import_module", lambda name: None)
    config = configuration(
        find_workload("digits-mse"), "curvlinops-kfac", 0,
        target=None, role="evaluation", learning_rate=0.1,
    )  # fmt: skip
    found = execute(config)
    assert found["outcome"] == {
        "status": "skipped",
        "reason": f"{missing} is not installed: `pip install 'natgrad[peers]'`",
    }
    assert found["facts"]["family"] == "peer"


def test_what_does_not_run_here_says_why(monkeypatch, packages):
    packages({"torch": "2.13.0", "curvlinops-for-pytorch": "3.0.1"})
    monkeypatch.setattr(torch_kfac, "import_module", lambda name: None)
    assert peer().unsuitable(toy()) == ""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert peer().unsuitable(toy()).startswith("it runs on the CPU")

    def broken(name):
        raise OSError("libomp is missing")

    monkeypatch.setattr(torch_kfac, "import_module", broken)
    assert peer().unsuitable(toy()) == "torch 2.13.0 does not run here: libomp is missing"
    monkeypatch.setattr(torch_kfac, "import_module", lambda name: None)
    packages({"torch": "2.13.0", "curvlinops-for-pytorch": "2.0.1"})
    assert "2.0.1 has another interface than 3.x" in peer().unsuitable(toy())


def test_the_threads_of_pytorch_are_told_to_sleep_before_it_loads(monkeypatch, packages):
    packages({"torch": "2.13.0", "curvlinops-for-pytorch": "3.0.1"})
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = []

    def loaded(name):
        seen.append((name, os.environ.get("OMP_WAIT_POLICY")))

    monkeypatch.setattr(torch_kfac, "import_module", loaded)
    assert peer().unsuitable(toy()) == ""
    assert seen == [("torch", "passive"), ("curvlinops", "passive")]


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (find_workload("matrix-completion"), "this is another network"),
        (toy(outputs=3, loss=ng.SoftmaxCrossEntropy(0.1)), "without output damping"),
        (
            dataclasses.replace(
                toy(outputs=2), loss=ENTROPY, data=lambda: Data(*(np.full((6, 2), 0.5),) * 4)
            ),
            "not soft targets",
        ),
    ],
)
def test_unsuitable_workloads(workload, reason):
    assert reason in peer().unsuitable(workload)


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["relu", "tanh", "erf", "gelu", "leaky_relu", "identity"])
def test_the_copy_has_the_outputs_of_the_model(torch, activation, bias):
    model = toy(activation=activation, bias=bias, outputs=2).model(3)
    x = 2 * toy().data().x_train
    found = torch_kfac.torch_copy(model)(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(found, model(jnp.asarray(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [MSE, ENTROPY])
def test_the_copy_has_the_gradient_of_the_model(torch, loss):
    workload = toy(outputs=3, bias=0.3, loss=loss)
    x, y = workload.data()[:2]
    program = torch_kfac.CurvlinopsProgram(peer(), workload)
    state = program.start(3, 1.0)
    value = program._loss(state.network(program._x), program._y)
    slopes = torch.autograd.grad(value, list(state.network.parameters()))
    graphdef, start = nnx.split(workload.model(3))
    wanted = jax.grad(lambda leaves: loss(nnx.merge(graphdef, leaves)(x), jnp.asarray(y)))(start)
    # as the program does: 2/C of the loss of the workload
    share = 2 / 3 if loss == MSE else 1.0
    for index, slope in enumerate(slopes):
        layer = wanted["layers"][index]
        matrix = np.concatenate([layer["kernel"][...], layer["bias"][...][None]])
        np.testing.assert_allclose(slope.numpy().T, share * matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "outputs", "bias", "rows"),
    [(MSE, 1, 0.0, None), (MSE, 3, 0.3, ROWS), (ENTROPY, 3, 0.3, ROWS), (ENTROPY, 2, 0.0, None)],
)
def test_a_step_is_that_of_our_kfac(torch, monkeypatch, loss, outputs, bias, rows):
    # large enough for float32
    monkeypatch.setattr(torch_kfac, "DAMPING", 0.01)
    batch = None if rows is None else len(rows)
    workload = toy(outputs=outputs, bias=bias, loss=loss, batch=batch)
    x, y = (jnp.asarray(a if rows is None else a[rows]) for a in workload.data()[:2])
    direction = ng.natural_gradient(
        workload.model(3), x, y,
        structure=ng.KFAC(last_layer="literal", split="pi"), loss=loss, damping=0.01,
    )  # fmt: skip
    program = torch_kfac.CurvlinopsProgram(peer("exact"), workload)
    found = program.parameters(program.step(program.start(3, 0.5), rows))
    start = nnx.state(workload.model(3))
    wanted = jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, start, direction)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_parameters_come_back_as_they_went_in(torch):
    workload = toy(outputs=2, bias=0.3)
    program = torch_kfac.CurvlinopsProgram(peer(), workload)
    state, other = program.start(3, 0.5), program.start(3, 0.5)
    start = program.parameters(state)
    wanted = nnx.state(workload.model(3))
    assert jax.tree.structure(start) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, start, wanted)
    moved = program.parameters(program.step(state, None))
    assert not np.array_equal(moved["layers"][0]["kernel"][...], wanted["layers"][0]["kernel"][...])
    # neither what was handed out nor another state has moved
    jax.tree.map(np.testing.assert_array_equal, start, wanted)
    jax.tree.map(np.testing.assert_array_equal, program.parameters(other), wanted)
    assert program.compile_seconds > 0


def test_sampled_targets_belong_to_the_seed(torch):
    workload = toy(outputs=3, loss=ENTROPY)
    program = torch_kfac.CurvlinopsProgram(peer("mc"), workload)

    def trained(draws):
        state = program.start(3, 0.5)
        state.draws = np.random.default_rng(draws)
        moved = program.parameters(program.step(program.step(state, None), None))
        return np.asarray(moved["layers"][0]["kernel"][...])

    np.testing.assert_array_equal(trained(1), trained(1))
    assert not np.allclose(trained(1), trained(2), rtol=1e-3)


@pytest.mark.parametrize("sizes", [(1e20, 1e-20), (np.inf, 1.0), (np.nan, 1.0)])
@pytest.mark.parametrize("loss", [MSE, ENTROPY])
def test_a_step_from_nowhere_is_a_divergence(torch, loss, sizes):
    # with the first sizes only the squares overflow: the factors, not the gradient
    program = torch_kfac.CurvlinopsProgram(peer(), toy(outputs=3, activation="relu", loss=loss))
    state = program.start(3, 0.5)
    with torch.no_grad():
        for weight, size in zip(state.network.parameters(), sizes, strict=True):
            weight *= size
    for _ in range(3):
        state = program.step(state, None)
    assert not np.isfinite(program.parameters(state)["layers"][1]["kernel"][...]).all()


def test_a_trial_reaches_its_target(torch, monkeypatch):
    workload = toy(activation="identity", bias=0.3)
    toy_leaderboard.install(monkeypatch, workload, {"curvlinops-kfac": peer()})
    config = configuration(
        workload, "curvlinops-kfac", 0, target=0.3, role="evaluation", learning_rate=0.3
    )
    try:
        outcome = execute(config)["outcome"]
    finally:
        trial._program.cache_clear()
        trial._evaluation.cache_clear()
    assert outcome["status"] == "reached"
    assert outcome["curve"]["train"][0] > outcome["curve"]["train"][-1]
    assert outcome["compile_seconds"] > 0
