"""What is computed on eight devices, beside the same on one; started by the tests.

Arguments: sections, and the JSON file to write: errors relative to one device, flops of each
device, messages.
"""

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path

# before the first use of JAX; behind the flags of the tests
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
from battery import QUICK, STRUCTURES
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from random_signals import dense, explicit, network, shared

import natgrad_flax as ng
from natgrad_flax import devices
from natgrad_flax.devices.executor import run_on_mesh
from natgrad_flax.devices.linear_solve import Solution, cholesky_solve
from natgrad_flax.devices.placement import place
from natgrad_flax.devices.tasks import Task, distribute
from natgrad_flax.linalg.execution import cubic
from natgrad_flax.signals.gradient import ParameterGradient
from natgrad_flax.structures import Moments

LOSS = ng.SoftmaxCrossEntropy()
CASES = {
    "exact": ("sample", "exact", 0.1, ("replicated", "cholesky", "cg")),
    "block-diagonal": ("auto", "mc", 0.1, ("cholesky",)),
    "block-tri-diagonal": ("sample", "exact", 0.1, ("auto",)),
    "layer-wise": ("sample", "mc", 0.1, ("cg",)),
    "kfac": ("auto", "mc", ng.RelativeDamping(1.0), ("auto",)),
    "diagonal": ("auto", "empirical", 0.1, ("auto",)),
    "quasi-diagonal": ("auto", "exact", 0.1, ("auto",)),
    "unit-wise": ("sample", "exact", 0.0, ("auto",)),
}


def mlp(widths, samples):
    model = ng.MLP(widths, bias_variance=0.1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (samples, widths[0]))
    return model, x, jax.nn.one_hot(jnp.arange(samples) % widths[-1], widths[-1])


def settings(structure, fisher, damping):
    return {
        "structure": structure,
        "loss": LOSS,
        "fisher": fisher,
        "damping": damping,
        "key": jax.random.key(3),
        "mc_samples": 2,
    }


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def distance(one, many):
    return float(np.linalg.norm(flat(one) - flat(many)) / np.linalg.norm(flat(one)))


def compare_structures():
    mesh = jax.make_mesh((8,), ("data",))
    model, x, y = mlp((20, 40, 3), 16)
    found = {}
    for name, (space, fisher, damping, solvers) in CASES.items():
        options = settings(STRUCTURES[name](2, space), fisher, damping)
        one = ng.natural_gradient(model, x, y, **options)
        for solver in solvers:
            many = devices.sharded_natural_gradient(
                model, x, y, mesh=mesh, solver=solver, **options
            )
            found[f"{name}, {solver}"] = distance(one, many)
    tokens = jax.random.randint(jax.random.key(2), (8, 3), 0, 5)
    targets = {"next": jnp.roll(tokens, -1, 1), "mean": jnp.mean(tokens, 1, keepdims=True) / 5}
    losses = {"next": LOSS, "mean": ng.MeanSquaredError()}
    options = settings(ng.KFAC(), "exact", 0.1) | {"loss": losses}
    one = ng.natural_gradient(TwoHeads(), tokens, targets, **options)
    found["heads of a tied table"] = distance(
        one,
        devices.sharded_natural_gradient(TwoHeads(), tokens, targets, mesh=mesh, **options),
    )
    return found


class TwoHeads(nnx.Module):
    """A table that is read out, and a head beside it."""

    def __init__(self):
        self.table = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
        self.mean = nnx.Linear(4, 1, rngs=nnx.Rngs(1))

    def __call__(self, x):
        h = jnp.tanh(jnp.cumsum(self.table(x), axis=1))
        return {"next": self.table.attend(h), "mean": self.mean(h[:, -1])}


