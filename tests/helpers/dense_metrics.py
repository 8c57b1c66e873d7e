"""Every structure as an explicit matrix, by its definition, in NumPy.

Parameters are ordered layer by layer, in a layer input by input (the bias is the last one), then
group by group, then unit by unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_flax as ng


@dataclass
class DenseLayer:
    """What is known of one layer.

    Attributes:
      jacobian: of the seeded outputs, (N, S, fan_in, M).
      bias: whether the last parameter of each unit is a bias.
      inputs: with the bias column, (N, T, G, fan_in), of an affine layer with T positions and G
        groups of units; None for a parameter without a formula.
      derivatives: (N, S, T, G, M/G).
      shared: whether positions may share the weights.
    """

    jacobian: np.ndarray
    bias: bool
    inputs: np.ndarray | None = None
    derivatives: np.ndarray | None = None
    shared: bool = True

    @classmethod
    def affine(
        cls, inputs: np.ndarray, derivatives: np.ndarray, bias: bool, shared: bool = True
    ) -> DenseLayer:
        """With the Jacobian that these have."""
        jacobian = np.einsum("ntgk,nstgm->nskgm", inputs, derivatives)
        jacobian = jacobian.reshape(*jacobian.shape[:3], -1)
        return cls(jacobian, bias, inputs, derivatives, shared)

    @property
    def rows(self) -> np.ndarray:
        """The Jacobian, (N S, P)."""
        return self.jacobian.reshape(self.jacobian.shape[0] * self.jacobian.shape[1], -1)

    @property
    def units(self) -> np.ndarray:
        """The unit of every parameter, (P,)."""
        _, _, fan_in, units = self.jacobian.shape
        return np.tile(np.arange(units), fan_in)


@dataclass
class TiedLayer(DenseLayer):
    """Weights that are also used transposed.

    Attributes:
      turned: the other use, as a layer of its own.
      one_hot: whether the inputs are.
    """

    turned: DenseLayer | None = None
    one_hot: bool = False


def metric(structure: ng.Structure, layers: list[DenseLayer], damping) -> np.ndarray:
    """G, shape (P, P).

    Args:
      structure: the approximation.
      layers: of the network.
      damping: one number; one a layer, (L,); or for ``ng.KFAC`` one a factor, (L, 2).
    """
    n = len(layers[0].jacobian)
    rhos = np.asarray(damping, float)
    rhos = np.broadcast_to(rhos, (len(layers),)) if rhos.ndim == 0 else rhos
    if isinstance(structure, ng.Exact | ng.LayerWise):
        rows = np.concatenate([layer.rows for layer in layers], axis=1)
        owner = np.repeat(np.arange(len(layers)), [layer.rows.shape[1] for layer in layers])
        sigma = np.ones((len(layers),) * 2)
        if isinstance(structure, ng.LayerWise):
            sigma = structure.coupling(len(layers))
        return sigma[owner][:, owner] * (rows.T @ rows) / n + np.diag(rhos[owner])
    if isinstance(structure, ng.Nystroem):
        return _in_random_directions(structure, layers) + rhos[0] * np.eye(
            sum(layer.rows.shape[1] for layer in layers)
        )
    last = max((i for i, layer in enumerate(layers) if layer.inputs is not None), default=-1)
    blocks = [
        _block(structure, layer, rho, index == 0, index == last)
        for index, (layer, rho) in enumerate(zip(layers, rhos, strict=True))
    ]
    total = sum(map(len, blocks))
    out, at = np.zeros((total, total)), 0
    for block in blocks:
        out[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return out


def _in_random_directions(structure, layers):
    """F Omega (Omega^T F Omega)^+ Omega^T F."""
    rows = np.concatenate([layer.rows for layer in layers], axis=1)
    fisher, keys = rows.T @ rows / len(layers[0].jacobian), jax.random.key(structure.seed)
    keys = jax.random.split(keys, min(structure.rank, *rows.shape))
    omega = np.stack([jax.random.normal(key, (len(fisher),), jnp.float64) for key in keys], axis=1)
    seen = fisher @ omega
    return seen @ np.linalg.pinv(omega.T @ seen, rcond=1e-12, hermitian=True) @ seen.T


def _block(structure, layer, rho, first, last):
    rows = layer.rows
    fisher, eye = rows.T @ rows / len(layer.jacobian), np.eye(rows.shape[1])
    if layer.inputs is not None and isinstance(structure, ng.KFAC):
        return _kronecker(structure, layer, rho, first, last)
    alone = layer.inputs is not None and not isinstance(layer, TiedLayer)
    if alone and isinstance(structure, ng.Foof):
        return _one_factor(structure, layer, rho)
    if layer.inputs is not None and isinstance(structure, ng.Shampoo):
        return _moments(structure, layer, rho)
    if layer.inputs is not None and isinstance(structure, ng.MiniBlock):
        return _mean_block(structure, layer, rho)
    if layer.inputs is not None and isinstance(structure, ng.KFOC):
        return _nearest(layer, rho)
    if layer.inputs is not None and isinstance(structure, ng.EKFAC):
        return _eigenbasis(structure, layer) + rho * eye
    of_block = rho if np.ndim(rho) == 0 else rho[0]
    if isinstance(structure, ng.BlockDiagonal):
        return fisher + of_block * eye
    if isinstance(structure, ng.Diagonal):
        return (fisher + of_block) * eye
    same = layer.units[:, None] == layer.units
    if isinstance(structure, ng.QuasiDiagonal):
        return _quasi_diagonal(fisher + of_block * eye, layer)
    if isinstance(structure, ng.LowRankUnits):
        return _largest(structure.rank, same * fisher, layer.units) + of_block * eye
    if isinstance(structure, ng.Shampoo | ng.KFOC | ng.MiniBlock):
        return same * fisher + of_block * eye
    if isinstance(structure, ng.UnitBlocks):
        _, _, fan_in, units = layer.jacobian.shape
        piece = np.repeat(np.arange(fan_in) // structure.size, units)
        same = same & (piece[:, None] == piece)
        return same * fisher + of_block * eye
    assert isinstance(structure, ng.UnitWise | ng.KFAC | ng.EKFAC | ng.Foof)
    return same * fisher + of_block * eye


def _largest(rank, blocks, units):
    """The largest eigenvalues of the block of each unit."""
    out = np.zeros_like(blocks)
    for unit in range(units.max() + 1):
        own = np.ix_(*[np.flatnonzero(units == unit)] * 2)
        values, vectors = np.linalg.eigh(blocks[own])
        out[own] = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    return out


def _mean_block(structure, layer, rho):
    """The mean over units, or over inputs, of the blocks between parameters that share it."""
    n, fan_in, blocks = len(layer.jacobian), layer.inputs.shape[3], []
    for rows in _by_groups(layer):
        units = rows.shape[2]
        if structure.side == "inputs":
            block = sum(rows[:, :, m].T @ rows[:, :, m] for m in range(units)) / (n * units)
            blocks.append(np.kron(block + rho * np.eye(fan_in), np.eye(units)))
        else:
            block = sum(rows[:, k].T @ rows[:, k] for k in range(fan_in)) / (n * fan_in)
            blocks.append(np.kron(np.eye(fan_in), block + rho * np.eye(units)))
    return _over_groups(blocks, fan_in)


def _quasi_diagonal(full, layer):
    out = full * np.eye(len(full))
    if layer.bias:
        units = layer.jacobian.shape[3]
        for unit in range(units):
            rows = np.flatnonzero(layer.units == unit)
            corner, mixed = full[rows[-1], rows[-1]], full[rows, rows[-1]]
            if corner:
                block = np.outer(mixed, mixed) / corner
                np.fill_diagonal(block, np.diag(full)[rows])
                out[np.ix_(rows, rows)] = block
    return out


def factors(sharing: str, layer: DenseLayer) -> tuple[np.ndarray, np.ndarray]:
    """A* (G, K, K) and B* (G, M/G, M/G)."""
    if isinstance(layer, TiedLayer):
        return _of_both_uses(sharing, layer)
    a, d = layer.inputs, layer.derivatives
    if sharing == "reduce":
        a, d = a.mean(axis=1, keepdims=True), d.sum(axis=2, keepdims=True)
    n, positions = a.shape[:2]
    left = np.einsum("ntgk,ntgj->gkj", a, a) / (n * positions)
    return left, np.einsum("nstgm,nstgi->gmi", d, d) / n


def _of_both_uses(sharing, layer):
    """(A_1 + c A_2) (x) (B_1 + B_2 / c) with the trace of A_1 (x) B_1 + A_2 (x) B_2."""
    own = DenseLayer(layer.jacobian, False, layer.inputs, layer.derivatives)
    (a,), (b,) = factors(sharing, own)
    (b2,), (a2,) = factors(sharing, layer.turned)
    if layer.one_hot and sharing == "expand":
        a2 = np.diag(np.diag(a2))
    first, second = np.trace(a) * np.trace(b), np.trace(a2) * np.trace(b2)
    c = np.sqrt(np.trace(a) * np.trace(b2) / (np.trace(a2) * np.trace(b)))
    left, right = a + c * a2, b + b2 / c
    # tr A is between those of both uses, in the ratio of the roots of the traces
    trace = (np.sqrt(first) * np.trace(a) + np.sqrt(second) * np.trace(a2)) / (
        np.sqrt(first) + np.sqrt(second)
    )
    left = left * trace / np.trace(left)
    return left[None], right[None] * (first + second) / (trace * np.trace(right))


def _kronecker(structure, layer, rho, first, last):
    n, (left, right) = len(layer.jacobian), factors(structure.sharing, layer)
    fan_in = left.shape[1]
    if last and structure.last_layer == "scaled":
        right = right / n
    if first and structure.first_layer == "scaled" and fan_in < n and not layer.shared:
        left = left * fan_in / n
    rho_a, rho_b = np.broadcast_to(rho, (2,))
    if structure.split == "pi" and np.ndim(rho) == 0 and rho:
        mean_a, mean_b = (np.einsum("gii->", f) / (len(f) * f.shape[1]) for f in (left, right))
        pi = np.sqrt(mean_a / mean_b) if mean_a > 0 and mean_b > 0 else 1.0
        rho_a, rho_b = pi * np.sqrt(rho), np.sqrt(rho) / pi
    left, right = left + rho_a * np.eye(fan_in), right + rho_b * np.eye(right.shape[1])
    return _over_groups([np.kron(a, b) for a, b in zip(left, right, strict=True)], fan_in)


def _one_factor(structure, layer, rho):
    pair = list(factors(structure.sharing, layer))
    kept = int(structure.side == "units")
    pair[kept] = pair[kept] + rho * np.eye(pair[kept].shape[1])
    pair[1 - kept] = np.broadcast_to(np.eye(pair[1 - kept].shape[1]), pair[1 - kept].shape)
    return _over_groups([np.kron(a, b) for a, b in zip(*pair, strict=True)], layer.inputs.shape[3])


def _by_groups(layer):
    """The Jacobian of every group, (N S, K, M/G)."""
    n, s, fan_in, _ = layer.jacobian.shape
    jacobian = layer.jacobian.reshape(n * s, fan_in, layer.inputs.shape[2], -1)
    return np.moveaxis(jacobian, 2, 0)


def _moments(structure, layer, rho):
    n, fan_in, blocks = len(layer.jacobian), layer.inputs.shape[3], []
    for rows in _by_groups(layer):
        sides = np.einsum("rkm,rjm->kj", rows, rows) / n, np.einsum("rkm,rki->mi", rows, rows) / n
        powers = []
        for side, own in zip(sides, np.broadcast_to(rho, (2,)), strict=True):
            values, vectors = np.linalg.eigh(side)
            values = np.where(values > 1e-12 * values[-1], values, 0) + own
            powers.append((vectors * values**structure.power) @ vectors.T)
        blocks.append(np.kron(*powers))
    return _over_groups(blocks, fan_in)


def _nearest(layer, rho):
    """By the singular values of the block, rearranged (Van Loan & Pitsianis 1993)."""
    n, fan_in, blocks = len(layer.jacobian), layer.inputs.shape[3], []
    for rows in _by_groups(layer):
        units = rows.shape[2]
        block = np.einsum("rkm,rji->kjmi", rows, rows) / n
        u, values, v = np.linalg.svd(block.reshape(fan_in**2, units**2))
        a, b = values[0] * u[:, 0].reshape((fan_in,) * 2), v[0].reshape((units,) * 2)
        scale = np.sign(np.trace(a)) * np.sqrt(np.trace(b) / units / (np.trace(a) / fan_in))
        a, b = a * scale, b / scale
        blocks.append(np.kron(a + rho**0.5 * np.eye(fan_in), b + rho**0.5 * np.eye(units)))
    return _over_groups(blocks, fan_in)


def _eigenbasis(structure, layer):
    n, s, fan_in, _ = layer.jacobian.shape
    left, right = factors(structure.sharing, layer)
    jacobian, blocks = layer.jacobian.reshape(n, s, fan_in, len(left), -1), []
    for group in range(len(left)):
        u, v = np.linalg.eigh(left[group])[1], np.linalg.eigh(right[group])[1]
        squares = np.sum((u.T @ jacobian[:, :, :, group] @ v) ** 2, axis=(0, 1)) / n
        basis = np.kron(u, v)
        blocks.append((basis * squares.ravel()) @ basis.T)
    return _over_groups(blocks, fan_in)


def _over_groups(blocks, fan_in):
    """Blocks of groups, (K M/G, K M/G), as one block in the order of the parameters."""
    groups, units = len(blocks), len(blocks[0]) // fan_in
    out = np.zeros((fan_in, groups, units) * 2)
    for group, block in enumerate(blocks):
        out[:, group, :, :, group, :] = block.reshape((fan_in, units) * 2)
    return out.reshape((fan_in * groups * units,) * 2)
