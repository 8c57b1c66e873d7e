"""A peer for the tests: every quantity from its definition, in NumPy alone.

Derivatives are complex steps through a forward pass that is written down here once more.
"""

import sys
import time

import numpy as np

TINY = 1e-150


class Side:
    """The definitions on one problem; ``step`` does what the name of the activation says."""

    def __init__(self, problem):
        self.problem = problem
        self.params = [
            [part for part in (layer.kernel, layer.bias) if part is not None]
            for layer in problem.layers
        ]

    def versions(self):
        return {"numpy": np.__version__}

    def step(self):
        print("a library may print what it likes")
        time.sleep(0.01)

    def quantity(self, name):
        if name == "end":
            sys.exit("it ended")
        if name == "sleep":
            time.sleep(60)
        if name == "gradient":
            return self.gradient()
        kind, _, which = name.rpartition("/")
        structure = kind.removeprefix("step/")
        matrix = getattr(self, structure.replace("-", "_"))(which)
        if structure == kind:
            return matrix
        if structure.startswith("kfac"):
            return self.damped_kfac(which, structure.endswith("reduce"))
        matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
        damped = matrix + self.problem.damping * np.eye(len(matrix))
        return np.linalg.solve(damped, self.gradient())

    def fisher(self, which):
        jacobian, n = self.jacobian(), self.problem.num_samples
        return np.einsum("ncp,ncd,ndq->pq", jacobian, self.outer(which), jacobian) / n

    def block_diagonal(self, which):
        ends = np.cumsum([layer.num_params for layer in self.problem.layers])
        number = np.searchsorted(ends, np.arange(ends[-1]), side="right")
        return np.where(number[:, None] == number, self.fisher(which), 0)

    def diagonal(self, which):
        return np.diag(self.fisher(which))

    def quasi_diagonal(self, which):
        unit, is_bias = [], []
        for index, layer in enumerate(self.problem.layers):
            units = [100 * index + i for i in range(layer.num_units)]
            unit += units * (layer.fan_in + 1)
            is_bias += [False] * layer.kernel.size + [True] * layer.num_units
        unit, is_bias = np.array(unit), np.array(is_bias)
        same, shared = unit[:, None] == unit, is_bias[:, None] | is_bias
        return np.where(same & shared | np.eye(len(unit), dtype=bool), self.fisher(which), 0)

    def kfac(self, which):
        return block([np.kron(a, b) for a, b in self.factors(which)])

    def kfac_reduce(self, which):
        return block([np.kron(a, b) for a, b in self.factors(which, True)])

    def ekfac(self, which):
        """Second moments of per-sample Jacobians in the eigenbasis of the factors."""
        start, found, jacobian, outer = 0, [], self.jacobian(), self.outer(which)
        for layer, (a, b) in zip(self.problem.layers, self.factors(which), strict=True):
            vectors = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(b)[1])
            turned = jacobian[:, :, start : start + layer.num_params] @ vectors
            squares = np.einsum("ncp,ncd,ndp->p", turned, outer, turned) / len(turned)
            found.append((vectors * squares) @ vectors.T)
            start += layer.num_params
        return block(found)

    def damped_kfac(self, which, reduce):
        rho, found = self.problem.damping, []
        for a, b in self.factors(which, reduce):
            pi = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
            left = a + pi * np.sqrt(rho) * np.eye(len(a))
            right = b + np.sqrt(rho) / pi * np.eye(len(b))
            found.append(np.kron(left, right))
        return np.linalg.solve(block(found), self.gradient())

    def factors(self, which, reduce=False):
        """A, the mean over samples and positions; B, the mean over samples, summed over these.

        To reduce is to take the mean input and the sum of derivatives of a sample in their place.
        """
        _, inputs = self.forward(self.params)
        found = []
        for index, h in enumerate(inputs):
            h = h.reshape(len(h), -1, h.shape[-1]).real
            rows = h.mean(axis=1) if reduce else h.reshape(-1, h.shape[-1])
            if len(self.params[index]) > 1:
                rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
            slopes = self.slopes(index)
            slopes = slopes.sum(axis=2, keepdims=True) if reduce else slopes
            b = np.einsum("nctm,ncd,ndtk->mk", slopes, self.outer(which), slopes)
            found.append((rows.T @ rows / len(rows), b / self.problem.num_samples))
        return found

    def slopes(self, index):
        """Derivatives of outputs by the pre-activations of a layer, (N, C, T, M)."""
        _, inputs = self.forward(self.params)
        n, shape = self.problem.num_samples, inputs[index].shape
        positions, units = int(np.prod(shape[1:-1])), self.problem.layers[index].num_units
        found = np.zeros((n, self.problem.num_outputs, positions, units))
        for t in range(positions):
            for m in range(units):
                push = np.zeros((positions, units), complex)
                push[t, m] = 1j * TINY
                outputs, _ = self.forward(self.params, {index: push})
                found[:, :, t, m] = outputs.imag / TINY
        return found

    def outer(self, which):
        """H of the exact Fisher, or r r^T of targets, (N, C, C)."""
        outputs = self.forward(self.params)[0].real
        targets = self.problem.drawn if which == "mc" else self.problem.y
        residual, means = outputs - targets, np.eye(outputs.shape[1])
        if self.problem.loss == "cross-entropy":
            p = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
            residual, means = p - targets, p[:, :, None] * (means - p[:, None, :])
        if which == "exact":
            return np.broadcast_to(means, (len(outputs), *means.shape[-2:]))
        return residual[:, :, None] * residual[:, None, :]

    def gradient(self):
        outputs = self.forward(self.params)[0].real
        if self.problem.loss == "cross-entropy":
            outputs = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        residual = outputs - self.problem.y
        return np.einsum("ncp,nc->p", self.jacobian(), residual) / len(residual)

    def jacobian(self):
        """(N, C, P)."""
        columns = []
        for layer, parts in enumerate(self.params):
            for which, part in enumerate(parts):
                for index in np.ndindex(part.shape):
                    moved = [list(other) for other in self.params]
                    moved[layer][which] = part.astype(complex)
                    moved[layer][which][index] += 1j * TINY
                    columns.append(self.forward(moved)[0].imag / TINY)
        return np.stack(columns, axis=-1)

    def forward(self, params, pushes=None):
        """Outputs, and of each layer its inputs: patches where it is a convolution."""
        problem, seen = self.problem, []
        h = problem.x
        for index, (layer, parts) in enumerate(zip(problem.layers, params, strict=True)):
            if index:
                h = np.tanh(h) if problem.activation == "tanh" else h * (h.real > 0)
            if not layer.is_convolution and h.ndim > 2:
                flat = problem.pooling == "flatten"
                h = h.reshape(len(h), -1) if flat else h.mean(axis=(1, 2))
            h = layer.scale * h
            h = patches(h, layer) if layer.is_convolution else h
            seen.append(h)
            h = h @ parts[0].reshape(-1, layer.num_units)
            h = h + parts[1] if len(parts) > 1 else h
            if pushes and index in pushes:
                h = h + pushes[index].reshape(h.shape[1:])
        return h, seen


def patches(images, layer):
    """(N, height, width, K): what the kernel sees at each of its positions."""
    padded = np.pad(images, ((0, 0), *layer.pads, (0, 0)))
    high, wide = layer.kernel.shape[:2]
    down, right = layer.strides
    rows = range(0, padded.shape[1] - high + 1, down)
    columns = range(0, padded.shape[2] - wide + 1, right)
    return np.stack(
        [
            np.stack(
                [padded[:, r : r + high, c : c + wide].reshape(len(images), -1) for c in columns],
                axis=1,
            )
            for r in rows
        ],
        axis=1,
    )


def block(matrices):
    size = sum(map(len, matrices))
    found, start = np.zeros((size, size)), 0
    for matrix in matrices:
        end = start + len(matrix)
        found[start:end, start:end], start = matrix, end
    return found