def compare_solves():
    """Solves with layers of all kinds in float64: chains of factorisations, groups, no damping.

    Of structures that are averaged, also the steps from one batch to an inverse that is applied.
    """
    mesh = jax.make_mesh((8,), ("data",))
    found = {}
    with jax.enable_x64(True):
        layers = ((dense, 21, 5), (shared, 2, 2, 4, 3), (shared, 3, 1, 3, 4), (explicit, 2, 3))
        signals, residual = network(np.random.default_rng(0), 16, 2, *layers)
        vector = ParameterGradient(residual.vector(signals.layers))
        for name, damping, gradient in (
            ("kfac", 0.1, residual),
            ("kfac-reduce", 0.1, vector),
            ("kfac", 0.0, vector),
            ("ekfac", 0.1, residual),
            ("block-diagonal", 0.0, residual),
            ("block-tri-diagonal", 0.1, vector),
            ("unit-wise", 0.1, vector),
            ("foof", 0.1, residual),
            ("unit-blocks", 0.1, vector),
            ("shampoo", 0.1, vector),
            ("kfoc", 0.1, vector),
            ("low-rank-units", 0.1, vector),
            ("nystroem", 0.1, vector),
            ("mini-block", 0.1, vector),
        ):
            structure = STRUCTURES[name](len(layers), "auto")
            many = devices.Sharded(structure, mesh)
            solves = [
                jax.jit(partial(each.solve, damping=damping), compiler_options=QUICK)
                for each in (structure, many)
            ]
            found[f"{name}, {damping}"] = distance(*(solve(signals, gradient) for solve in solves))

        def through_averages(structure, signals, vector, newest):
            moments = structure.moments(signals)
            if newest:
                moments = Moments(structure.latest(signals))
            elif structure.has_basis:
                basis = structure.basis(structure.statistics(signals))
                moments = moments._replace(basis=basis, rotated=structure.rotated(signals, basis))
            inverse = structure.invert(moments, 0.1, 16)
            return structure.apply(inverse, vector.layers)

        for name, newest in (("kfac", True), ("kfac-reduce", False), ("ekfac", False)):
            structure = STRUCTURES[name](len(layers), "auto")
            runs = [
                jax.jit(partial(through_averages, each, newest=newest), compiler_options=QUICK)
                for each in (structure, devices.Sharded(structure, mesh))
            ]
            found[f"averaged {name}"] = distance(*(run(signals, vector) for run in runs))
    return found


def compare_conv():
    """A convolutional net whose channels are sharded, too, over the other axis of the mesh.

    The Fisher has a batch of its own.
    """
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    model = ng.ConvNet(
        (4, 4, 2), channels=(6,), outputs=3, strides=2, bias_variance=0.1, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
    y = jax.nn.one_hot(jnp.arange(8) % 3, 3)
    graphdef, state = nnx.split(model)

    def put(leaf):
        even = leaf.shape[-1] % 2 == 0
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "model") if even else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    sharded = nnx.merge(graphdef, jax.tree.map(put, state))
    errors, places = {}, []
    for name in ("exact", "unit-wise", "kfac", "ekfac"):
        structure = STRUCTURES[name](2, "sample" if name == "exact" else "auto")
        options = settings(structure, "mc", 0.1) | {"fisher_x": -x}
        solver = "cholesky" if name == "exact" else "auto"
        one = ng.natural_gradient(model, x, y, **options)
        many = devices.sharded_natural_gradient(sharded, x, y, mesh=mesh, solver=solver, **options)
        errors[name] = distance(one, many)
        leaves = zip(jax.tree.leaves(many), jax.tree.leaves(nnx.state(sharded)), strict=True)
        places.append(all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in leaves))
    return {"errors": errors, "updates lie with parameters": all(places)}


