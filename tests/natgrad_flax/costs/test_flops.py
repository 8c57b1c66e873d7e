"""The counter of flops and memory against closed formulas and XLA's own analysis."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import sequential_vmap
from jax.lax import linalg
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import natgrad_flax as ng
from natgrad_flax.costs.flops import cost_of
from natgrad_flax.costs.programs import solve_cost
from natgrad_flax.linalg.dense import lu_solve, pinv_solve, solve_psd, symmetric_product
from natgrad_flax.operators.least_squares import least_squares


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def flops(function, *shapes):
    return cost_of(function, *shapes).flops


N = 12


def solve_by_a_given_inverse(a, b):
    inverse = a @ a
    return jax.lax.custom_linear_solve(lambda v: a @ v, b, lambda _, r: inverse @ r)


QR = 2 * 30 * N**2 - 2 * N**3 / 3
BY_HAND = {
    "product": (lambda a, b: a @ b, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
    "products": (lambda a, b: a @ b, [(4, 5, 7), (4, 7, 3)], 4 * 2 * 5 * 7 * 3),
    "contraction": (
        lambda a, b: jnp.einsum("ntk,nstm->nskm", a, b),
        [(4, 5, 7), (4, 2, 5, 3)],
        2 * 4 * 2 * 5 * 7 * 3,
    ),
    "entries": (lambda a: (a + 1) * jnp.tanh(a), [(5, 7)], 3 * 35),
    "power": (lambda a: a**3, [(5, 7)], 2 * 35),
    "sum": (lambda a: jnp.sum(a, axis=0), [(5, 7)], 4 * 7),
    "moves": (lambda a: jnp.where(a.T > 0, a.T, 0.0)[:2], [(5, 7)], 0),
    "cholesky": (lambda a: linalg.cholesky(a, symmetrize_input=False), [(N, N)], N**3 / 3),
    "triangular": (
        lambda a, b: linalg.triangular_solve(a, b, left_side=True, lower=True),
        [(N, N), (N, 5)],
        5 * N**2,
    ),
    "eigh": (lambda a: linalg.eigh(a, symmetrize_input=False), [(N, N)], 9 * N**3),
    "LU": (lambda a: linalg.lu(a)[0], [(N, N)], 2 * N**3 / 3),
    "QR, tall": (jnp.linalg.qr, [(30, N)], 2 * QR),
    "QR, wide": (jnp.linalg.qr, [(N, 30)], QR + 4 * N**3 / 3),
    "a loop": (lambda a: jax.lax.fori_loop(0, 9, lambda _, x: x @ a, a), [(N, N)], 9 * 2 * N**3),
    "a map": (lambda a: jax.lax.map(lambda x: x @ x, a), [(6, N, N)], 6 * 2 * N**3),
    "one by one": (jax.vmap(sequential_vmap(lambda x: x @ x)), [(6, N, N)], 6 * 2 * N**3),
    "a solve": (lu_solve, [(N, N), (N,)], 2 * N**3 / 3 + 2 * N**2),
    "a given inverse": (solve_by_a_given_inverse, [(N, N), (N,)], 2 * N**3 + 2 * N**2),
    "repeated": (lambda a: a @ a + jax.jit(lambda b: b @ b)(a), [(N, N)], 2 * N**3 + N**2),
    "told outside": (lambda a: (jax.debug.print("{}", a[0]), a + 1)[1], [(N,)], N),
    "remat": (jax.remat(lambda a: a @ a), [(N, N)], 2 * N**3),
    "a closure": (lambda a: jax.lax.map(lambda x: x * jnp.ones(N), a), [(N, N)], N**2),
    "not needed": (lambda a: jax.jit(lambda b: (b @ b, b + 1))(a)[1], [(N, N)], N**2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_closed_formulas(name):
    function, shapes, count = BY_HAND[name]
    np.testing.assert_allclose(flops(function, *(shape(*s) for s in shapes)), count, rtol=1e-12)


def network(x, v, w):
    return jnp.sum(jax.nn.relu(jax.nn.relu(x @ v) @ w) ** 2)


def convolution(x, w, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def unrolled(a, rows):
    return jax.lax.scan(lambda x, row: (x @ a + row, None), a, rows, unroll=5)[0]


def rolled(a, rows):
    return jax.lax.scan(lambda x, row: (x @ a + row, None), a, rows)[0]


BY_XLA = {
    "a gradient": (jax.grad(network, (1, 2)), [(20, 30), (30, 40), (40, 50)], None),
    "a convolution": (convolution, [(3, 16, 16, 4), (3, 3, 4, 6)], None),
    "groups": (
        lambda x, w: convolution(x, w, 2),
        [(3, 16, 16, 4), (3, 3, 2, 6)],
        None,
    ),
    "a loop": (rolled, [(30, 30), (5, 30, 30)], unrolled),
    "a branch": (
        lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a + 1),
        [(40, 40)],
        None,
    ),
    "symmetric": (symmetric_product, [(1024, 30)], None),
    "Gram": (
        lambda a, d: ng.DenseSignals(a, d, 0.3, ()).gram(),
        [(20, 50), (20, 3, 40)],
        None,
    ),
    "batched": (jax.vmap(lambda a: a @ a.T @ a), [(4, 20, 30)], None),
}


@pytest.mark.parametrize("name", BY_XLA)
def test_against_the_analysis_of_xla(name):
    """XLA counts a loop once, so a loop is held against itself unrolled."""
    function, sizes, alike = BY_XLA[name]
    shapes = [shape(*size) for size in sizes]
    compiled = jax.jit(alike or function).lower(*shapes).compile()
    assert flops(function, *shapes) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.03)


def test_symmetric_products_save_three_eighths():
    many, few, thin = (
        flops(symmetric_product, shape(*sides)) for sides in ((1024, 256), (511, 256), (1024, 50))
    )
    assert many == 5 / 8 * 2 * 1024**2 * 256
    assert few == 2 * 511**2 * 256
    assert thin == 2 * 1024**2 * 50


def test_the_regular_case_is_counted():
    """Cholesky and triangular solves, and no eigendecomposition, behind every rank decision."""
    n, k = 200, 3
    regular = n**3 / 3 + 2 * n**2 * k
    matrix, rhs = shape(n, n), shape(n, k)
    shifted = flops(lambda a, b: solve_psd(a, b, shifted=True), matrix, rhs)
    assert shifted == pytest.approx(regular, rel=0.01)
    # the probe of the rank: one more right-hand side, and the norm of the matrix
    decided = flops(lambda a, b: solve_psd(a, b, shifted=False), matrix, rhs)
    assert decided == pytest.approx(regular + 2 * n**2 + 2 * n**2, rel=0.01)
    pinv = flops(pinv_solve, matrix, rhs)
    assert pinv == pytest.approx(9 * n**3 + 4 * n**2 * k, rel=0.01)
    rows = flops(least_squares, shape(2 * n, n), shape(2 * n))
    assert rows == pytest.approx(4 * 2 * n * n**2 - 4 * n**3 / 3 + 2 * n**3 / 3, rel=0.02)


def test_a_program_on_a_mesh_counts_once_for_every_device():
    mesh = AbstractMesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")
    program = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops(program, shape(8, 6)) == 4 * (2 * 2 * 2 * 6)


def test_a_way_for_each_platform_counts_as_the_default_and_holds_what_this_one_does():
    def on_cpu(x):
        products = jax.lax.fori_loop(0, jnp.int32(x.sum()), lambda _, y: y @ x, x)
        return (products @ x).sum()

    def elsewhere(x):
        return (jnp.concatenate([x, x]) @ jnp.concatenate([x, x], 1)).sum()

    n = 5
    program = functools.partial(jax.lax.platform_dependent, cpu=on_cpu, default=elsewhere)
    found = cost_of(program, shape(n, n))
    assert found.flops == 2 * (2 * n) ** 2 * n + (2 * n) ** 2 - 1
    assert n * n * 4 <= found.held < (2 * n) ** 2 * 4


def test_what_cannot_be_counted_is_refused():
    def loop(a):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ a, a)

    with pytest.raises(ValueError, match="while loop"):
        cost_of(loop, shape(3, 3))
    with pytest.raises(ValueError, match="flops of svd"):
        cost_of(jnp.linalg.svd, shape(3, 3))


def test_memory_by_hand():
    """Two products of a chain of three at once; what is fused into the last keeps its operand."""

    def chain(a):
        first = a @ a
        return (first @ a + 1) @ a

    def kept(a):
        first = a @ a + 1
        return (first @ a) @ a + first

    assert cost_of(chain, shape(10, 10)).held == 2 * 400
    assert cost_of(kept, shape(10, 10)).held == 3 * 400
    assert cost_of(lambda a: a + 1, shape(10, 10)).held == 0


STRUCTURES = [ng.Exact(), ng.KFAC(), ng.EKFAC(), ng.BlockTriDiagonal(), ng.Diagonal()]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_memory_of_structures_is_near_the_plan_of_xla(structure):
    """Which holds both branches of decisions, and copies for LAPACK."""
    n = 40
    layers = tuple(
        ng.DenseSignals(shape(n, k), shape(n, 4, m), 0.3, ()) for k, m in ((50, 60), (60, 4))
    )
    signals = ng.Signals(layers, shape(n, 4))
    held = solve_cost(structure, signals, inside=True).held

    def solve(signals, w):
        return structure.solve(signals, ng.Residual(w, None), 1.0)

    plan = jax.jit(solve).lower(signals, shape(n, 4)).compile().memory_analysis()
    assert plan.temp_size_in_bytes / 3 < held < 1.2 * plan.temp_size_in_bytes
