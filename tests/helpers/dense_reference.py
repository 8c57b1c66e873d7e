"""Steps of every structure from dense Jacobians in NumPy, in float64 and without normal equations.

All go through singular values of the rows of J, so that they lose cond(G)^(1/2) where a solve with
G loses cond(G): what is compared with them may itself be float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import natgrad_flax as ng

BIAS_SCALE = 0.5


@dataclass
class Layer:
    """One layer: scaled inputs with the bias column (N, K), seeded derivatives (N, S, M).

    ``direction`` is the residual carried back to the pre-activations, (N, M).
    """

    inputs: np.ndarray
    derivatives: np.ndarray
    direction: np.ndarray

    @property
    def jacobian(self) -> np.ndarray:
        """Seeded, (N, S, K, M)."""
        return np.einsum("nsm,nk->nskm", self.derivatives, self.inputs)

    @property
    def rows(self) -> np.ndarray:
        """(N S, K M)."""
        return self.jacobian.reshape(self.derivatives.shape[0] * self.derivatives.shape[1], -1)

    @property
    def slope(self) -> np.ndarray:
        """The gradient of the loss, (K, M)."""
        return self.inputs.T @ self.direction / len(self.inputs)


@dataclass
class Problem:
    """A network on a batch; ``coefficients`` w with r = R w, (N, S), None where r is outside."""

    layers: list[Layer]
    coefficients: np.ndarray | None
    rank: float


def linearise(parameters, x, seeds, residual, coefficients, dtype) -> Problem:
    """A ReLU network by a forward and a backward pass in float64, its signals rounded to a dtype.

    Args:
      parameters: kernel (K, M) and bias (M,) of each layer, in NTK parametrisation.
      x: inputs (N, K).
      seeds: from the outputs (N, C) to (N, S, C).
      residual: from the outputs to r, (N, C).
      coefficients: from the outputs to w with r = R w, (N, S), or None where r is outside.
      dtype: of the signals.
    """
    h, inputs, slopes = x, [], []
    for kernel, bias in parameters:
        inputs.append(np.concatenate([h * _scale(kernel), np.full((len(h), 1), BIAS_SCALE)], 1))
        pre = inputs[-1] @ np.concatenate([kernel, bias[None]])
        slopes.append(pre > 0)
        h = np.maximum(pre, 0)
    out = np.concatenate([seeds(pre), residual(pre)[:, None]], axis=1)
    inside = None if coefficients is None else _rounded(coefficients(pre), dtype)
    layers = []
    for index in reversed(range(len(inputs))):
        derivatives, direction = _rounded(out[:, :-1], dtype), _rounded(out[:, -1], dtype)
        if inside is not None:
            direction = np.einsum("ns,nsm->nm", inside, derivatives)
        layers.insert(0, Layer(_rounded(inputs[index], dtype), derivatives, direction))
        kernel = parameters[index][0]
        if index:
            out = (out @ (_scale(kernel) * kernel).T) * slopes[index - 1][:, None, :]
    return Problem(layers, inside, 1e-6 if dtype == np.float32 else 1e-10)


def _scale(kernel):
    return np.sqrt(2 / len(kernel))


def _rounded(array, dtype):
    return array.astype(dtype).astype(np.float64)


@dataclass
class Spectrum:
    """The singular value decomposition U s V^T of some rows, and the rank they have."""

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray
    size: int

    @classmethod
    def of(cls, rows: np.ndarray, rank: float) -> Spectrum:
        left, values, right = np.linalg.svd(rows, full_matrices=False)
        keep = values > rank * values.max(initial=0)
        return cls(left[:, keep], values[keep], right[keep].T, rows.shape[1])

    def condition(self, rho: float) -> float:
        """Of rows^T rows + rho, or of its range at rho = 0."""
        squares = self.values**2
        top, full = squares.max(initial=0), len(squares) == self.size
        if rho == 0:
            return top / squares.min() if len(squares) else 1.0
        return (top + rho) / ((squares.min() if full else 0) + rho)

    def solve(self, g: np.ndarray, rho: float, inside: bool) -> np.ndarray:
        """(rows^T rows + rho)^{-1} g; the pseudo-inverse at rho = 0.

        ``inside``: g lies in the span of the rows, and what it has outside is rounding.
        """
        part = self.right.T @ g
        out = self.right @ (part / (self.values**2 + rho).reshape((-1,) + (1,) * (g.ndim - 1)))
        if rho and not inside:
            rest = g - self.right @ part
            out = out + (rest - self.right @ (self.right.T @ rest)) / rho
        return out


def solve(structure: ng.Structure, problem: Problem, rho: float) -> tuple[np.ndarray, float]:
    """G^{-1} J^T r / N as one vector, and the condition of G + rho, the worst of its blocks."""
    if isinstance(structure, ng.Exact):
        return _blocks([np.concatenate([a.rows for a in problem.layers], 1)], problem, rho)
    if isinstance(structure, ng.BlockDiagonal):
        return _blocks([a.rows for a in problem.layers], problem, rho)
    if isinstance(structure, ng.LayerWise):
        return _layer_wise(structure.coupling(len(problem.layers)), problem, rho)
    if isinstance(structure, ng.EKFAC):
        found = [_eigenbasis(a, rho, problem.rank) for a in problem.layers]
    elif isinstance(structure, ng.KFAC):
        last = len(problem.layers) - 1
        inside = problem.coefficients is not None
        found = [
            _kronecker(structure, a, rho, i == last, inside, problem.rank)
            for i, a in enumerate(problem.layers)
        ]
    else:
        by = {ng.UnitWise: _unit_wise, ng.Diagonal: _diagonal, ng.QuasiDiagonal: _quasi_diagonal}
        inside = problem.coefficients is not None
        found = [by[type(structure)](a, rho, inside, problem.rank) for a in problem.layers]
    return np.concatenate([step.ravel() for step, _ in found]), max(c for _, c in found)


def _blocks(blocks, problem, rho):
    n = len(problem.layers[0].inputs)
    slope = np.concatenate([a.slope.ravel() for a in problem.layers])
    parts = np.split(slope, np.cumsum([rows.shape[1] for rows in blocks])[:-1])
    spectra = [Spectrum.of(rows / np.sqrt(n), problem.rank) for rows in blocks]
    inside = problem.coefficients is not None
    steps = [s.solve(g, rho, inside) for s, g in zip(spectra, parts, strict=True)]
    return np.concatenate(steps), max(s.condition(rho) for s in spectra)


def _layer_wise(sigma, problem, rho):
    """V (M + rho)^+ V^T g + (what is outside) / rho, M = s U^T (Sigma (x) I) U s."""
    n = len(problem.layers[0].inputs)
    spectra = [Spectrum.of(a.rows / np.sqrt(n), problem.rank) for a in problem.layers]
    half = [s.left * s.values for s in spectra]
    middle = np.block(
        [
            [c * (a.T @ b) for c, b in zip(row, half, strict=True)]
            for row, a in zip(sigma, half, strict=True)
        ]
    )
    slopes = [a.slope.ravel() for a in problem.layers]
    target = np.concatenate([s.right.T @ g for s, g in zip(spectra, slopes, strict=True)])
    values, vectors = np.linalg.eigh(middle)
    values = values + rho
    keep = np.abs(values) > (problem.rank**2 * np.abs(values).max(initial=0) if rho == 0 else 0)
    inner = vectors[:, keep] @ ((vectors[:, keep].T @ target) / values[keep])
    parts = np.split(inner, np.cumsum([len(s.values) for s in spectra])[:-1])
    steps = []
    for s, y, g in zip(spectra, parts, slopes, strict=True):
        rest = g - s.right @ (s.right.T @ g)
        rest = rest - s.right @ (s.right.T @ rest)
        outside = rest / rho if rho and problem.coefficients is None else 0
        steps.append(s.right @ y + outside)
    size = np.abs(values[keep])
    if rho and sum(len(s.values) for s in spectra) < sum(s.size for s in spectra):
        size = np.append(size, rho)
    return np.concatenate(steps), size.max(initial=0) / size.min(initial=np.inf) if len(
        size
    ) else 1.0


def _kronecker(structure, layer, rho, last, inside, rank):
    n = len(layer.inputs)
    flat = layer.derivatives.reshape(-1, layer.derivatives.shape[2])
    a = layer.inputs / np.sqrt(n)
    b = flat / (n if last and structure.last_layer == "scaled" else np.sqrt(n))
    rho_a = rho_b = rho
    if structure.split == "pi" and rho:
        means = np.sum(a**2) / a.shape[1], np.sum(b**2) / b.shape[1]
        pi = np.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0
        rho_a, rho_b = pi * np.sqrt(rho), np.sqrt(rho) / pi
    left, right = Spectrum.of(a, rank), Spectrum.of(b, rank)
    half = right.solve(layer.direction.T, rho_b, inside).T
    step = left.solve(layer.inputs.T @ half / n, rho_a, True)
    return step, left.condition(rho_a) * right.condition(rho_b)


def _eigenbasis(layer, rho, rank):
    n = len(layer.inputs)
    u = np.linalg.svd(layer.inputs)[2].T
    v = np.linalg.svd(layer.derivatives.reshape(-1, layer.derivatives.shape[2]))[2].T
    turned = layer.inputs @ u, layer.derivatives @ v
    squares = np.einsum("nk,nsm->km", turned[0] ** 2, turned[1] ** 2) / n
    entries = squares + rho
    keep = entries > (rank**2 * squares.max() if rho == 0 else 0)
    inner = np.where(keep, (u.T @ layer.slope @ v) / np.where(keep, entries, 1), 0)
    size = entries[keep]
    return u @ inner @ v.T, size.max() / size.min() if size.size else 1.0


def _unit_wise(layer, rho, inside, rank):
    n, steps, conditions = len(layer.inputs), [], []
    for unit in range(layer.derivatives.shape[2]):
        rows = layer.jacobian[..., unit].reshape(-1, layer.inputs.shape[1]) / np.sqrt(n)
        spectrum = Spectrum.of(rows, rank)
        steps.append(spectrum.solve(layer.slope[:, unit], rho, inside))
        conditions.append(spectrum.condition(rho))
    return np.stack(steps, axis=1), max(conditions)


def _diagonal(layer, rho, inside, rank):
    entries = np.sum(layer.jacobian**2, axis=(0, 1)) / len(layer.inputs) + rho
    keep = entries > 0
    step = np.where(keep, layer.slope / np.where(keep, entries, 1), 0)
    return step, entries[keep].max(initial=1e-300) / entries[keep].min(
        initial=np.inf
    ) if keep.any() else 1.0


def _quasi_diagonal(layer, rho, inside, rank):
    """In extended precision: the remainder of a weight is a difference of nearly equal numbers."""
    n = len(layer.inputs)
    jacobian = layer.jacobian.astype(np.longdouble)
    bias, weights = jacobian[:, :, -1], jacobian[:, :, :-1]
    corner = np.sum(bias**2, axis=(0, 1)) / n + rho
    mixed = np.einsum("nsm,nskm->km", bias, weights) / n
    safe = np.where(corner > 0, corner, 1)
    ratio = np.where(corner > 0, mixed / safe, 0)
    rest = weights - ratio * bias[:, :, None]
    full = np.sum(weights**2, axis=(0, 1)) / n + rho
    remainder = np.sum(rest**2, axis=(0, 1)) / n + rho * (1 + ratio**2)
    keep = remainder > (rank**2 * full if rho == 0 else 0)
    slope = (
        np.einsum(
            "nk,nm->km", *(part.astype(np.longdouble) for part in (layer.inputs, layer.direction))
        )
        / n
    )
    first = np.where(corner > 0, slope[-1] / safe, 0)
    kernel = np.where(keep, (slope[:-1] - ratio * slope[-1]) / np.where(keep, remainder, 1), 0)
    step = np.concatenate([kernel, (first - np.sum(ratio * kernel, axis=0))[None]])
    blocks = []
    for unit in range(kernel.shape[1]):
        if corner[unit] == 0:
            continue
        row = np.append(ratio[:, unit], 1).astype(np.float64)
        block = float(corner[unit]) * np.outer(row, row)
        block[np.diag_indices(len(row) - 1)] += (remainder * keep)[:, unit].astype(np.float64)
        values = np.linalg.eigvalsh(block)
        kept = values[values > (rank**2 * values.max() if rho == 0 else 0)]
        blocks.append(kept.max() / kept.min())
    return step.astype(np.float64), max(blocks, default=1.0)