def compare_traced():
    """Inside of jit and scan, where the batch and the model are tracers."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model, x, y = mlp((6, 12, 3), 16)
    graphdef, state = nnx.split(model)
    options = settings(ng.Exact("sample"), "mc", 0.1)

    def descend(state, batch):
        now = nnx.merge(graphdef, state)
        step = devices.sharded_natural_gradient(now, *batch, mesh=mesh, solver="cg", **options)
        return jax.tree.map(lambda p, s: p - 0.1 * s, state, step), None

    scanned, _ = jax.jit(lambda s, xs, ys: jax.lax.scan(descend, s, (xs, ys)))(
        state, jnp.stack([x, -x]), jnp.stack([y, y])
    )
    for batch in ((x, y), (-x, y)):
        step = ng.natural_gradient(nnx.merge(graphdef, state), *batch, **options)
        state = jax.tree.map(lambda p, s: p - 0.1 * s, state, step)
    options = settings(ng.Exact("sample"), "exact", 0.0)

    @jax.jit
    def singular(x, y):
        twice = jnp.concatenate([x[:8], x[:8]])
        return devices.sharded_natural_gradient(
            model, twice, y, mesh=mesh, solver="cholesky", **options
        )

    return {
        "error": distance(state, scanned),
        "nan where singular": bool(np.isnan(flat(singular(x, y))).all()),
    }


def compare_optimizers():
    """Two steps of the optimizer on a batch that lies on the mesh."""
    mesh = jax.make_mesh((8,), ("data",))

    def train(structure, place_on_mesh, averaged=False):
        model, *batch = mlp((6, 12, 3), 16)
        options = {}
        if averaged:
            average = ng.MovingAverage(0.9, every=1, inverse_every=2)
            options = {"average": average, "example": (model, batch[0])}
        transformation = ng.natural_gradient_descent(
            0.5, structure=structure, loss=LOSS, damping=0.1, fisher="mc", **options
        )
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
        if place_on_mesh:
            batch = devices.shard_batch(mesh, *batch)
            for tree in (model, optimizer):
                nnx.update(tree, devices.replicate(mesh, nnx.state(tree)))

        @nnx.jit
        def update(model, optimizer, x, y):
            unused = nnx.state(model, nnx.Param)
            optimizer.update(model, unused, module=model, x=x, y=y)

        for _ in range(2):
            update(model, optimizer, *batch)
        return nnx.state(model)

    found = {"K-FAC": distance(train(ng.KFAC(), False), train(ng.KFAC(), True))}
    for name, structure, solver in (
        ("exact", ng.Exact("sample"), "cg"),
        ("averaged K-FAC", ng.KFAC(), "auto"),
    ):
        averaged = "averaged" in name
        sharded = devices.Sharded(structure, mesh, solver=solver)
        found[name] = distance(train(structure, False, averaged), train(sharded, True, averaged))
    return found


def count_flops():
    """Flops of a device by XLA's count, times 8, over those of the program of one device.

    LAPACK's are not counted. Of two branches XLA counts the dearer one.
    """
    mesh = jax.make_mesh((8,), ("data",))
    rows = place(mesh, "data").rows
    found = {}
    image = (jax.random.normal(jax.random.key(1), (16, 4, 4, 3)), jnp.eye(8)[jnp.arange(16) % 8])
    convolutional = ng.ConvNet(
        (4, 4, 3), channels=(16,), outputs=8, strides=2, bias_variance=0.1, rngs=nnx.Rngs(0)
    )
    wide, deep = mlp((256, 64, 8), 128), mlp((64,) * 5, 32)
    # one chunk of the loop over units, whose body XLA counts once, has some of them
    for name, structure, solver, (model, x, y) in (
        ("exact", ng.Exact("sample"), "cg", wide),
        ("diagonal", ng.Diagonal(), "replicated", wide),
        ("unit-wise", ng.UnitWise("sample"), "replicated", mlp((256, 64, 8), 16)),
        ("unit-wise conv", ng.UnitWise(), "replicated", (convolutional, *image)),
        ("K-FAC", ng.KFAC(), "replicated", deep),
        ("EKFAC", ng.EKFAC(), "replicated", deep),
    ):
        fisher = "mc" if "K-FAC" in name or "EKFAC" in name else "exact"
        options = settings(structure, fisher, 0.1) | {"mc_samples": 1}

        def step(x, y, model=model, options=options):
            return ng.natural_gradient(model, x, y, **options)

        def dealt_out(x, y, model=model, solver=solver, options=options):
            return devices.sharded_natural_gradient(
                model, x, y, mesh=rows.mesh, solver=solver, **options
            )

        with unrolled():
            one = jax.jit(step).lower(x, y).compile()
            many = jax.jit(dealt_out).lower(*jax.device_put((x, y), rows)).compile()
        found[name] = {
            "flops": 8 * many.cost_analysis()["flops"] / one.cost_analysis()["flops"],
            "memory": many.memory_analysis().temp_size_in_bytes
            / one.memory_analysis().temp_size_in_bytes,
            "collectives": [
                kind
                for kind in ("all-gather", "all-reduce", "collective-permute")
                if kind in many.as_text()
            ],
        }
    return found


@contextlib.contextmanager
def unrolled():
    """Loops over single units without loops, of which XLA counts one iteration only."""

    def unit_by_unit(function, units, batch_size=None):
        size = len(jax.tree.leaves(units)[0])
        parts = [function(jax.tree.map(lambda leaf, i=i: leaf[i], units)) for i in range(size)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    loop, jax.lax.map = jax.lax.map, unit_by_unit
    try:
        yield
    finally:
        jax.lax.map = loop


def count_calls():
    """How often each of ten tasks runs that are dealt out to eight devices, and what comes back."""
    mesh = place(jax.make_mesh((4, 2), ("data", "model")), "data").mesh
    calls = [0] * 10

    def task(number, value):
        def count(value):
            calls[number] += 1
            return np.float32(value + number)

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return {"sum": jax.pure_callback(count, shape, value)}

    tasks = [Task(partial(task, number), (jnp.ones(()),), 1.0 + number) for number in range(10)]
    results = jax.jit(lambda: distribute(tasks, mesh))()
    return {"calls": calls, "results": [float(result["sum"]) for result in results]}


def count_chains():
    """Flops of a device, times 8, over those of one, of eight chains of two cubic operations each.

    The second needs the result of the first, and of what stands between them.
    """
    placement = place(jax.make_mesh((8,), ("data",)), "data")

    def program(matrices):
        def square(matrix):
            return matrix @ matrix

        return [cubic(square, cubic(square, matrix) / 100 + matrix) for matrix in matrices]

    matrices = [jax.random.normal(jax.random.key(seed), (64, 64)) for seed in range(8)]
    dealt_out = jax.jit(lambda matrices: run_on_mesh(partial(program, matrices), placement))
    many = dealt_out.lower(matrices).compile()
    one = jax.jit(program).lower(matrices).compile()
    return {
        "flops": 8 * many.cost_analysis()["flops"] / one.cost_analysis()["flops"],
        "error": distance(one(matrices), many(matrices)),
    }


def solve_dense():
    """The distributed factorisation in float64, with rows that do not fill their groups."""
    mesh = place(jax.make_mesh((8,), ("data",)), "data").mesh
    size = 8 * 65
    rng = np.random.default_rng(0)
    half = rng.normal(size=(size, size + 2))
    matrix, rhs = half @ half.T + np.eye(size), rng.normal(size=size)
    solve = jax.shard_map(
        lambda rows, rhs: cholesky_solve(rows, rhs, "data", shifted=True),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=Solution(PartitionSpec("data"), *(PartitionSpec(),) * 3),
        check_vma=False,
    )
    with jax.enable_x64(True):
        solution = jax.jit(solve)(matrix, rhs)
        error = np.abs(np.asarray(solution.value) - np.linalg.solve(matrix, rhs)).max()
    return {"error": float(error), "converged": bool(solution.converged)}


def refusals():
    mesh = jax.make_mesh((8,), ("data",))
    model, x, y = mlp((6, 12, 3), 16)
    exact = settings(ng.Exact("sample"), "exact", 0.1)
    singular = {**exact, "damping": 0.0}
    calls = {
        "batch": lambda: devices.sharded_natural_gradient(
            model, x[:12], y[:12], mesh=mesh, **exact
        ),
        "part": lambda: devices.shard_batch(mesh, x[:12], y[:12]),
        "iterations": lambda: devices.sharded_natural_gradient(
            model, x, y, mesh=mesh, solver="cg", max_iterations=1, **exact
        ),
        "singular": lambda: devices.sharded_natural_gradient(
            model, jnp.tile(x[:8], (2, 1)), y, mesh=mesh, solver="cholesky", **singular
        ),
        "explicit": lambda: jax.jit(
            lambda x, y: devices.sharded_natural_gradient(model, x, y, mesh=mesh, **exact)
        )(*jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, devices.UnsolvedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


SECTIONS = {
    "structures": compare_structures,
    "solves": compare_solves,
    "conv": compare_conv,
    "traced": compare_traced,
    "optimizers": compare_optimizers,
    "flops": count_flops,
    "calls": count_calls,
    "chains": count_chains,
    "solve": solve_dense,
    "refusals": refusals,
}

if __name__ == "__main__":
    *names, path = sys.argv[1:]
    results = {name: SECTIONS[name]() for name in names}
    Path(path).write_text(json.dumps(results, indent=1), encoding="utf-8")
