"""Contestants on networks with shared weights: what suits, sizes, steps, rates and a real trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard import natural, trial
from benchmarks.leaderboard.contestant import contestants, find_contestant
from benchmarks.leaderboard.natural import damping_on, is_dense, signal_shapes
from benchmarks.leaderboard.plan import make_plan
from benchmarks.leaderboard.program import OptaxProgram
from benchmarks.leaderboard.rates import TheoreticalRate
from benchmarks.leaderboard.spectra import structure_outcome
from benchmarks.leaderboard.trial import configuration, execute
from benchmarks.leaderboard.workload import Data, Workload, find_workload
from natgrad_flax.signals.fisher import FisherKind

ENTROPY = ng.SoftmaxCrossEntropy()
AVERAGED = ("kfac-average", "ekfac-average")


def conv(seed: int) -> nnx.Module:
    """16 positions, 5 inputs a unit with the bias, 3 channels; then 48 + 1 inputs, 3 outputs."""
    return ng.ConvNet(
        (4, 4, 1), (3,), 3, kernel_size=2, strides=1, bias_variance=0.1, rngs=nnx.Rngs(seed)
    )


def transformer(seed: int) -> nnx.Module:
    return ng.VisionTransformer(
        (4, 4, 1), patch=2, width=4, depth=1, heads=2, mlp=6, outputs=3, rngs=nnx.Rngs(seed)
    )


def toy(*, loss: ng.Loss = ENTROPY, batch: int | None = 4, **changes: object) -> Workload:
    """A ConvNet on 6 random images of three classes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4, 4, 1)).astype(np.float32)
    y = np.eye(3, dtype=np.float32)[np.arange(6) % 3]
    known = {"model": conv, "loss": loss, "batch_size": batch, "metric": "train", "dataset": None}
    where = dataclasses.replace(find_workload("digits-mse"), name="toy", settings={}, **known)
    return dataclasses.replace(where, data=lambda: Data(x, y, x, y), **changes)  # type: ignore[arg-type]


def with_data(name: str) -> Workload:
    workload = find_workload(name)
    if workload.missing():
        pytest.skip(workload.missing())
    return workload


@pytest.mark.parametrize(("model", "fisher"), [(conv, "exact"), (transformer, "mc")])
def test_shapes_are_those_of_real_signals(model: object, fisher: FisherKind) -> None:
    workload = toy(model=model)
    data = workload.data()
    found, graph = signal_shapes(workload, fisher), nnx.split(workload.model(0))

    @jax.jit
    def signals(state: nnx.State, x: jax.Array, y: jax.Array) -> ng.Signals:
        key, network = jax.random.key(0), nnx.merge(graph[0], state)
        return ng.fisher_signals(network, x, y, loss=ENTROPY, fisher=fisher, key=key)[0]

    real = signals(graph[1], data.x_train[:4], data.y_train[:4])
    assert found.num_directions == real.num_directions == (1 if fisher == "mc" else 2)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, real)
    assert jax.tree.structure(found) == jax.tree.structure(real)


def test_dense_sides_by_hand() -> None:
    signals = signal_shapes(toy(batch=6), "exact")
    # N = 6, S = 2; P = 5 * 3 and 49 * 3; rows of the convolution: 6 * 16 inputs, 12 * 16 units
    assert ng.Exact().largest_system(signals) == 12
    assert ng.BlockDiagonal().largest_system(signals) == 12
    assert ng.BlockTriDiagonal().largest_system(signals) == 12
    # max of min(96, 5), min(192, 3) and of min(6, 49), min(12, 3)
    assert ng.KFAC().largest_system(signals) == ng.EKFAC().largest_system(signals) == 6
    assert ng.Diagonal().largest_system(signals) == 0
    # one seed: fewer rows
    alone = signal_shapes(toy(batch=4), "mc")
    assert ng.Exact().largest_system(alone) == ng.BlockTriDiagonal().largest_system(alone) == 4
    assert ng.KFAC().largest_system(alone) == 5


