"""The workloads of the leaderboard: data, models, metrics and what their digest covers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard import plan
from benchmarks.leaderboard.samples import images
from benchmarks.leaderboard.targets import target_of, write_target
from benchmarks.leaderboard.trial import configuration, execute
from benchmarks.leaderboard.workload import METRICS, Workload, find_workload, workloads
from benchmarks.leaderboard.workloads import diagnosis, linear_teacher, matrix_completion

EQUATIONS = ("heat", "poisson-2d", "poisson-5d")
NAMES = (
    "cifar-conv", "cifar-residual", "cifar-transformer",
    "digits-classes", "digits-conv", "digits-fit", "digits-mse", "digits-rows", *EQUATIONS,
    "language-bytes", "linear-teacher",
    "linear-teacher-long", "matrix-completion", "mnist-autoencoder", "mnist-classes", "mnist-fit",
    "mnist-mse", "sparse-classification", *plan.PROFILES["diagnosis"].workloads,
)  # fmt: skip
SMALL = tuple(name for name in NAMES if not name.startswith(("mnist", "cifar")))
IMAGES = {"digits-conv": (8, 8, 1), **{n: (32, 32, 3) for n in NAMES if n.startswith("cifar")}}


def with_data(name: str) -> Workload:
    workload = find_workload(name)
    if workload.missing():
        pytest.skip(workload.missing())
    return workload


def rows(array: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in array}


def test_all_are_registered() -> None:
    assert sorted(workloads()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_data_and_model_fit_together(name: str) -> None:
    workload = with_data(name)
    data = workload.data()
    precision = np.float64 if workload.double else np.float32
    tokens = name == "language-bytes"
    for array in data:
        assert array.dtype == (np.int32 if tokens else precision)
        assert np.isfinite(array).all()
    assert len(data.x_train) == len(data.y_train) == workload.settings["num_train"]
    assert len(data.x_held_out) == len(data.y_held_out)
    workload.loss.check_targets(data.y_train)
    with jax.enable_x64(workload.double):
        outputs = nnx.eval_shape(lambda x: workload.model(0)(x), data.x_held_out[:3])
    assert outputs.shape == (*data.y_held_out[:3].shape, *[128] * tokens)
    assert outputs.dtype == precision
    assert workload.batch_size is None or workload.batch_size <= len(data.x_train)
    assert workload.metric in METRICS


@pytest.mark.parametrize("name", NAMES)
def test_held_out_samples_are_not_trained_on(name: str) -> None:
    data = with_data(name).data()
    assert not rows(data.x_train) & rows(data.x_held_out)


@pytest.mark.parametrize("name", SMALL)
def test_same_data_for_every_process_and_model_for_every_seed(name: str) -> None:
    workload = with_data(name)
    first = nnx.to_flat_state(nnx.state(workload.model(1)))
    again = nnx.to_flat_state(nnx.state(workload.model(1)))
    other = nnx.to_flat_state(nnx.state(workload.model(2)))
    for (_, a), (_, b), (_, c) in zip(first, again, other, strict=True):
        assert (a[...] == b[...]).all()
        # stock layers begin with biases of 0 and scales of 1
        assert len(np.unique(a[...])) == 1 or not (a[...] == c[...]).all()


@pytest.mark.parametrize("module", [linear_teacher, matrix_completion])
def test_drawn_data_is_the_same_when_drawn_again(module: object) -> None:
    drawn = module.data.__wrapped__()  # type: ignore[attr-defined]
    for here, there in zip(drawn, module.data(), strict=True):  # type: ignore[attr-defined]
        np.testing.assert_array_equal(here, there)


def test_nothing_is_read_or_computed_at_import() -> None:
    code = (
        "import builtins, natgrad_datasets, jax\n"
        "def refuse(*a, **k): raise AssertionError('work at import')\n"
        "natgrad_datasets.load = refuse\n"
        "import benchmarks.leaderboard.workload as w, benchmarks.leaderboard.contestant as c\n"
        "w.workloads(); c.contestants()\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'JAX was started'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {**find_workload("digits-mse").settings, "num_train": 61}},
        {"batch_size": 10},
        {"max_steps": 7},
        {"max_seconds": 7.0},
        {"metric": "rmse"},
        {"version": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_covers_what_makes_a_workload(change: dict[str, object]) -> None:
    workload = find_workload("digits-mse")
    assert dataclasses.replace(workload, **change).digest != workload.digest  # type: ignore[arg-type]
    assert dataclasses.replace(workload, title="another").digest == workload.digest


def test_images_have_the_norm_of_the_settings() -> None:
    data = images(find_workload("digits-classes").settings)
    for x in (data.x_train, data.x_held_out):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 8.0, rtol=1e-5)


@pytest.mark.parametrize("name", IMAGES)
def test_networks_with_shared_weights_see_images(name: str) -> None:
    workload = with_data(name)
    data, shape = workload.data(), IMAGES[name]
    assert data.x_train.shape[1:] == data.x_held_out.shape[1:] == shape
    norms = np.linalg.norm(data.x_train.reshape(len(data.x_train), -1), axis=1)
    # a pixel has the variance 1
    np.testing.assert_allclose(norms, np.sqrt(np.prod(shape)), rtol=1e-3)
    assert data.y_train.sum(axis=0).min() > 0.05 * len(data.y_train)
    model, x = workload.model(0), data.x_train[:4].copy()
    forward = jax.jit(lambda x: model(x))
    first = forward(x)[:2]
    # no sample sees the others of its batch
    x[2:] = 1 - x[2:]
    np.testing.assert_allclose(forward(x)[:2], first, rtol=1e-5, atol=1e-6)
    standard = workload.settings.get("parametrisation") == "standard"
    assert standard != isinstance(model, ng.ConvNet)


def test_digits_are_the_same_flat_and_as_images() -> None:
    flat, shaped = find_workload("digits-classes").data(), find_workload("digits-conv").data()
    np.testing.assert_array_equal(flat.x_train, shaped.x_train.reshape(flat.x_train.shape))
    np.testing.assert_array_equal(flat.y_held_out, shaped.y_held_out)


def test_autoencoder_reconstructs_pixels() -> None:
    data = with_data("mnist-autoencoder").data()
    assert data.x_train is data.y_train
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1


def test_linear_teacher_has_the_spectrum_and_the_noise_of_the_paper() -> None:
    data = find_workload("linear-teacher").data()
    eigenvalues = np.linalg.eigvalsh(np.cov(data.x_train.T))[::-1]
    np.testing.assert_allclose(eigenvalues, np.exp(-5 * np.arange(20) / 20), rtol=0.1)
    x, y = (a.astype(np.float64) for a in data[:2])
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert residual.var() == pytest.approx(1e-6, rel=0.05)


def test_sparse_classes_are_the_sign_of_twenty_inputs() -> None:
    data = find_workload("sparse-classification").data()
    positive = data.x_held_out[:, :20].sum(axis=1) > 0
    np.testing.assert_array_equal(data.y_held_out, np.stack([positive, ~positive], axis=1))


def test_matrix_entries_are_those_of_one_matrix_of_low_rank() -> None:
    data, settings = matrix_completion.data(), matrix_completion.SETTINGS
    side = settings["side"]
    x = np.concatenate([data.x_train, data.x_held_out])
    y = np.concatenate([data.y_train, data.y_held_out])
    row, column = x[:, :side].argmax(axis=1), x[:, side:].argmax(axis=1)
    assert (x.sum(axis=1) == 2).all()
    matrix = np.full((side, side), np.nan)
    matrix[row, column] = y[:, 0]
    values = np.linalg.svd(matrix, compute_uv=False)
    assert (values > 1e-4 * values[0]).sum() == settings["rank"]
    assert np.linalg.norm(matrix) == pytest.approx(side, rel=1e-5)


def test_factors_multiply_to_a_matrix_near_zero() -> None:
    settings = matrix_completion.SETTINGS
    model = matrix_completion.model(0)
    assert isinstance(model, matrix_completion.Factors)
    scale = model.columns.weight_scale
    first, second = (scale * np.asarray(factor.kernel[...]) for factor in model.rows)
    product = first @ second @ (scale * np.asarray(model.columns.kernel[...])).T
    inputs = np.zeros((1, 2 * settings["side"]), np.float32)
    inputs[0, 3] = inputs[0, settings["side"] + 5] = 1
    np.testing.assert_allclose(model(jnp.asarray(inputs)), product[3:4, 5:6], rtol=1e-4)
    assert product.std() == pytest.approx(settings["scale"], rel=0.2)


def test_metrics_by_hand() -> None:
    outputs = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    targets = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    assert METRICS["mse"].function(outputs, targets) == 2.0
    assert METRICS["rmse"].function(outputs, targets) == pytest.approx(2**0.5)
    assert METRICS["error"].function(outputs, targets) == 0.5
    signs = METRICS["error"].function(jnp.array([[0.1], [-2.0], [3.0]]), jnp.full((3, 1), 0.5))
    assert signs == pytest.approx(1 / 3)


def test_unknown_workload_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits-mse'"):
        find_workload("digit-mse")


@pytest.mark.parametrize(
    ("condition", "options", "spectrum"),
    [
        (1e4, {}, np.geomspace(1e-4, 1, 16)),
        (1e4, {"rotated": False}, np.geomspace(1e-4, 1, 16)),
        (1.0, {"rank": 8}, [0] * 8 + [1] * 8),
    ],
)
def test_difficulties_are_what_they_say(
    condition: float, options: dict[str, object], spectrum: object
) -> None:
    """The spectrum of the inputs, whether single inputs show it, equal parts in the targets."""
    parts = diagnosis.linear(3, condition, **options)  # type: ignore[arg-type]
    x = np.concatenate(parts[::2]).astype(np.float64)
    y = np.concatenate(parts[1::2])[:, 0].astype(np.float64)
    moments = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(moments)
    np.testing.assert_allclose(values / 16, spectrum, rtol=1e-3, atol=1e-7)
    off = np.abs(moments - np.diag(np.diag(moments))).max()
    assert bool(off < 1e-4) is ("rotated" in options)
    if condition > 1:  # else eigenvectors are any of their space
        share = vectors.T @ x.T @ y / np.sqrt(values)
        np.testing.assert_allclose(np.abs(share), np.abs(share[0]), rtol=1e-3)


def test_unbalanced_weights_are_the_same_function() -> None:
    x = diagnosis.linear(0, 1.0).x_train
    one, other = (diagnosis._unbalanced(0, factor)(x) for factor in (1.0, 30.0))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_target_of_the_noise_is_that_of_least_squares() -> None:
    x, y, x_held_out, y_held_out = diagnosis.linear(0, 1.0, noise=1.0)
    solution = np.linalg.lstsq(x.astype(np.float64), y, rcond=None)[0]
    error = np.mean((x_held_out @ solution - y_held_out) ** 2)
    assert pytest.approx(1.1 * error, rel=1e-3) == diagnosis.LEAST_SQUARES


@pytest.mark.parametrize("name", ["ill-conditioned", "units", "rank-deficient"])
def test_the_exact_natural_gradient_needs_one_step_on_a_linear_problem(name: str) -> None:
    where = find_workload(f"diagnosis-{name}")
    target = target_of(where)["target"]
    config = configuration(where, "exact", 0, target=target, role="evaluation")
    outcome = execute(config)["outcome"]
    assert (outcome["status"], outcome["steps_to_target"]) == ("reached", 1)


def test_a_known_target_is_not_frozen(tmp_path: Path) -> None:
    where = find_workload("diagnosis-plain")
    assert target_of(where, tmp_path)["how"].startswith("a millionth of the variance")
    with pytest.raises(ValueError, match="is known beforehand: nothing to freeze"):
        write_target(where, [], tmp_path)
    other = dataclasses.replace(where, known_target=(1e-3, "as well"))
    assert other.digest != where.digest
