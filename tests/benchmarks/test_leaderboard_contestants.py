"""The contestants of the leaderboard: their facts, where they run, and single steps of them."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant, contestants, find_contestant
from benchmarks.leaderboard.natural import damping_on, fisher_on
from benchmarks.leaderboard.program import OptaxProgram
from benchmarks.leaderboard.rates import PowerMethod
from benchmarks.leaderboard.workload import Data, Workload, find_workload
from ntk_analysis.palette import STYLES

FIRST_ORDER = ("adam", "adamw", "momentum", "muon", "sgd")
STRUCTURES = {
    "exact": ng.Exact,
    "block-diagonal": ng.BlockDiagonal,
    "block-tri-diagonal": ng.BlockTriDiagonal,
    "kfac": ng.KFAC,
    "ekfac": ng.EKFAC,
    "unit-wise": ng.UnitWise,
    "diagonal": ng.Diagonal,
    "quasi-diagonal": ng.QuasiDiagonal,
}
MSE = ng.MeanSquaredError()
SUFFIXES = ("", "-lm", "-tuned", "-mc", "-mc-lm", "-mc-tuned")
OURS = tuple(f"{name}{suffix}" for name in STRUCTURES for suffix in SUFFIXES)


def toy(
    *, outputs: int = 1, bias: float = 0.0, batch: int | None = None, loss: ng.Loss = MSE
) -> Workload:
    """A tiny workload: 6 samples of 4 inputs, one hidden layer of 8 units."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4)).astype(np.float32)
    y = rng.standard_normal((6, outputs)).astype(np.float32)
    if loss != MSE:
        y = np.eye(outputs, dtype=np.float32)[np.argmax(y, axis=1)]
    return dataclasses.replace(
        find_workload("digits-mse"),
        name="toy",
        dataset=None,
        data=lambda: Data(x, y, x, y),
        model=lambda seed: ng.MLP((4, 8, outputs), bias_variance=bias, rngs=nnx.Rngs(seed)),
        batch_size=batch,
        loss=loss,
    )


def one_step(name: str, workload: Workload, rate: float) -> nnx.State:
    program = OptaxProgram(find_contestant(name), workload)
    state = program.start(3, rate)
    rows = None if workload.batch_size is None else np.arange(workload.batch_size)
    return program.parameters(program.step(state, rows))


def assert_step(moved: nnx.State, workload: Workload, direction: nnx.State, rate: float) -> None:
    start = nnx.state(workload.model(3))
    wanted = jax.tree.map(lambda leaf, slope: leaf - rate * slope, start, direction)
    for here, there in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_every_structure_comes_in_every_variant() -> None:
    assert {*OURS, *FIRST_ORDER, "lbfgs"} <= set(contestants())


@pytest.mark.parametrize("name", OURS)
def test_facts_of_a_structure(name: str) -> None:
    entry = find_contestant(name)
    facts = entry.facts()
    assert json.loads(json.dumps(facts)) == facts
    prefix = max((key for key in STRUCTURES if name.startswith(key)), key=len)
    assert facts["structure"] == STRUCTURES[prefix].__name__
    assert facts["structure"] in STYLES
    assert facts["family"] == "natural-gradient"
    assert facts["damping"]
    assert facts["fisher"] == ("Monte-Carlo, 1 sample" if "-mc" in name else "true")
    assert ("Levenberg-Marquardt" in facts["damping"]) == name.endswith("-lm")
    assert (facts["rate_rule"] == "theoretical") != name.endswith("-tuned")


def test_the_theory_runs_undamped() -> None:
    for name in ("exact", "block-diagonal", "block-tri-diagonal", "kfac"):
        assert find_contestant(name).facts()["damping"] == "none: pseudo-inverse"


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_facts_of_a_first_order_method(name: str) -> None:
    facts = find_contestant(name).facts()
    assert facts["family"] == "first-order"
    assert facts["structure"] == facts["fisher"] == facts["damping"] == ""
    assert facts["rate_rule"] == "tuned, 3 studies of 5 trials"


