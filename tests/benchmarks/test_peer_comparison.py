"""natgrad beside a peer: one in NumPy, and in the slow tests those that are installed."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_peer
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks import common, peers
from benchmarks.peer_comparison import __main__ as command
from benchmarks.peer_comparison import environments, exchange, measure, ours
from benchmarks.peer_comparison.client import PeerError, Worker
from benchmarks.peer_comparison.comparisons import COMPARISONS, STEP, Comparison
from benchmarks.peer_comparison.environments import PEERS, Peer
from benchmarks.peer_comparison.examples import LARGE, SMALL, Example, as_problem
from benchmarks.peer_comparison.measure import Agreement, Findings, Pace
from benchmarks.peer_comparison.tables import agreement_record, markdown, pace_record

NUMPY = Peer("numpy", "numpy_peer", ".venv-peers-none")
QUANTITIES = sorted({row.quantity for rows in COMPARISONS.values() for row in rows})
STEPS = [name for name in QUANTITIES if name.startswith("step/")]


@pytest.fixture
def numpy_side(monkeypatch):
    """The NumPy peer can be found, and is imported by its worker."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"))
    monkeypatch.setitem(PEERS, "numpy", NUMPY)


@pytest.fixture
def small():
    """A problem that needs no model."""
    rng = np.random.default_rng(0)
    layers = (
        exchange.Layer(
            rng.normal(size=(2, 3, 1, 2)), rng.normal(size=2), 0.5, (2, 1), ((0, 1),) * 2
        ),
        exchange.Layer(rng.normal(size=(12, 3)), None, 2.0),
    )
    x, y, drawn = rng.normal(size=(5, 4, 4, 1)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    return exchange.Problem(layers, "tanh", "flatten", "mse", x, y, drawn, 0.25)


def agreement(difference: float, peer: str = "curvlinops", example: str = "MLP") -> Agreement:
    row = next(row for row in COMPARISONS[peer] if row.quantity == STEP)
    return Agreement(example, row, difference, 1e-4)


PACE = Pace("MLP", (0.1, 0.2, 0.3), (1.0, 1.2, 9.0), (0.1, 0.1, 0.1), (0.8, 0.8, 0.8))


def test_a_problem_travels(tmp_path, small):
    exchange.save(tmp_path / "problem.npz", small)
    found = exchange.load(tmp_path / "problem.npz")
    for name in ("x", "y", "drawn"):
        np.testing.assert_array_equal(getattr(found, name), getattr(small, name))
    for name in ("activation", "pooling", "loss", "damping", "num_samples", "num_outputs"):
        assert getattr(found, name) == getattr(small, name)
    for here, there in zip(found.layers, small.layers, strict=True):
        np.testing.assert_array_equal(here.kernel, there.kernel)
        assert (here.bias is None) == (there.bias is None)
        assert (here.scale, here.strides, here.pads) == (there.scale, there.strides, there.pads)
    assert [layer.num_params for layer in found.layers] == [14, 36]
    assert [layer.fan_in for layer in found.layers] == [6, 12]


@pytest.mark.parametrize("name", SMALL)
def test_a_model_as_arrays_has_its_outputs_and_draws(x64, name):
    example = SMALL[name]()
    problem = as_problem(example)
    side = numpy_peer.Side(problem)
    outputs, _ = side.forward(side.params)
    np.testing.assert_allclose(outputs, example.model(example.x), rtol=1e-12)
    residual = example.loss.residual(jnp.asarray(outputs), jnp.asarray(problem.drawn))
    wanted = example.loss.sample(example.key, jnp.asarray(outputs), 1)[..., 0]
    np.testing.assert_allclose(residual, wanted, rtol=1e-10, atol=1e-12)


def test_every_quantity_is_that_of_its_definition(numpy_side):
    names = [name for name in QUANTITIES if name not in STEPS]
    rows = [Comparison(name, "NumPy") for name in [*names, "step/kfac/exact", STEP]]
    with Worker(NUMPY, sys.executable) as worker:
        name = next(iter(SMALL))
        found = measure.compare(worker, name, measure.small_side(name), rows)
    assert [entry.comparison.quantity for entry in found] == [row.quantity for row in rows]
    assert {entry.tolerance for entry in found} == {1e-10}
    assert measure.disagreement(found) == ""


def test_factors_of_convolutions_are_those_of_their_definition(x64):
    example = SMALL["ConvNet, cross-entropy"]()
    side, oracle = ours.Side(example), numpy_peer.Side(as_problem(example))
    for name in ("kfac/exact", "kfac-reduce/exact", "ekfac/exact"):
        found = exchange.relative_difference(side.quantity(name), oracle.quantity(name))
        assert found < 1e-10, name


def test_differences_are_seen():
    wanted = np.array([3.0, 4.0])
    assert exchange.relative_difference(wanted, wanted) == 0
    assert exchange.relative_difference(1.01 * wanted, wanted) == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"the peer gives \(2,\), natgrad \(3,\)"):
        exchange.relative_difference(wanted, np.ones(3))
    assert agreement(1e-4).holds
    assert not agreement(2e-4).holds
    assert not agreement(np.nan).holds
    text = measure.disagreement([agreement(1e-5), agreement(2e-4)])
    assert text == "step/kfac/mc of MLP by 0.0002 (at most 0.0001)"


