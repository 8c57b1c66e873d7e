"""Dense references: explicit Jacobians, explicit P x P matrices, explicit (pseudo-)inverses.

Parameters are ordered layer by layer, the kernel (K, M) row by row and then the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.activations import get_activation


def flatten(state) -> np.ndarray:
    """Parameters, a gradient or an update as one vector."""
    parts = []
    for index in range(len(state["layers"])):
        layer = state["layers"][index]
        parts += [np.ravel(layer[k][...]) for k in ("kernel", "bias") if k in layer]
    return np.concatenate(parts)


@dataclass
class Reference:
    """Everything dense about an MLP on a batch."""

    jacobian: np.ndarray  # (N C, P), n-major
    gradient: np.ndarray  # (P,)
    fisher: np.ndarray  # (P, P)
    inputs: list[np.ndarray]  # a with the bias column, (N, K)
    backward: list[np.ndarray]  # seeded D, (N, S, M)
    owner: np.ndarray  # layer of each parameter
    unit: np.ndarray  # unit of each parameter, counted through the network
    bias: np.ndarray  # whether a parameter is a bias
    num_samples: int


def reference(model: ng.MLP, x, y, loss: ng.Loss, seeds=None) -> Reference:
    """The dense matrices by automatic differentiation and a hand-written backward pass.

    ``seeds`` (N, S, C) replace the factor of the output Fisher (Monte-Carlo, empirical).
    """
    graphdef, state = nnx.split(model)
    outputs = model(x)
    n, c = outputs.shape
    jac = jax.jacobian(lambda s: nnx.merge(graphdef, s)(x))(state)
    depth = len(model.layers)
    columns, owner, unit, bias, first = [], [], [], [], 0
    for index in range(depth):
        layer = jac["layers"][index]
        kernel = np.asarray(layer["kernel"][...])
        k, m = kernel.shape[-2:]
        columns.append(kernel.reshape(n * c, -1))
        unit.append(first + np.tile(np.arange(m), k))
        bias.append(np.zeros(k * m, bool))
        if "bias" in layer:
            columns.append(np.asarray(layer["bias"][...]).reshape(n * c, -1))
            unit.append(first + np.arange(m))
            bias.append(np.ones(m, bool))
        owner.append(np.full((k + ("bias" in layer)) * m, index))
        first += m
    jacobian = np.concatenate(columns, axis=1)
    slope = jax.grad(lambda s: loss(nnx.merge(graphdef, s)(x), y))(state)
    if seeds is None:
        values, vectors = np.linalg.eigh(np.asarray(loss.fisher(outputs)))
        seeds = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]).swapaxes(1, 2)
    seeds = np.asarray(seeds)
    weighted = np.einsum("nsc,ncp->nsp", seeds, jacobian.reshape(n, c, -1))
    fisher = np.einsum("nsp,nsq->pq", weighted, weighted) / n
    inputs, backward = _signals(model, np.asarray(x), seeds)
    return Reference(
        jacobian,
        flatten(slope),
        fisher,
        inputs,
        backward,
        np.concatenate(owner),
        np.concatenate(unit),
        np.concatenate(bias),
        n,
    )


def _signals(model, x, seeds):
    phi = get_activation(model.activation).function
    derivative = jax.vmap(jax.vmap(jax.grad(lambda u: phi(u))))
    inputs, pre, h = [], [], x
    for layer in model.layers:
        kernel = np.asarray(layer.kernel[...])
        a = np.sqrt(model.weight_variance / h.shape[1]) * h
        u = a @ kernel
        if layer.bias is not None:
            u = u + np.sqrt(model.bias_variance) * np.asarray(layer.bias[...])
            a = np.concatenate([a, np.full((len(a), 1), np.sqrt(model.bias_variance))], axis=1)
        inputs.append(a)
        pre.append(u)
        h = np.asarray(phi(jnp.asarray(u)))
    backward = [seeds]
    for index in range(len(model.layers) - 1, 0, -1):
        kernel = np.asarray(model.layers[index].kernel[...])
        scale = np.sqrt(model.weight_variance / kernel.shape[0])
        slope = np.asarray(derivative(jnp.asarray(pre[index - 1])))
        backward.insert(0, scale * (backward[0] @ kernel.T) * slope[:, None, :])
    return inputs, backward


def metric(structure: ng.Structure, ref: Reference, damping: float) -> np.ndarray:
    """G of a structure from the dense Fisher, shape (P, P)."""
    size = len(ref.owner)
    eye = np.eye(size)
    if isinstance(structure, ng.Exact):
        return ref.fisher + damping * eye
    if isinstance(structure, ng.LayerWise):
        sigma = structure.coupling(ref.owner[-1] + 1)
        return sigma[ref.owner][:, ref.owner] * ref.fisher + damping * eye
    if isinstance(structure, ng.UnitWise):
        return (ref.unit[:, None] == ref.unit) * ref.fisher + damping * eye
    if isinstance(structure, ng.Diagonal):
        return np.diag(np.diag(ref.fisher)) + damping * eye
    if isinstance(structure, ng.QuasiDiagonal):
        return _quasi_diagonal(ref, damping)
    assert isinstance(structure, ng.KFAC)
    return _kronecker(structure, ref, damping)


def _quasi_diagonal(ref: Reference, damping: float) -> np.ndarray:
    full = ref.fisher + damping * np.eye(len(ref.owner))
    out = np.diag(np.diag(full)).copy()
    for unit in np.unique(ref.unit):
        rows = np.flatnonzero(ref.unit == unit)
        bias = rows[ref.bias[rows]]
        if len(bias) == 0 or full[bias[0], bias[0]] == 0:
            continue
        row = full[rows][:, bias[0]]
        block = np.outer(row, row) / full[bias[0], bias[0]]
        np.fill_diagonal(block, np.diag(full)[rows])
        out[np.ix_(rows, rows)] = block
    return out


def _kronecker(structure: ng.KFAC, ref: Reference, damping: float) -> np.ndarray:
    blocks, n = [], ref.num_samples
    for index, (a, d) in enumerate(zip(ref.inputs, ref.backward, strict=True)):
        flat = d.reshape(-1, d.shape[2])
        left, right = a.T @ a / n, flat.T @ flat / n
        if index == len(ref.inputs) - 1 and structure.last_layer == "scaled":
            right = right / n
        if index == 0 and structure.first_layer == "scaled" and a.shape[1] < n:
            left = left * a.shape[1] / n
        rho_a = rho_b = damping
        if structure.split == "pi" and damping:
            pi = np.sqrt((np.trace(left) / len(left)) / (np.trace(right) / len(right)))
            rho_a, rho_b = pi * np.sqrt(damping), np.sqrt(damping) / pi
        blocks.append(
            np.kron(left + rho_a * np.eye(len(left)), right + rho_b * np.eye(len(right)))
        )
    size = sum(map(len, blocks))
    out, at = np.zeros((size, size)), 0
    for block in blocks:
        out[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return out


def blocks_of(structure: ng.Structure, ref: Reference) -> list[np.ndarray]:
    """Index sets of the diagonal blocks that a structure inverts on their own."""
    if isinstance(structure, (ng.UnitWise, ng.QuasiDiagonal, ng.Diagonal)):
        label = ref.unit
    elif isinstance(structure, (ng.BlockDiagonal, ng.KFAC)):
        label = ref.owner
    else:
        label = np.zeros_like(ref.owner)
    return [np.flatnonzero(label == value) for value in np.unique(label)]


def solve_dense(structure, ref: Reference, damping: float) -> tuple[np.ndarray, float]:
    """G^{-1} (or G^+) times the gradient, and the worst condition number of a block."""
    matrix = metric(structure, ref, damping)
    update = np.zeros(len(ref.owner))
    worst = 1.0
    for rows in blocks_of(structure, ref):
        block = matrix[np.ix_(rows, rows)]
        values, vectors = np.linalg.eigh(block)
        size = np.abs(values)
        top = size.max()
        if top == 0:
            continue
        keep = size > (1e-12 * top if damping == 0 else 0)
        worst = max(worst, top / size[keep].min())
        projected = vectors.T @ ref.gradient[rows]
        update[rows] = vectors[:, keep] @ (projected[keep] / values[keep])
    return update, worst
