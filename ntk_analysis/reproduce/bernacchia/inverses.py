"""Generalised inverses of the singular Fisher information, and what does not depend on them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import natgrad_flax as ng
from natgrad_flax import geometry
from natgrad_flax.linear.deep_linear import natural_gradient
from natgrad_flax.linear.deep_linear_fisher import fisher_block, generalised_inverse
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.bernacchia.common import (
    BOTTLENECK,
    DRAWS,
    SETTING,
    SQUARE,
    Problem,
    draws,
    flat,
    kernels,
    network,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check
from ntk_analysis.reproduce.ruler import relative_error

SHAPES = (SQUARE, (2, 2, 2, 2, 2))


def block(matrix: Matrix, i: int, j: int, size: int) -> Matrix:
    """Block (i, j) of a matrix of equal blocks, counted from 0."""
    return matrix[i * size : (i + 1) * size, j * size : (j + 1) * size]


@check(
    "BE-Eq23",
    "A generalised inverse of the Fisher information, block by block",
    claim="In square networks the matrix F^g, whose block (i, j) is 1/L^2 times the inverse of "
    "block (j, i) of the Fisher information F, is a generalised inverse of F (Eq. 23, supplement "
    "Eq. 36). It is not block-diagonal: blocks off the diagonal are as large as those on it.",
    setting=f"widths {' and '.join(map(str, SHAPES))}; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_23(report: Report) -> Outcome:
    """The defining properties, against the Fisher information by autodiff."""
    inner, outer, blocks, skew, beside = [], [], [], [], []
    for widths in SHAPES:
        report(f"inverses for widths {widths}")
        depth, size = len(widths) - 1, widths[0] ** 2
        for problem in draws(widths):
            inverse = np.asarray(generalised_inverse(problem.weights, problem.data))
            both = problem.fisher @ inverse
            inner.append(relative_error(both @ problem.fisher, problem.fisher))
            outer.append(relative_error(inverse @ both, inverse))
            skew.append(relative_error(both.T, both))
            pairs = [(i, j) for i in range(depth) for j in range(depth)]
            blocks += [
                relative_error(
                    depth**2 * block(inverse, i, j, size),
                    np.linalg.inv(block(problem.fisher, j, i, size)),
                )
                for i, j in pairs
            ]
            norms = {pair: np.linalg.norm(block(inverse, *pair, size)) for pair in pairs}
            beside.append(
                min(norms[i, j] / np.sqrt(norms[i, i] * norms[j, j]) for i, j in pairs if i != j)
            )
    return Outcome(
        (
            below("F F^g F - F, relative", max(inner), 1e-10),
            below("F^g F F^g - F^g, relative", max(outer), 1e-10),
            below("block (i, j) against the inverse of block (j, i) of F", max(blocks), 1e-9),
            above("F F^g - (F F^g)^T, relative, in every draw", min(skew), 0.01),
            above("norm of a block beside the diagonal over those on it", min(beside), 0.1),
        ),
        notes=("F F^g is not symmetric, so F^g is not the Moore-Penrose inverse.",),
    )


@check(
    "BE-supp37",
    "All blocks of a row contribute the same, so a block-diagonal Fisher does as well",
    claim="When a row of blocks of F^g multiplies the gradient, each of the L blocks contributes "
    "the same vector (supplement Eq. 37). So the block-diagonal approximation of F gives an "
    "update proportional to the natural gradient; the factor is L.",
    setting=f"widths {' and '.join(map(str, SHAPES))}; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def supp_37(report: Report) -> Outcome:
    """The parts of each row, the inverse of each diagonal block, and ``ng.BlockDiagonal``."""
    parts, diagonal, structured = [], [], []
    for widths in SHAPES:
        report(f"rows of blocks for widths {widths}")
        depth, size = len(widths) - 1, widths[0] ** 2
        for problem in draws(widths):
            inverse = np.asarray(generalised_inverse(problem.weights, problem.data))
            slopes = [np.ravel(slope) for slope in problem.slopes]
            steps = [np.ravel(g) for g in natural_gradient(problem.weights, problem.data)]
            for i, step in enumerate(steps):
                parts += [
                    relative_error(depth * block(inverse, i, j, size) @ slope, step)
                    for j, slope in enumerate(slopes)
                ]
                own = np.asarray(fisher_block(problem.weights, problem.data, i + 1, i + 1))
                diagonal.append(relative_error(np.linalg.solve(own, slopes[i]), depth * step))
            structured.append(relative_error(_block_diagonal(problem), depth * flat(steps)))
    return Outcome(
        (
            below("L times each part of a row against Eq. 10", max(parts), 1e-9),
            below("inverses of the diagonal blocks against L times Eq. 10", max(diagonal), 1e-9),
            below("ng.BlockDiagonal() against L times Eq. 10", max(structured), 1e-7),
        )
    )


def _block_diagonal(problem: Problem) -> Matrix:
    """The natural gradient with ``ng.BlockDiagonal`` as one vector."""
    found = ng.natural_gradient(
        problem.model,
        problem.x,
        problem.y,
        structure=ng.BlockDiagonal(),
        loss=ng.MeanSquaredError(),
    )
    return flat(kernels(nnx.as_pure(found)))


@check(
    "BE-supp34",
    "Every generalised inverse moves the network alike",
    claim="The Fisher information has many generalised inverses F^-. All of them give the same "
    "dW/dt, hence the same dynamics of the model and of its loss, although the updates of the "
    "parameters differ (Section 3, supplement Eq. 34).",
    setting=f"widths {SQUARE} and {BOTTLENECK}, F^- = F^+ + Z - F^+ F Z F F^+ with Gaussian Z; "
    f"{SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def supp_34(report: Report) -> Outcome:
    """Random inverses by ``natgrad_flax.geometry``, and those of the paper."""
    moves, special, gaps = [], [], []
    for widths in (SQUARE, BOTTLENECK):
        for seed, problem in enumerate(draws(widths)):
            report(f"inverses for widths {widths}, draw {seed + 1} of {DRAWS}")
            expected = problem.natural_direction
            size = sum(w.size for w in problem.weights)
            free = jnp.asarray(np.random.default_rng(seed).standard_normal((size, size)))
            updates = [_natural_parameters(problem, z) for z in (None, free)]
            moves += [relative_error(-problem.push_forward([step]), expected) for step in updates]
            if widths == SQUARE:
                inverse = np.asarray(generalised_inverse(problem.weights, problem.data))
                blockwise = inverse @ flat(problem.slopes)
                closed = flat(natural_gradient(problem.weights, problem.data))
                updates += [closed]
                special += [
                    relative_error(-problem.push_forward([step]), expected)
                    for step in (blockwise, closed)
                ]
            gaps += [relative_error(step, updates[0]) for step in updates[1:]]
    return Outcome(
        (
            below("dW/dt of Moore-Penrose and random inverses", max(moves), 1e-9),
            below("dW/dt of F^g and of Eq. 10, square networks", max(special), 1e-9),
            above("updates against that of Moore-Penrose, in every draw", min(gaps), 0.01),
        )
    )


def _natural_parameters(problem: Problem, free: Array | None) -> Matrix:
    """G^- grad of theta -> vec W by ``geometry``, G^- made of ``free`` or Moore-Penrose's."""
    ends = np.cumsum([w.size for w in problem.weights])[:-1]
    eye = jnp.eye(problem.x.shape[1])
    metric = jnp.asarray(np.kron(problem.inputs, problem.precision))
    target = jnp.asarray(problem.optimum.ravel())

    def phi(theta: Array) -> Array:
        parts = zip(jnp.split(theta, ends), problem.weights, strict=True)
        return network([part.reshape(w.shape) for part, w in parts], eye).ravel()

    def excess(point: Array) -> Array:
        return (point - target) @ metric @ (point - target) / 2

    def inverse(gram: Array) -> Array:
        assert free is not None
        return geometry.any_generalised_inverse(gram, free)

    found = geometry.natural_parameter_gradient(
        phi,
        excess,
        jnp.asarray(flat(problem.weights)),
        lambda point: metric,
        None if free is None else inverse,
    )
    return np.asarray(found)