def test_a_worker_answers_and_its_failures_have_reasons(numpy_side, small):
    with Worker(NUMPY, sys.executable) as worker:
        with pytest.raises(PeerError, match="numpy: RuntimeError: no problem has been loaded"):
            worker.step()
        worker.load(small)
        assert worker.versions == {"numpy": np.__version__}
        seconds, busy = worker.step()
        assert 0.01 <= seconds < 60
        assert busy < seconds
        with pytest.raises(PeerError, match="no attribute 'nonsense'"):
            worker.quantity("nonsense/exact")
        found = worker.quantity("gradient")
        np.testing.assert_array_equal(found, numpy_peer.Side(small).quantity("gradient"))
        with pytest.raises(PeerError, match="numpy: its process ended: it ended"):
            worker.quantity("end")
        with pytest.raises(PeerError, match="its process ended"):
            worker.step()


def test_a_worker_that_does_not_answer_is_given_up(numpy_side, small):
    with Worker(NUMPY, sys.executable) as worker:
        worker.load(small)
        worker._patience = 0.2
        with pytest.raises(PeerError, match=r"numpy: no answer within 0\.2 s"):
            worker.quantity("sleep")
    assert worker._process.returncode is not None


def test_a_worker_without_its_library_says_so(numpy_side, small):
    missing = Peer("missing", "no_such_module", "")
    with (
        Worker(missing, sys.executable) as worker,
        pytest.raises(PeerError, match="no_such_module"),
    ):
        worker.load(small)
    with pytest.raises(PeerError, match="/nowhere/python cannot be run"):
        Worker(missing, "/nowhere/python")


def test_steps_alternate_and_medians_count(monkeypatch):
    log = []

    class Steps:
        def __init__(self, example=None):
            self.mark = "ours" if example else "theirs"

        def step(self):
            log.append(self.mark)
            return 0.5, 0.25

    monkeypatch.setattr(ours, "Training", Steps)
    found = measure.pace(Steps(), "MLP", "an example", 3)
    assert log == ["ours", "theirs"] * (measure.WARM_UP + 3)
    assert len(found.ours) == len(found.ours_busy) == 3
    assert found.theirs == (0.5,) * 3
    assert found.theirs_busy == (0.25,) * 3
    assert PACE.ratio == pytest.approx(6)
    assert PACE.busy_ratio == pytest.approx(8)