def test_theory_knows_the_sizes_of_fully_connected_networks_only() -> None:
    assert is_dense(find_workload("digits-mse").model(0))
    assert not is_dense(conv(0))
    assert not is_dense(transformer(0))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deep-linear", "linear networks and squared error"),
        ("online", "fully connected layers"),
        ("lbfgs", "full batches"),
        ("curvlinops-kfac", "copy of ng.MLP"),
        ("exact", "without damping each batch"),
        ("kfac-mc-lm", ""),
        ("ekfac-mc-tuned", ""),
        ("quasi-diagonal-mc-lm", ""),
        ("kfac-average", ""),
        ("exact-momentum", ""),
        ("sgd", ""),
    ],
)
def test_who_suits_a_convnet(name: str, reason: str) -> None:
    found = find_contestant(name).unsuitable(toy())
    assert reason in found if reason else found == ""


def test_averages_and_projected_momentum_are_for_mini_batches() -> None:
    for name in (*AVERAGED, "exact-momentum"):
        assert "mini-batches" in find_contestant(name).unsuitable(toy(batch=None))


def test_what_does_not_fit_is_refused_by_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(name: str) -> str:
        return find_contestant(name).unsuitable(toy())

    monkeypatch.setattr(natural, "LARGEST_EIGENSYSTEM", 4)
    assert "eigendecomposition of side 5" in reason("ekfac-mc-lm")
    assert reason("ekfac-average") == reason("kfac-mc-lm") == ""
    monkeypatch.setattr(natural, "LARGEST_SYSTEM", 40)
    # of the readout: 4 samples, but averages are kept as matrices of 49 inputs
    assert reason("kfac-mc-lm") == ""
    assert "side 49" in reason("kfac-average")
    # entries of inputs (4, 16, 5) less the bias and (4, 48), derivatives (4, 16, 3) and (4, 3)
    held = 4 * 16 * 4 + 4 * 48 + 4 * 16 * 3 + 4 * 3
    monkeypatch.setattr(natural, "LARGEST_SIGNALS", held)
    assert reason("kfac-mc-lm") == ""
    assert "holds of 4 samples" in reason("exact-mc-lm")
    assert "2 backward passes of 4 samples" in reason("kfac-lm")


def test_what_fits_on_cifar() -> None:
    workload = with_data("cifar-conv")
    assert "9 backward passes" in find_contestant("exact-tuned").unsuitable(workload)
    assert "side 1153" in find_contestant("ekfac-mc-lm").unsuitable(workload)
    for name in ("kfac-average", "exact-momentum"):
        assert find_contestant(name).unsuitable(workload) == ""


def test_the_board_of_networks_has_frozen_targets_and_contestants_for_mini_batches() -> None:
    board, default = make_plan("networks"), make_plan("default")
    names = {"digits-conv", "cifar-conv", "cifar-residual", "cifar-transformer"}
    assert set(board.workloads) == names <= set(make_plan("full").workloads)
    mini = {*AVERAGED, "exact-momentum"}
    assert mini <= set(board.contestants)
    assert not mini & set(default.contestants)
    assert {"ekfac", "ekfac-mc-lm"} <= set(default.contestants)
    assert "exact" not in board.contestants


def test_dampings_are_larger_in_standard_parametrisation() -> None:
    stock = toy(settings={"parametrisation": "standard"})
    assert damping_on(stock, 1e-3) == pytest.approx(0.03)
    assert damping_on(stock, 0.0) == 0
    assert damping_on(stock, ng.RelativeDamping(0.1)) == ng.RelativeDamping(0.1)
    adaptive = damping_on(stock, ng.LevenbergMarquardt(initial=0.1, minimum=1e-4))
    assert isinstance(adaptive, ng.LevenbergMarquardt)
    assert (adaptive.initial, adaptive.minimum) == pytest.approx((3.0, 0.3))
    assert find_contestant("sgd").space(stock)[-1] < find_contestant("sgd").space(toy())[-1]
    assert find_contestant("kfac-average").space(stock) == find_contestant("kfac-average").rates


