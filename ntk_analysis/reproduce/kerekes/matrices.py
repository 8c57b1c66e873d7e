"""The natural gradient of matrix factorisation: Appendices B.4 and F of Kerekes et al. (2021)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linear import diagonal_network
from natgrad_flax.linear import matrix_factorization as factorization
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.kerekes.common import product_jacobian
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check
from ntk_analysis.reproduce.ruler import pseudo_inverse, relative_error

SEEDS = 4
"""Random draws of every shape; the worst counts."""
_ENTRY = (5, 5)
# compiled as a whole: JAX would compile its conjugate gradients anew at every plain call
_joint_step = jax.jit(factorization.joint_step)


def draw_factors(rng: np.random.Generator, sizes: Sequence[int]) -> tuple[Matrix, ...]:
    """Factors (sizes[0], sizes[1]), ... with singular values from 2/3 to 3/2."""

    def one(rows: int, columns: int) -> Matrix:
        left, _, right = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
        matrix: Matrix = (left * 1.5 ** rng.uniform(-1, 1, min(rows, columns))) @ right
        return matrix

    return tuple(one(*pair) for pair in pairwise(sizes))


def product(factors: Sequence[Matrix]) -> Matrix:
    """W_1 ... W_L in NumPy."""
    return np.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]


def split_step(factors: tuple[Matrix, ...], slope: Matrix) -> tuple[Matrix, ...]:
    """The 1/L split of a fully observed matrix with residual ``slope``."""
    target, mask = product(factors) - slope, np.ones(slope.shape, bool)
    found = factorization.natural_gradient(target, mask, factors, solution="split")
    return tuple(np.asarray(step) for step in found)


def flat(matrices: Sequence[Matrix]) -> Matrix:
    """One vector, row by row."""
    return np.concatenate([np.ravel(matrix) for matrix in matrices])


def around(factors: Sequence[Matrix], index: int) -> tuple[Matrix, Matrix]:
    """A_i and B_i, the products left and right of factor i (from 0); identities at the ends."""
    left = product([np.eye(len(factors[0])), *factors[:index]])
    right = product([*factors[index + 1 :], np.eye(factors[-1].shape[1])])
    return left, right


def entry_moved(factors: Sequence[Matrix], step_size: float, error: float) -> float:
    """What the 1/L split moves the observed entry by, over -step_size * error: closed form."""
    curvature = error * np.linalg.inv(product(factors))[_ENTRY]
    left = (1 - step_size * curvature / len(factors)) ** len(factors)
    return float((1 - left) / (step_size * curvature))


def off_entry(kernel: Array) -> float:
    """The largest entry but the observed one, over the observed one."""
    rest = np.abs(np.array(kernel))
    here = float(rest[_ENTRY])
    rest[_ENTRY] = 0
    return float(rest.max()) / here


@check(
    "KE-NGD-MF",
    "Natural gradient moves the observed entries alone",
    claim="Natural-gradient flow in any parametrisation with J of full rank is gradient flow of "
    "beta itself, so entries without observation stay (Statement of Section 4, Appendix F); in the "
    "discrete algorithm, too (Fig. 3). Ours: a step eta of the 1/L split gives "
    "beta' = beta (I - (eta/L) beta^-1 G)^L, and for one observation that is one entry at any eta.",
    setting="5 x 5 factors, L = 1 ... 5, eta = 0.1, 1 and 5; 11 x 11, entry (5, 5), L = 1, 2, 3, "
    "5, eta = 0.01, 0.7 and 20; sizes 4-4-4, 4-6-5, 4-4-4-4 against a dense Jacobian, and 5-2-4, "
    f"where J has no full rank; {SEEDS} draws each, float64",
    origin="ours",
    fast=True,
)
@in_float64
def exact_step(report: Report) -> Outcome:
    """The step in closed form, one observation, and both solutions against dense matrices."""
    rng = np.random.default_rng(0)
    report("finite steps")
    exact = []
    for depth in (1, 2, 3, 4, 5):
        for _ in range(SEEDS):
            factors = draw_factors(rng, [5] * (depth + 1))
            beta, slope = product(factors), rng.standard_normal((5, 5))
            step = split_step(factors, slope)
            for rate in (0.1, 1.0, 5.0):
                moved = product([w - rate * d for w, d in zip(factors, step, strict=True)])
                inner = np.eye(5) - rate / depth * np.linalg.solve(beta, slope)
                exact.append(relative_error(moved, beta @ np.linalg.matrix_power(inner, depth)))
    report("one observation")
    others, entries, joint = [], [], []
    for depth in (1, 2, 3, 5):
        for _ in range(SEEDS):
            factors = draw_factors(rng, [11] * (depth + 1))
            for rate in (0.01, 0.7, 20.0):
                kernel = factorization.step_kernel(
                    factors, _ENTRY, kind="split", step_size=rate, error=-1.3
                )
                others.append(off_entry(kernel))
                entries.append(relative_error(kernel[_ENTRY], entry_moved(factors, rate, -1.3)))
            if depth == 2:
                kernel = factorization.step_kernel(
                    factors, _ENTRY, kind="joint", step_size=0.7, error=-1.3
                )
                joint.append(off_entry(kernel))
    report("dense Jacobians")
    flows, penrose = [], []
    for sizes in ([4, 4, 4], [4, 6, 5], [4, 4, 4, 4]):
        for _ in range(SEEDS):
            factors = draw_factors(rng, sizes)
            slope, jacobian = rng.standard_normal((sizes[0], sizes[-1])), product_jacobian(factors)
            shortest = flat(_joint_step(factors, slope))
            penrose.append(relative_error(shortest, pseudo_inverse(jacobian) @ slope.ravel()))
            for found in (shortest, flat(split_step(factors, slope))):
                flows.append(relative_error(jacobian @ found, slope.ravel()))
    projected, narrow = [], []
    for _ in range(SEEDS):
        factors = draw_factors(rng, [5, 2, 4])
        slope, jacobian = rng.standard_normal((5, 4)), product_jacobian(factors)
        shortest = flat(_joint_step(factors, slope))
        projected.append(relative_error(shortest, pseudo_inverse(jacobian) @ slope.ravel()))
        narrow.append(relative_error(jacobian @ shortest, slope.ravel()))
    return Outcome(
        (
            below("finite step of the split against the closed form, relative", max(exact), 1e-11),
            below("one observation: other entries over the observed one, at any eta",
                  max(others), 1e-11),
            below("one observation: its entry against the closed form, relative",
                  max(entries), 1e-10),
            above("joint solution, L = 2, eta = 0.7: other entries, in every draw",
                  min(joint), 1e-4),
            below("J dW against G, both solutions, relative", max(flows), 1e-10),
            below("joint solution against J^+ G, relative", max(penrose), 1e-9),
            below("5-2-4: joint solution against J^+ G, relative", max(projected), 1e-9),
            above("5-2-4: J dW - G, relative, in every draw", min(narrow), 0.01),
        ),
        notes=("For one observation with residual r, G = r E, and all powers of beta^-1 G are "
               "multiples of it: hence one entry at any step size. The joint Moore-Penrose "
               "solution has this in the flow only; a finite step of it moves other entries by the "
               "order of eta.",),
    )  # fmt: skip


@check(
    "KE-Eq51",
    "The order of the factors in the natural gradient of a factorisation",
    claim="dW_i = 1/L vec^-1((B_i^T + (x) A_i^+) vec G) solves J_i dW_i = G / L for every factor "
    "(Eqs. 48-51).",
    setting=f"4 x 4 factors with L = 2 and 3, and sizes 4-6-5; {SEEDS} draws each; diagonal "
    "networks with L = 2, D = 5; float64",
    origin="ours",
    kind="misprint",
    remark=(
        "Eq. 51 and Section 4 print dW_i = 1/L (B_i^T)^+ G A_i^+. The right order is 1/L A_i^+ G "
        "B_i^+; the printed one fits in size for square factors and does not solve Eq. 50. In Eq."
        " 39 the product leaves out k = n, the layer, not k = i, the entry."
    ),
    fast=True,
)
@in_float64
def order_of_factors(report: Report) -> Outcome:
    """Both orders against dense Jacobians."""
    report("solving")
    rng = np.random.default_rng(0)
    kronecker, layers, total, printed = [], [], [], []
    for sizes in ([4, 4, 4], [4, 4, 4, 4], [4, 6, 5]):
        for _ in range(SEEDS):
            factors, slope = draw_factors(rng, sizes), rng.standard_normal((sizes[0], sizes[-1]))
            depth, step = len(factors), split_step(factors, slope)
            jacobian = product_jacobian(factors)
            total.append(relative_error(jacobian @ flat(step), slope.ravel()))
            blocks = np.split(jacobian, np.cumsum([w.size for w in factors])[:-1], axis=1)
            wrong = np.zeros_like(slope)
            for index, (block, part) in enumerate(zip(blocks, step, strict=True)):
                left, right = around(factors, index)
                layers.append(relative_error(block @ part.ravel(), slope.ravel() / depth))
                moved = (block @ part.ravel()).reshape(slope.shape)
                kronecker.append(
                    relative_error(np.kron(right.T, left) @ part.ravel("F"), moved.ravel("F"))
                )
                if sizes[0] == sizes[-1]:
                    order = pseudo_inverse(right.T) @ slope @ pseudo_inverse(left) / depth
                    wrong += left @ order @ right
            if sizes[0] == sizes[-1]:
                printed.append(relative_error(wrong, slope))
    index_error, printed_index = [], []
    for _ in range(SEEDS):
        weights = rng.uniform(0.5, 1.5, (2, 5))
        dense = np.asarray(jax.jacobian(lambda w: jnp.prod(w, axis=0))(weights))
        expected = np.stack([np.diag(dense[:, layer]) for layer in range(2)])
        index_error.append(
            relative_error(diagonal_network.other_products(jnp.asarray(weights)), expected)
        )
        # leaving out the layer whose number is that of the entry, if there is one
        kept = [np.prod(np.delete(weights[:, i], [i] if i < 2 else [])) for i in range(5)]
        printed_index.append(relative_error(np.tile(kept, (2, 1)), expected))
    return Outcome(
        (
            below("J_i dW_i against G / L, each factor, relative", max(layers), 1e-11),
            below("J dW against G, relative", max(total), 1e-11),
            above("printed order: J dW - G, relative, in every draw", min(printed), 0.1),
            below("Eq. 49: (B_i^T (x) A_i) vec against automatic differentiation, relative",
                  max(kronecker), 1e-11),
            below("Eq. 39 without k = n against differentiation", max(index_error), 1e-12),
            above("Eq. 39 as printed, without k = i, in every draw", min(printed_index), 0.1),
        )
    )  # fmt: skip