def test_our_training_is_kfac_with_another_draw_each_step():
    trained, model = (ng.MLP((3, 4, 3), rngs=nnx.Rngs(0)) for _ in range(2))
    x, y = jax.random.normal(jax.random.key(0), (5, 3)), jax.nn.one_hot(jnp.arange(5) % 3, 3)
    key = jax.random.key(1)
    training = ours.Training(Example(trained, x, y, ng.SoftmaxCrossEntropy(), key, 0.1))
    for count in range(2):
        direction = ng.natural_gradient(
            model, x, y, structure=ours.KFAC, loss=ng.SoftmaxCrossEntropy(), damping=0.1,
            fisher="mc", key=jax.random.fold_in(key, count),
        )  # fmt: skip
        step = jax.tree.map(lambda slope: ours.RATE * slope, direction)
        nnx.update(model, jax.tree.map(jnp.subtract, nnx.state(model), step))
        training.step()
    wanted = jax.tree.leaves(nnx.state(model))
    for here, there in zip(jax.tree.leaves(training.state), wanted, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias_variance": 0.5}, "use bias_variance=0 or 1, not 0.5"),
        ({"activation": "gelu"}, "activations relu, tanh, not 'gelu'"),
        ({"padding": "CIRCULAR"}, "convolutions with zeros around"),
    ],
)
def test_models_that_peers_would_have_otherwise_are_refused(change, reason):
    model = ng.ConvNet((4, 4, 1), (2,), 3, strides=1, rngs=nnx.Rngs(0), **change)
    x, y = jnp.ones((2, 4, 4, 1)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=reason):
        as_problem(Example(model, x, y, ng.MeanSquaredError(), jax.random.key(0), 0.1))


def test_other_models_are_refused():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    example = Example(
        model, jnp.ones((2, 2)), jnp.ones((2, 3)), ng.MeanSquaredError(), jax.random.key(0), 0.1
    )
    with pytest.raises(TypeError, match=r"an ng\.MLP or ng\.ConvNet, not a Linear"):
        as_problem(example)


