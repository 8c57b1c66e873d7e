"""Dense references: explicit Jacobians, explicit P x P matrices, explicit (pseudo-)inverses.

Parameters are ordered layer by layer, the kernel (K, M) row by row and then the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import dense_metrics
import jax
import jax.numpy as jnp
import numpy as np
from dense_metrics import DenseLayer
from flax import nnx
from scipy import special, stats

import natgrad_flax as ng


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


ACTIVATIONS = {
    "relu": (lambda u: np.maximum(u, 0), lambda u: 1.0 * (u > 0)),
    "tanh": (np.tanh, lambda u: 1 - np.tanh(u) ** 2),
    "erf": (special.erf, lambda u: 2 / np.sqrt(np.pi) * np.exp(-(u**2))),
    "gelu": (lambda u: u * stats.norm.cdf(u), lambda u: stats.norm.cdf(u) + u * stats.norm.pdf(u)),
    "leaky_relu": (lambda u: np.where(u > 0, u, 0.01 * u), lambda u: np.where(u > 0, 1, 0.01)),
    "identity": (lambda u: u, np.ones_like),
}


def reference(model: ng.MLP, x, y, loss: ng.Loss, seeds=None) -> Reference:
    """The dense matrices by a hand-written forward and backward pass in NumPy.

    ``seeds`` (N, S, C) replace the factor of the output Fisher (Monte-Carlo, empirical).
    """
    x, y = np.asarray(x), np.asarray(y)
    inputs, pre, outputs = forward(model, x)
    n, c = outputs.shape
    plain = backward(model, pre, np.broadcast_to(np.eye(c), (n, c, c)))
    residual, output_fisher = loss_terms(loss, outputs, y)
    if seeds is None:
        values, vectors = np.linalg.eigh(output_fisher)
        seeds = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]).swapaxes(1, 2)
    seeds = np.asarray(seeds)
    columns = [
        np.einsum("nsm,nk->nskm", d, a).reshape(n * c, -1)
        for a, d in zip(inputs, plain, strict=True)
    ]
    jacobian = np.concatenate(columns, axis=1)
    weighted = np.einsum("nsc,ncp->nsp", seeds, jacobian.reshape(n, c, -1))
    owner, unit, bias, first = [], [], [], 0
    for index, (a, d) in enumerate(zip(inputs, plain, strict=True)):
        k, m = a.shape[1], d.shape[2]
        has_bias = model.layers[index].bias is not None
        owner.append(np.full(k * m, index))
        unit.append(first + np.tile(np.arange(m), k))
        bias.append(np.arange(k * m) >= (k - has_bias) * m)
        first += m
    return Reference(
        jacobian,
        jacobian.T @ residual.reshape(-1) / n,
        np.einsum("nsp,nsq->pq", weighted, weighted) / n,
        inputs,
        backward(model, pre, seeds),
        np.concatenate(owner),
        np.concatenate(unit),
        np.concatenate(bias),
        n,
    )


def loss_terms(loss: ng.Loss, outputs, y):
    """The residual (N, C) and the output Fisher (N, C, C)."""
    if isinstance(loss, ng.MeanSquaredError):
        return outputs - y, np.broadcast_to(np.eye(y.shape[1]), (*y.shape, y.shape[1]))
    p = special.softmax(outputs, axis=1)
    return p - y, p[:, :, None] * (np.eye(y.shape[1]) - p[:, None, :])


def forward(model, x):
    """Scaled inputs with the bias column, pre-activations, and outputs."""
    phi = ACTIVATIONS[model.activation][0]
    inputs, pre, h = [], [], x
    for layer in model.layers:
        a = np.sqrt(model.weight_variance / h.shape[1]) * h
        weights = np.asarray(layer.kernel[...])
        if layer.bias is not None:
            a = np.concatenate([a, np.full((len(a), 1), np.sqrt(model.bias_variance))], axis=1)
            weights = np.concatenate([weights, np.asarray(layer.bias[...])[None]])
        inputs.append(a)
        pre.append(a @ weights)
        h = phi(pre[-1])
    return inputs, pre, pre[-1]


def backward(model, pre, seeds):
    """Derivatives of the seeded outputs with respect to pre-activations, L arrays (N, S, M)."""
    slope = ACTIVATIONS[model.activation][1]
    out = [seeds]
    for index in range(len(model.layers) - 1, 0, -1):
        kernel = np.asarray(model.layers[index].kernel[...])
        scale = np.sqrt(model.weight_variance / kernel.shape[0])
        out.insert(0, scale * (out[0] @ kernel.T) * slope(pre[index - 1])[:, None, :])
    return out


def make_mlp(widths, seed, dtype=np.float64, **settings) -> ng.MLP:
    """An MLP with NumPy's random parameters: nothing to compile for every new shape."""
    rng = np.random.default_rng(seed)
    abstract = nnx.eval_shape(
        lambda: ng.MLP(widths, param_dtype=dtype, rngs=nnx.Rngs(0), **settings)
    )
    graphdef, state = nnx.split(abstract)
    filled = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), state)
    return nnx.merge(graphdef, filled)


def metric(structure: ng.Structure, ref: Reference, damping: float) -> np.ndarray:
    """G of a structure, shape (P, P)."""
    layers = []
    for index, (a, d) in enumerate(zip(ref.inputs, ref.backward, strict=True)):
        bias = bool(ref.bias[ref.owner == index].any())
        layers.append(DenseLayer.affine(a[:, None, None], d[:, :, None, None], bias, shared=False))
    return dense_metrics.metric(structure, layers, damping)


def blocks_of(structure: ng.Structure, ref: Reference) -> list[np.ndarray]:
    """Index sets of the diagonal blocks that a structure inverts on their own."""
    if isinstance(structure, (ng.UnitWise, ng.QuasiDiagonal, ng.Diagonal)):
        label = ref.unit
    elif isinstance(structure, (ng.BlockDiagonal, ng.KFAC, ng.EKFAC)):
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