def test_every_search_space_spans_decades() -> None:
    """Five trials a study: in a wider one they would stand too far apart."""
    for entry in contestants().values():
        for space in filter(None, (entry.rates, entry.standard_rates)):
            low, high = space
            assert 100 <= round(high / low) <= 500


def test_titles_differ() -> None:
    titles = [entry.title for entry in contestants().values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    "rates", [(), (0.1,), (0.1, 0.1), (0.0, 0.1), (-1.0, 0.1), (0.1, float("inf"))]
)
def test_what_is_no_search_space_is_refused(rates: tuple[float, ...]) -> None:
    words = r"half: a tuned one names the smallest and the largest .*" + re.escape(f"got {rates}")
    with pytest.raises(ValueError, match=words):
        Contestant("half", "Half", "first-order", "tuned", rates=rates)
    if rates:
        with pytest.raises(ValueError, match=words):
            Contestant(
                "half", "Half", "first-order", "tuned", rates=(0.1, 0.2), standard_rates=rates
            )
        with pytest.raises(ValueError, match="another none"):
            Contestant("half", "Half", "first-order", "fixed", rates=rates)


def test_six_rates_of_earlier_rules_are_the_space_between_their_ends() -> None:
    six = (0.3, 0.1, 0.03, 0.01, 3.0, 1.0)
    entry = Contestant("old", "Old", "first-order", "tuned", rates=six)
    assert entry.space(toy()) == (0.01, 3.0)


@pytest.mark.parametrize(
    ("name", "workload", "reason"),
    [
        ("lbfgs", toy(batch=3), "full batches"),
        ("lbfgs", toy(), ""),
        ("deep-linear", toy(), "linear networks and squared error"),
        ("deep-linear", find_workload("matrix-completion"), "linear networks"),
        ("deep-linear", find_workload("linear-teacher"), ""),
        ("online", toy(batch=3), ""),
        ("exact", toy(batch=3), "full batch"),
        ("exact", toy(), ""),
        ("exact-mc", toy(), ""),
        ("exact-mc", toy(outputs=2), ""),
        ("quasi-diagonal", toy(), "it is the diagonal"),
        ("quasi-diagonal", toy(bias=0.1), ""),
        ("exact-tuned", find_workload("linear-teacher"), "side 6400"),
        ("exact-mc-tuned", find_workload("linear-teacher"), ""),
        ("block-tri-diagonal-mc-lm", find_workload("linear-teacher"), "side 6400"),
        ("kfac-tuned", find_workload("linear-teacher"), ""),
    ],
)
def test_unsuitable_pairs_say_why(name: str, workload: Workload, reason: str) -> None:
    found = find_contestant(name).unsuitable(workload)
    assert reason in found if reason else found == ""


def test_one_output_needs_no_sampling() -> None:
    assert fisher_on(toy(), "mc") == fisher_on(toy(), "exact") == "exact"
    assert fisher_on(toy(outputs=2), "mc") == "mc"
    assert fisher_on(toy(outputs=2), "exact") == "exact"


def test_true_fisher_of_the_autoencoder_does_not_fit() -> None:
    workload = find_workload("mnist-autoencoder")
    if workload.missing():
        pytest.skip(workload.missing())
    assert "784 backward passes" in find_contestant("kfac-tuned").unsuitable(workload)
    assert find_contestant("kfac-mc-tuned").unsuitable(workload) == ""


@pytest.mark.parametrize("loss", [ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()])
def test_adaptive_damping_has_a_floor_of_the_loss(loss: ng.Loss) -> None:
    entry, workload = find_contestant("exact-lm"), toy(outputs=3, loss=loss)
    assert isinstance(entry.damping, ng.LevenbergMarquardt)
    found = damping_on(workload, entry.damping)
    floor = 0.01 if isinstance(loss, ng.SoftmaxCrossEntropy) else entry.damping.minimum
    assert found == dataclasses.replace(entry.damping, minimum=floor)
    assert damping_on(workload, 0.3) == 0.3


