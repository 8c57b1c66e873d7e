"""Natural gradients on eight forced host devices, in a process of their own, and on one here."""

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from own_process import on_eight_devices

import natgrad_flax as ng
from natgrad_flax import devices
from natgrad_flax.devices.linear_solve import Solution, cholesky_solve, conjugate_gradients
from natgrad_flax.devices.tasks import balance

LOSS = ng.MeanSquaredError()


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What ``device_checks.py`` found on eight devices."""
    sections = ("structures", "conv", "traced", "optimizers", "calls", "solve", "refusals")
    return on_eight_devices(tmp_path_factory.mktemp("devices"), *sections)


def test_every_structure_gives_the_step_of_one_device(eight):
    assert len(eight["structures"]) == 11
    assert len(eight["conv"]["errors"]) == 4
    assert max(eight["structures"].values()) < 1e-5, eight["structures"]


def test_channels_sharded_over_the_other_axis_of_the_mesh(eight):
    assert max(eight["conv"]["errors"].values()) < 1e-5, eight["conv"]
    assert eight["conv"]["updates lie with parameters"]


def test_inside_of_jit_and_scan(eight):
    assert eight["traced"]["error"] < 1e-5
    assert eight["traced"]["nan where singular"]


def test_the_optimizer_steps_on_a_batch_that_lies_on_the_mesh(eight):
    assert max(eight["optimizers"].values()) < 1e-5, eight["optimizers"]


def test_a_task_that_is_dealt_out_runs_on_one_device_only(eight):
    assert eight["calls"]["calls"] == [1] * 10
    assert eight["calls"]["results"] == [1.0 + number for number in range(10)]


def test_tasks_are_balanced_by_their_cost():
    costs = [1.0, 7.0, 2.0, 3.0, 5.0, 4.0]
    owners = balance(costs, 3)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == d) for d in range(3)]
    assert sorted(loads) == [7.0, 7.0, 8.0]
    assert balance([2.0, 1.0], 8) == [0, 1]


def test_the_distributed_factorisation_solves_what_numpy_solves(eight):
    assert eight["solve"]["converged"]
    assert eight["solve"]["error"] < 1e-11


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("batch", "ValueError: a batch of 12 samples .* the 8 devices .* take 8 or 16"),
        ("part", "ValueError: a batch of 12 samples"),
        ("iterations", "UnsolvedError: conjugate gradients ended after 1 iterations .*at most 1"),
        ("singular", "UnsolvedError: a Gram matrix is not positive definite"),
        ("explicit", "ValueError: a traced array lies on a mesh with explicit axes"),
    ],
)
def test_what_eight_devices_refuse(eight, call, words):
    with pytest.raises(ValueError, match=words):
        raise ValueError(eight["refusals"][call])


@pytest.fixture
def mesh():
    return jax.make_mesh((1,), ("data",))


@pytest.fixture
def batch():
    model = ng.MLP((4, 6, 2), bias_variance=0.1, rngs=nnx.Rngs(0))
    return model, jax.random.normal(jax.random.key(1), (6, 4)), jnp.ones((6, 2))


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_one_device_runs_the_same_program(mesh, batch, solver, x64):
    graphdef, state = nnx.split(batch[0])
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
    x, y = (jnp.asarray(array, jnp.float64) for array in batch[1:])
    options = {"structure": ng.Exact("sample"), "loss": LOSS, "damping": 0.1}
    one = ng.natural_gradient(model, x, y, **options)
    same = devices.sharded_natural_gradient(
        model, x, y, mesh=mesh, solver=solver, tolerance=1e-12, **options
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 70])
def test_distributed_solvers_on_one_device(rows, x64):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    rng = np.random.default_rng(rows)
    half = rng.normal(size=(rows, rows + 2))
    matrix, rhs = half @ half.T + np.eye(rows), rng.normal(size=rows)

    def spread(solve, value):
        specs = Solution(value, *(PartitionSpec(),) * 3)
        rows = PartitionSpec("data")
        return jax.jit(
            jax.shard_map(solve, mesh=mesh, in_specs=rows, out_specs=specs, check_vma=False)
        )

    factorised = spread(partial(cholesky_solve, axis="data", shifted=True), PartitionSpec("data"))(
        matrix, rhs
    )
    np.testing.assert_allclose(factorised.value, np.linalg.solve(matrix, rhs), rtol=1e-9)
    assert factorised.converged

    def iterate(matrix, rhs):
        # a poor preconditioner, so that there is something to iterate
        blocks = [jnp.eye(rows)]
        return conjugate_gradients(
            lambda v: (matrix @ v[0])[None],
            blocks,
            rhs[None],
            "data",
            tolerance=1e-10,
            max_iterations=500,
        )

    iterated = spread(iterate, PartitionSpec(None, "data"))(matrix, rhs)
    np.testing.assert_allclose(iterated.value[0], np.linalg.solve(matrix, rhs), rtol=1e-6)
    assert iterated.converged
    assert 1 <= iterated.iterations < 500
    assert iterated.residual <= 1e-10


def test_a_matrix_that_is_not_definite_is_not_solved():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    for matrix, shifted in ((-jnp.eye(3), True), (jnp.ones((3, 3)), False)):
        solve = jax.shard_map(
            partial(cholesky_solve, axis="data", shifted=shifted),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=Solution(PartitionSpec("data"), *(PartitionSpec(),) * 3),
            check_vma=False,
        )
        solution = jax.jit(solve)(matrix, jnp.ones(3))
        assert not solution.converged

    # the second has a preconditioner that is positive definite, unlike itself
    for matrix, block in ((-jnp.eye(2), -jnp.eye(2)), (jnp.diag(jnp.array([1.0, -1])), jnp.eye(2))):
        iterate = jax.shard_map(
            lambda matrix, rhs, block=block: conjugate_gradients(
                lambda v: (matrix @ v[0])[None],
                [block],
                rhs[None],
                "data",
                tolerance=1e-6,
                max_iterations=50,
            ),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=Solution(PartitionSpec(None, "data"), *(PartitionSpec(),) * 3),
            check_vma=False,
        )
        assert not jax.jit(iterate)(matrix, jnp.ones(2)).converged


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mesh": "data"}, TypeError, "mesh must be a jax.sharding.Mesh, got str"),
        ({"axis": "date"}, ValueError, "no axis 'date', only 'data' of size 1; did you mean"),
        ({"solver": "qr"}, ValueError, "solver must be one of auto, replicated, cholesky, cg"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be an integer of at least 1"),
        ({"structure": "exact"}, TypeError, "structure must be one of"),
        ({"damping": -1.0}, ValueError, "damping must be 0 or positive"),
        ({"fisher": "mc", "damping": 0.1}, ValueError, "pass key="),
        ({"rate": 1.0}, TypeError, "unexpected keyword argument 'rate'"),
        (
            {
                "structure": ng.LayerWise([[1.0, 2.0], [2.0, 1.0]], "sample"),
                "solver": "cg",
                "damping": 0.1,
            },
            ValueError,
            'needs a definite system .* use solver="replicated"',
        ),
        (
            {"structure": ng.Exact("parameter"), "solver": "cg", "damping": 0.1},
            ValueError,
            "needs a definite system in sample space",
        ),
        ({"structure": ng.KFAC(), "solver": "cholesky"}, ValueError, "needs a definite system"),
        (
            {"structure": ng.LayerWise([[2.0, 1.0], [1.0, 2.0]], "sample"), "solver": "cholesky"},
            ValueError,
            'couples its layers.* use solver="cg"',
        ),
        (
            {"structure": ng.LayerWise([[2.0, 1.0], [1.0, 2.0]], "sample"), "solver": "cg"},
            ValueError,
            "needs a positive damping",
        ),
    ],
)
def test_bad_settings(mesh, batch, settings, error, words):
    model, x, y = batch
    options = {"structure": ng.Exact(), "loss": LOSS, "mesh": mesh} | settings
    with pytest.raises(error, match=words):
        devices.sharded_natural_gradient(model, x, y, **options)


def test_bad_batches_and_structures(mesh, batch):
    model, x, y = batch
    with pytest.raises(ValueError, match="y must have shape"):
        devices.sharded_natural_gradient(
            model, x, y[:4], structure=ng.Exact(), loss=LOSS, mesh=mesh
        )
    with pytest.raises(ValueError, match="x has 1 NaN"):
        devices.sharded_natural_gradient(
            model, x.at[0, 0].set(jnp.nan), y, structure=ng.Exact(), loss=LOSS, mesh=mesh
        )
    with pytest.raises(ValueError, match="needs an axis of samples"):
        devices.shard_batch(mesh, 1.0)
    with pytest.raises(TypeError, match="mesh must be"):
        devices.replicate("mesh", x)
    with pytest.raises(TypeError, match="sharded already"):
        devices.Sharded(devices.Sharded(ng.Exact(), mesh), mesh)


def test_a_sharded_structure_answers_for_its_own(mesh, batch):
    model, x, _ = batch
    structure = ng.UnitWise("parameter")
    sharded = devices.Sharded(structure, mesh)
    signals = ng.jacobian_signals(model, x)
    assert sharded.name == structure.name
    assert sharded.gram_size(signals) == structure.gram_size(signals)
    for answer, own in (
        (sharded.to_dense(signals, 0.1), structure.to_dense(signals, 0.1)),
        (sharded.damping_scale(signals), structure.damping_scale(signals)),
        (sharded.coefficient(signals, signals, 0.1), structure.coefficient(signals, signals, 0.1)),
    ):
        np.testing.assert_array_equal(answer, own)
    rows = devices.Sharded(ng.Exact("sample"), mesh, solver="cg")
    # the rows of one device are all rows, and they are held twice
    assert rows.gram_size(signals) == np.ceil(signals.size * 2**0.5)


def descend(structure, batch, **options):
    """The parameters after two steps."""
    template, x, y = batch
    graphdef, state = nnx.split(template)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
    x, y = x.astype(jnp.float64), y.astype(jnp.float64)
    if "average" in options:
        options["example"] = (model, x)
    settings = {"learning_rate": 0.5, "structure": structure, "loss": LOSS, "damping": 0.1}
    transformation = ng.natural_gradient_descent(**{**settings, **options})
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, x, y):
        optimizer.update(model, nnx.state(model, nnx.Param), module=model, x=x, y=y)

    for _ in range(2):
        update(model, optimizer, x, y)
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    ("structure", "solver", "options"),
    [
        (ng.Exact("sample"), "cholesky", {"momentum": ng.SPRING(0.5, max_norm=1e-3)}),
        (ng.BlockDiagonal("sample"), "cholesky", {"momentum": 0.5}),
        (ng.EKFAC(), "auto", {"average": ng.MovingAverage(0.9, 1, 2)}),
        (
            ng.KFAC(split="pi"),
            "auto",
            {"average": ng.MovingAverage(0.0), "learning_rate": ng.QuadraticModel()},
        ),
    ],
)
def test_momentum_and_averages_on_a_mesh(mesh, batch, structure, solver, options, x64):
    sharded = devices.Sharded(structure, mesh, solver=solver)
    for a, b in zip(
        descend(structure, batch, **options), descend(sharded, batch, **options), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_what_a_mesh_does_not_change(mesh, batch):
    model, x, _ = batch
    sharded = devices.Sharded(ng.KFAC(), mesh)
    assert ng.describe(model, x, structure=sharded) == ng.describe(model, x, structure=ng.KFAC())
    assert sharded.plain == ng.KFAC()
    assert copy.copy(sharded) == sharded
    assert dataclasses.replace(sharded, solver="replicated").structure == ng.KFAC()
    with pytest.raises(TypeError, match="behind KFAC put optax"):
        ng.natural_gradient_descent(0.1, structure=sharded, loss=LOSS, damping=0.1, momentum=0.5)
    own = devices.Sharded(ng.EKFAC(), mesh)
    assert (own.damping_margin, own.has_basis) == (1.0, True)
    assert not sharded.has_basis
    exact = devices.Sharded(ng.Exact(), mesh)
    with pytest.raises(TypeError, match="needs a structure that means over samples make up"):
        ng.natural_gradient_descent(
            0.1, structure=exact, loss=LOSS, damping=0.1, average=ng.MovingAverage()
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", 2, 0), 'coordinator must be "host:port"'),
        (("host:1", 0, 0), "num_processes must be an integer of at least 1"),
        (("host:1", 2, 2), "process_id must be below num_processes = 2, got 2"),
        (("host:1", 2, -1), "process_id must be an integer of at least 0"),
    ],
)
def test_bad_addresses_of_processes(arguments, words):
    with pytest.raises(ValueError, match=words):
        devices.connect(*arguments)
    with pytest.raises(ValueError, match="timeout must be"):
        devices.connect("host:1", 2, 0, timeout=0)


def test_errors_of_one_process_are_not_those_of_peers():
    with pytest.raises(ValueError, match="gloo"), devices.lost_peers():
        raise ValueError("gloo is not what failed here")
