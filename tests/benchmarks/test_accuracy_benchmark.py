"""The suite of accuracy: its figures are those of a training by other code, its skips say why."""

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import pytest
from flax import nnx

from benchmarks import accuracy, dynamics
from benchmarks.accuracy import Accuracy, NetworkAccuracy
from ntk_analysis.methods import LearningRate
from ntk_analysis.training import Trainer

SMALL = natgrad_datasets.load("digits", num_train=20, num_test=60)


def test_figures_are_those_of_the_trainer():
    found = accuracy.measure_accuracy(SMALL, "block-diagonal", 128)
    method, model = dynamics.find_method("block-diagonal"), dynamics.make_model(SMALL, 128)
    x, y = jnp.asarray(SMALL.x_train), jnp.asarray(SMALL.y_train)
    trainer = Trainer(model, method.structure, x, y, SMALL.x_test, method.damping)
    run = trainer.run(1 / 3, max(accuracy.STEPS))
    residuals = run.outputs_train - SMALL.y_train
    start = np.sum(residuals[0] ** 2)
    for step in accuracy.STEPS:
        loss = np.sum(residuals[step] ** 2) / start
        wrong = run.outputs_test[step].argmax(axis=1) != SMALL.labels_test
        assert found[f"loss {step}"] == pytest.approx(loss, rel=0.02, abs=1e-6)
        # one image may lie on the border of two classes
        assert found[f"error {step}"] == pytest.approx(100 * wrong.mean(), abs=100 / 60 + 1e-9)
    assert found[f"error {max(accuracy.STEPS)}"] < 80


def test_suite_reads_what_it_measured_once(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        accuracy,
        "measure_accuracy",
        lambda data, *case: measured.append((data.name, *case)) or {"loss 1": 0.5, "error 1": 30.0},
    )
    for _ in range(2):
        suite, case = Accuracy(), ("digits", "exact", 64, 1)
        suite.setup(str(tmp_path), *case)
        assert suite.track_training_loss(str(tmp_path), *case) == 0.5
        assert suite.track_test_error(str(tmp_path), *case) == 30.0
    assert measured == [("digits", "exact", 64)]


def test_mnist_is_skipped_with_its_reason_where_files_are_absent(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NATGRAD_BENCH_PROFILE", "fast")
    assert Accuracy().skipped("digits", "exact", 256) is None
    with pytest.raises(NotImplementedError, match=r"files of mnist are not there; .*NATGRAD"):
        Accuracy().setup(str(tmp_path), "mnist", "exact", 256, 1)
    assert "5 s a step" in Accuracy().skipped("mnist", "unit-wise", 256)
    monkeypatch.setenv("NATGRAD_BENCH_PROFILE", "regular")
    assert "files of mnist" in Accuracy().skipped("mnist", "unit-wise", 256)


def test_a_loss_far_above_theory_fails(monkeypatch):
    train = accuracy.train

    def stuck(*arguments):
        trained = train(*arguments)
        outputs = np.repeat(trained.outputs[:1], len(trained.outputs), axis=0)
        return dynamics.Trained(outputs, trained.first_move)

    monkeypatch.setattr(accuracy, "train", stuck)
    with pytest.raises(
        ArithmeticError, match="exact: after 5 steps 1 of the training loss is left"
    ):
        accuracy.measure_accuracy(SMALL, "exact", 32)


def test_a_tolerance_for_each_rule(monkeypatch):
    seen = []
    monkeypatch.setattr(accuracy, "check_first_step", lambda *arguments: seen.append(arguments[-1]))
    monkeypatch.setattr(accuracy, "SLACK", 1e9)
    shape = (max(accuracy.STEPS) + 1, 80, 10)
    trained = dynamics.Trained(np.zeros(shape), np.zeros(shape[1:]))
    monkeypatch.setattr(accuracy, "train", lambda *arguments: trained)
    for note in ("", "a condition fails"):
        monkeypatch.setattr(
            accuracy, "theoretical_learning_rate", lambda *a, n=note: LearningRate(0.1, "", n)
        )
        accuracy.measure_accuracy(SMALL, "exact", 16)
    assert seen == [accuracy.TOLERANCE, accuracy.LOOSE_TOLERANCE]


@pytest.mark.parametrize("suite", [Accuracy, NetworkAccuracy])
def test_what_the_suite_shows_is_named_and_has_units(suite):
    assert len(suite.params) == len(suite.param_names)
    tracks = [getattr(suite, name) for name in dir(suite) if name.startswith("track_")]
    assert len(tracks) == 2
    assert all(track.unit and track.__doc__ for track in tracks)


def test_figures_of_a_network_are_those_of_a_loop_by_hand(monkeypatch):
    monkeypatch.setattr(accuracy, "BATCH_STEPS", (1, 3))
    workload = accuracy.NETWORKS["digits-conv"].workload
    found = accuracy.measure_network(workload, "sgd", 0.3)
    data, (graphdef, state) = workload.data(), nnx.split(workload.model(0))
    rng = np.random.default_rng(0)
    order = rng.permutation(1400)

    @jax.jit
    def cross_entropy(state, x, y):
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(nnx.merge(graphdef, state)(x)), axis=1))

    slope = jax.jit(jax.grad(cross_entropy))
    first = cross_entropy(state, data.x_train, data.y_train)
    for step in range(1, 4):
        rows = order[64 * (step - 1) : 64 * step]
        change = slope(state, data.x_train[rows], data.y_train[rows])
        state = jax.tree.map(lambda leaf, part: leaf - 0.3 * part, state, change)
        if step in (1, 3):
            loss = cross_entropy(state, data.x_train, data.y_train) / first
            assert found[f"loss {step}"] == pytest.approx(float(loss), rel=1e-3)
    classes = nnx.merge(graphdef, state)(data.x_held_out).argmax(axis=1)
    wrong = 100 * np.mean(classes != data.y_held_out.argmax(axis=1))
    # one image may lie on the border of two classes
    assert found["error 3"] == pytest.approx(float(wrong), abs=100 / 360 + 1e-4)


def test_a_network_that_does_not_learn_fails(monkeypatch):
    monkeypatch.setattr(accuracy, "BATCH_STEPS", (1, 2))
    workload = accuracy.NETWORKS["digits-conv"].workload
    with pytest.raises(ArithmeticError, match="sgd on digits-conv: after 2 steps 1 of the"):
        accuracy.measure_network(workload, "sgd", 0.0)


def test_networks_of_cifar_are_skipped_with_their_reason(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, entry in accuracy.NETWORKS.items():
        reason = NetworkAccuracy().skipped(name, "kfac-average", 5)
        assert ("files of cifar10" in reason) if name.startswith("cifar") else reason is None
        assert entry.workload.metric == "error"
        assert set(entry.rates) == {"kfac-average", "exact-momentum"}