@pytest.mark.parametrize("name", [*AVERAGED, "exact-momentum"])
def test_facts_of_what_people_run_on_mini_batches(name: str) -> None:
    facts = find_contestant(name).facts()
    assert facts["family"] == "natural-gradient"
    assert facts["fisher"] == "Monte-Carlo, 1 sample"
    assert facts["rate_rule"].startswith("tuned")
    assert "momentum 0.9" in facts["title"]
    assert facts["structure"] in contestants()[name.split("-")[0]].facts()["structure"]


@pytest.mark.parametrize("name", ["kfac-average", "exact-momentum"])
def test_the_first_step_is_a_natural_one_and_the_second_remembers_it(name: str) -> None:
    workload, entry, rate = toy(), find_contestant(name), 0.01
    data, model = workload.data(), workload.model(3)
    program = OptaxProgram(entry, workload)
    rows, draw = np.arange(4), jax.random.split(jax.random.key(3))[1]
    assert entry.structure is not None
    assert isinstance(entry.damping, float)
    direction = ng.natural_gradient(
        model, jnp.asarray(data.x_train[rows]), jnp.asarray(data.y_train[rows]),
        structure=entry.structure, loss=ENTROPY, damping=entry.damping, fisher="mc", key=draw,
    )  # fmt: skip
    first = program.step(program.start(3, rate), rows)
    moved = jax.tree.map(lambda leaf: np.asarray(leaf), program.parameters(first))
    wanted = jax.tree.map(lambda leaf, slope: leaf - rate * slope, nnx.state(model), direction)
    for here, there in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-5)
    # at a rate of 0 the step before is still carried on by the momentum behind the averages
    still = program.parameters(program.step((*first[:2], jnp.float32(0)), rows))
    change = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), still, moved)
    assert (max(jax.tree.leaves(change)) > 1e-4) == (name != "exact-momentum")


def test_the_rate_of_theory_is_that_of_the_coefficient_matrix() -> None:
    workload = toy(loss=ng.MeanSquaredError())
    entry = find_contestant("diagonal")
    rule = TheoreticalRate(entry, workload, OptaxProgram(entry, workload))
    assert rule.note == "1/lambda_max on the first batch"
    x = jnp.asarray(workload.data().x_train[:4])
    assert isinstance(entry.damping, ng.RelativeDamping)
    expected = ng.optimal_learning_rate(
        ng.Diagonal(), workload.model(3), x=x, damping=entry.damping
    )
    assert rule(3) == pytest.approx(expected, rel=0.05)


def test_spectrum_and_cost_of_a_structure_on_a_convnet() -> None:
    workload = toy()
    found = structure_outcome(find_contestant("kfac"), workload)
    assert found["status"] == "measured"
    assert found["samples"] == 4
    assert found["alpha"] > 0
    assert found["nonzeros"] is found["stored"] is None
    # forward, to the inputs and to the weights: 2 flops a sample, position and parameter
    assert found["sgd_flops"] == 3 * 2 * 4 * (16 * 5 * 3 + 49 * 3)
    described = ng.describe(workload.model(0), workload.data().x_train[:4], structure=ng.KFAC(),
                            loss=ENTROPY, fisher="exact")  # fmt: skip
    layers = described.layers
    assert found["flops"] == sum(a.flops + a.approximation.flops for a in layers)  # type: ignore[union-attr, operator]


@pytest.fixture
def _cleared() -> Iterator[None]:
    yield
    trial._program.cache_clear()
    trial._evaluation.cache_clear()


@pytest.mark.usefixtures("_cleared")
def test_a_short_trial_of_real_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = dataclasses.replace(find_workload("digits-conv"), max_steps=12)
    monkeypatch.setattr(trial, "find_workload", lambda name: workload)
    config = configuration(
        workload, "kfac-average", 0, target=1.0, role="evaluation", learning_rate=0.01
    )
    outcome = execute(config)["outcome"]
    assert outcome["status"] == "reached"
    assert outcome["curve"]["train"][0] > 2
    assert outcome["final"] < 1.0
    assert 1 < outcome["steps_to_target"] <= 12
    assert outcome["rate_note"] == "tuned"