def test_where_a_peer_is_found(monkeypatch, tmp_path):
    peer = PEERS["kfac-jax"]
    monkeypatch.setattr(environments, "version", {"kfac-jax": "0.0.8"}.__getitem__)
    assert environments.find_python(peer, tmp_path) == sys.executable
    own = tmp_path / ".venv-peers-jax" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert environments.find_python(peer, tmp_path) == str(own)
    monkeypatch.undo()
    assert environments.find_python(NUMPY, tmp_path) == sys.executable
    absent = Peer("no-such-distribution", "", ".venv-none")
    assert environments.find_python(absent, tmp_path) == ""
    assert "no-such-distribution is not installed: `make peers`" in environments.reason(absent)
    with pytest.raises(ValueError, match="unknown peer 'kfac_jaxx'; did you mean 'kfac-jax'"):
        environments.find_peer("kfac_jaxx")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--peer", "curvlinop"], "did you mean 'curvlinops'"),
        (["--network", "covnet"], "did you mean 'convnet'"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--python", "/nowhere/python"], "--python /nowhere/python: there is no such file"),
    ],
)
def test_bad_arguments(capsys, arguments, reason):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_peers_that_are_not_there_are_rows_with_their_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "find_python", lambda peer: "")
    assert command.main(["--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [entry["peer"] for entry in document["skipped"]] == list(PEERS)
    assert document["paces"] == document["agreements"] == []
    assert "kfac-jax: kfac-jax is not installed" in capsys.readouterr().out


def test_the_command_writes_both_tables_and_fails_where_something_is_apart(monkeypatch, tmp_path):
    differences = iter([1e-6, 1e-7, 0.5, 1e-6])

    def examine(name, python, small, large, repeats):
        assert (python, repeats) == (sys.executable, 2)
        assert (small, large) in ((list(SMALL), []), ([], ["ConvNet"]))
        if name == "nngeometry":
            raise PeerError("it broke")
        return Findings({"torch": "2.15"}, [agreement(next(differences))], [PACE] * len(large))

    monkeypatch.setattr(command, "examine", examine)
    arguments = ["--python", sys.executable, "--network", "convnet", "--repeats", "2"]
    arguments += ["--out", str(tmp_path), "--peer"]
    assert command.main([*arguments, "curvlinops", "nngeometry"]) == 0
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| MLP | curvlinops | 1200 | 200 | 6.0 | 8.0 | 5 |" in text
    assert "| 1.0e-06 | 0.0001 |" in text
    assert text.count("| curvlinops | 1200 |") == 1
    assert text.endswith("nngeometry: ConvNet: it broke\n")
    assert command.main([*arguments, "curvlinops"]) == 1


def test_slow_networks_are_timed_only_by_name(monkeypatch, tmp_path, capsys):
    timed = []

    def examine(name, python, small, large, repeats):
        timed.extend(large)
        return Findings({}, [], [])

    monkeypatch.setattr(command, "examine", examine)
    settings = ["--python", sys.executable, "--out", str(tmp_path), "--no-matrices"]
    assert command.main([*settings, "--peer", "kfac-jax"]) == 0
    assert timed == ["MLP 784-1024-1024-10", "ConvNet 16x16, N=32"]
    assert "kfac-jax: ConvNet: kfac-jax makes the input factors" in capsys.readouterr().out
    timed.clear()
    assert command.main([*settings, "--peer", "kfac-jax", "--network", "ConvNet"]) == 0
    assert timed == ["ConvNet"]
    timed.clear()
    assert command.main([*settings, "--peer", "nngeometry"]) == 0
    assert timed == command.TIMED
    timed.clear()
    assert command.main([*settings, "--peer", "nngeometry", "--network"]) == 0
    assert timed == []


def test_tables_take_the_largest_difference_of_a_quantity():
    entries = [agreement(1e-6, example="one"), agreement(3e-6, example="two")]
    records = [agreement_record("curvlinops", entry) for entry in entries]
    document = {"paces": [pace_record("curvlinops", PACE)], "agreements": records, "skipped": []}
    rows = markdown(document).split("\n")
    assert "one; two | 3.0e-06 | 0.0001" in rows[-1]
    records.append(agreement_record("curvlinops", agreement(np.nan, example="three")))
    assert "(apart)" in markdown(document)


def test_the_suite_leaves_out_what_is_not_there(monkeypatch):
    suite = peers.PeerStep()
    monkeypatch.setenv(common.VARIABLE, "regular")
    monkeypatch.setattr(peers, "find_python", lambda peer: "")
    assert "kfac-jax is not installed" in str(suite.skipped("kfac-jax", "ConvNet"))
    monkeypatch.setattr(peers, "find_python", lambda peer: "python")
    assert suite.skipped("kfac-jax", "ConvNet 16x16, N=32") is None
    assert suite.skipped("curvlinops", "ConvNet") is None
    assert "ConvNet 16x16, N=32 stands for it" in str(suite.skipped("kfac-jax", "ConvNet"))
    monkeypatch.setenv(common.VARIABLE, "fast")
    assert "ten minutes" in str(suite.skipped("kfac-jax", "ConvNet"))


def test_the_suite_measures_and_checks(monkeypatch):
    found = {"difference": 1e-6}

    def examine(name, python, small, large, repeats):
        if "broken" in found:
            raise PeerError("it broke")
        assert (name, small, large) == ("kfac-jax", [], ["ConvNet"])
        return Findings({}, [agreement(found["difference"])], [PACE])

    monkeypatch.setattr(peers, "examine", examine)
    figures = peers.PeerStep().measure("kfac-jax", "ConvNet")
    assert figures["ratio"] == pytest.approx(1 / 6)
    assert figures["ours"] == statistics.median(PACE.ours)
    assert figures["theirs"] == statistics.median(PACE.theirs)
    assert figures["difference"] == 1e-6
    found["difference"] = 0.5
    with pytest.raises(ArithmeticError, match="natgrad and kfac-jax differ in step/kfac/mc"):
        peers.PeerStep().measure("kfac-jax", "ConvNet")
    found["broken"] = True
    with pytest.raises(NotImplementedError, match="it broke"):
        peers.PeerStep().measure("kfac-jax", "ConvNet")


def test_no_times_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(PeerError, match="peers run on the CPU"):
        measure.examine("kfac-jax", sys.executable, [], [], 1)


@pytest.mark.parametrize("name", PEERS)
def test_sides_are_imported_without_their_libraries(monkeypatch, name):
    for module in ("torch", "curvlinops", "nngeometry", "kfac_jax"):
        monkeypatch.setitem(sys.modules, module, None)
    side = importlib.import_module(PEERS[name].side)
    assert importlib.reload(side).Side


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PEERS))
def test_peers_agree(name):
    python = environments.find_python(PEERS[name])
    if not python:
        pytest.skip(environments.reason(PEERS[name]))
    found = measure.examine(name, python, list(SMALL), [next(iter(LARGE))], 1)
    assert measure.disagreement(found.agreements) == ""
    assert len(found.agreements) == len(SMALL) * len(COMPARISONS[name]) + 1
    assert found.paces[0].ratio > 0
    assert PEERS[name].name in found.versions