@pytest.mark.parametrize("name", ["kfac-mc-lm", "diagonal-mc-lm"])
def test_largest_eigenvalue_under_cross_entropy_on_batches(name: str) -> None:
    workload = toy(outputs=3, batch=4, loss=ng.SoftmaxCrossEntropy())
    entry = find_contestant(name)
    assert entry.structure is not None
    x = jnp.asarray(workload.data().x_train[:4])
    graphdef, state = nnx.split(workload.model(3))
    draw = jax.random.split(jax.random.key(3))[1]

    @jax.jit
    def column(vector: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        direction = ng.natural_gradient(
            model, x, jax.nn.softmax(model(x)) - vector.reshape(4, 3), structure=entry.structure,
            loss=workload.loss, damping=0.01, fisher="mc", key=draw,
        )  # fmt: skip
        f, moved = jax.jvp(lambda s: nnx.merge(graphdef, s)(x), (state,), (direction,))
        return jnp.einsum("ncd,nd->nc", workload.loss.fisher(f), moved).reshape(-1)

    rows = [column(vector) for vector in jnp.eye(12)]
    expected = float(jnp.max(jnp.abs(jnp.linalg.eigvals(jnp.stack(rows)))))
    found = PowerMethod(entry, workload, OptaxProgram(entry, workload))(3, 100)
    assert found == pytest.approx(expected, rel=0.02)


def test_a_step_of_sgd() -> None:
    workload = toy(batch=3)
    data, model = workload.data(), workload.model(3)
    graphdef, parameters = nnx.split(model)

    def loss(state: nnx.State) -> jax.Array:
        return jnp.sum((nnx.merge(graphdef, state)(data.x_train[:3]) - data.y_train[:3]) ** 2) / 6

    assert_step(one_step("sgd", workload, 0.7), workload, jax.grad(loss)(parameters), 0.7)


@pytest.mark.parametrize("name", ["exact", "kfac-tuned"])
def test_a_natural_step(name: str) -> None:
    workload, entry = toy(), find_contestant(name)
    data = workload.data()
    assert entry.structure is not None
    assert isinstance(entry.damping, float | ng.RelativeDamping)
    direction = ng.natural_gradient(
        workload.model(3),
        jnp.asarray(data.x_train),
        jnp.asarray(data.y_train),
        structure=entry.structure,
        loss=workload.loss,
        damping=entry.damping,
    )
    assert_step(one_step(name, workload, 0.5), workload, direction, 0.5)


@pytest.mark.parametrize("name", ["diagonal", "exact"])
def test_largest_eigenvalue_is_that_of_the_coefficient_matrix(name: str) -> None:
    workload, entry = toy(), find_contestant(name)
    x, model = jnp.asarray(workload.data().x_train), workload.model(3)
    program = OptaxProgram(entry, workload)
    assert entry.structure is not None
    assert isinstance(entry.damping, float | ng.RelativeDamping)
    rate = ng.optimal_learning_rate(entry.structure, model, x=x, damping=entry.damping)
    found = PowerMethod(entry, workload, program)(3, 50)
    assert found == pytest.approx(1 / rate, rel=0.02)


@pytest.mark.parametrize("name", ["lbfgs", "online", "deep-linear"])
def test_a_step_at_rate_1_lowers_the_loss(name: str) -> None:
    workload = toy()
    if name == "deep-linear":
        linear = ng.MLP((4, 8, 1), activation="identity", rngs=nnx.Rngs(3))
        workload = dataclasses.replace(workload, model=lambda seed: linear)
    data = workload.data()

    def loss(state: nnx.State) -> float:
        model = nnx.merge(nnx.graphdef(workload.model(3)), state)
        return float(workload.loss(model(jnp.asarray(data.x_train)), jnp.asarray(data.y_train)))

    assert loss(one_step(name, workload, 1.0)) < loss(nnx.state(workload.model(3)))


def test_a_peer_says_why_it_does_not_run() -> None:
    entry = find_contestant("kfac-jax")
    assert entry.facts()["family"] == "peer"
    assert entry.unsuitable(toy()).startswith("kfac-jax ")


def test_unknown_contestant_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'kfac'"):
        find_contestant("k-fac")
