"""Every structure on networks with shared weights, against dense matrices in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from natgrad_reference import Reference, loss_terms, metric, solve_dense

import natgrad_flax as ng
from natgrad_flax.layer_signals import matrix_of, named_updates
from natgrad_flax.shared_signals import SharedSignals

pytestmark = pytest.mark.usefixtures("x64")

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The programs run once: compiling is what costs."""

MSE, SOFTMAX = ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()
DAMPING = 0.02


class Mixed(nnx.Module):
    """Grouped convolution, normalisation, a layer used twice on tokens, a bare parameter."""

    def __init__(self, param_dtype, rngs):
        keys = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, feature_group_count=2, **keys)
        self.norm = nnx.LayerNorm(4, **keys)
        self.tokens = nnx.Linear(4, 4, **keys)
        self.gain = nnx.Param(jnp.ones(4, param_dtype))
        self.readout = nnx.Linear(4, 3, **keys)

    def __call__(self, x):
        h = self.norm(self.conv(x).reshape(len(x), 4, 4))
        h = jnp.tanh(self.tokens(jnp.tanh(self.tokens(h)) * self.gain[...]))
        return self.readout(h.mean(1))


def twin(p, patches, e):
    """``Mixed`` on one sample by hand, with perturbations e, and what its layers see."""
    u = jnp.einsum("tgk,kgm->tgm", patches, p["conv"]["kernel"].reshape(9, 2, 2))
    h = u.reshape(4, 4) + p["conv"]["bias"] + e["conv"]
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-6)
    first = h * p["norm"]["scale"] + p["norm"]["bias"]
    w, b = p["tokens"]["kernel"], p["tokens"]["bias"]
    second = jnp.tanh(first @ w + b + e["tokens"][:4]) * p["gain"]
    h = jnp.tanh(second @ w + b + e["tokens"][4:])
    last = h.mean(0)
    f = last @ p["readout"]["kernel"] + p["readout"]["bias"] + e["readout"][0]
    return f, {
        "conv": patches,
        "tokens": jnp.concatenate([first, second])[:, None],
        "readout": last[None, None],
    }


def patches_by_hand(images):
    """What a 3 x 3 kernel with stride 2 sees of a 4 x 4 image, (N, T, G, taps)."""
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))
    corners = [(i, j) for i in (0, 2) for j in (0, 2)]
    found = [padded[:, i : i + 3, j : j + 3].reshape(len(images), 9, 2) for i, j in corners]
    return np.stack(found, 1).swapaxes(2, 3)


MODELS = {
    "mixed": (Mixed, (4, 4, 2)),
    "convnet": (
        partial(ng.ConvNet, (4, 4, 2), (3, 4), 3, strides=(1, 2), bias_variance=0.1),
        (4, 4, 2),
    ),
    "residual": (partial(ng.ResidualNet, (4, 4, 2), (2, 4), 1, 3, groups=2), (4, 4, 2)),
    "transformer": (partial(ng.VisionTransformer, (4, 4, 2), 2, 4, 1, 2, 5, 3), (4, 4, 2)),
    "batch": (partial(ng.ResidualNet, (4, 4, 2), (3,), 1, 3, normalisation="batch"), (4, 4, 2)),
    "autoencoder": (partial(ng.Autoencoder, (3, 4, 2, 4, 3)), (3,)),
}


def problem(name, loss, samples=3):
    """A model in evaluation mode with NumPy's random parameters, and a batch."""
    make, shape = MODELS[name]
    rng = np.random.default_rng(len(name))
    graphdef, params, stats, rest = nnx.split(
        nnx.eval_shape(lambda: make(param_dtype=jnp.float64, rngs=nnx.Rngs(0))),
        *(nnx.Param, nnx.BatchStat, ...),
    )

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.7 if leaf.ndim > 1 else 1))

    params = jax.tree.map(draw, params)
    stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), stats)
    model = nnx.merge(graphdef, params, stats, rest)
    model.eval()
    x = rng.normal(size=(samples, *shape))
    y = np.eye(3)[rng.integers(0, 3, samples)] if loss == SOFTMAX else rng.normal(size=(samples, 3))
    return model, jnp.asarray(x), jnp.asarray(y)


def seeds_of(loss, fisher, outputs, y, key):
    """(N, S, C), the seeds of the Fisher."""
    residual, hessian = loss_terms(loss, outputs, np.asarray(y))
    if fisher == "empirical":
        return residual[:, None, :]
    if fisher == "mc":
        return np.swapaxes(loss.sample(key, jnp.asarray(outputs), 2), 1, 2)
    values, vectors = np.linalg.eigh(hessian)
    return (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]).swapaxes(1, 2)


def layer_of(path, layers):
    """The place of the layer that a parameter belongs to."""
    names = [
        {form.name if form else name for name, form in forms if form or name != "bias"}
        for forms in (
            (("kernel", a.kernel_form), ("bias", a.bias_form if a.bias_scale else None))
            for a in layers
        )
    ]
    (place,) = (
        i
        for i, a in enumerate(layers)
        if a.path == path[:-1] and path[-1] in names[i] | ({"bias"} if a.bias_scale else set())
    )
    return place


def dense_reference(jacobian, outputs, layers, loss, y, seeds):
    """Everything dense about a network, and the order of its parameters, by layer.

    The units of a layer are the last axes of its kernel, as many as its bias has; those of a
    parameter without a bias its last axis.

    Args:
      jacobian: by path of the parameter, (N, C, *shape).
      outputs: (N, C).
      layers: signals, of which only the order, the paths and the names are taken.
      loss, y: as ever.
      seeds: (N, S, C).
    """
    n = len(outputs)
    residual, _ = loss_terms(loss, outputs, np.asarray(y))
    order = sorted(jacobian, key=lambda path: layer_of(path, layers))
    columns, owner, unit, bias = [], [], [], []
    for path in order:
        leaf, layer = jacobian[path], layer_of(path, layers)
        shape, other = leaf.shape[2:], jacobian.get((*path[:-1], "bias"))
        axes = other.ndim - 2 if other is not None and len(shape) > 1 else 1
        if path[-1] == "bias":
            axes = len(shape)
        units = int(np.prod(shape[len(shape) - axes :]))
        columns.append(leaf.reshape(*leaf.shape[:2], -1))
        size = columns[-1].shape[2]
        owner.append(np.full(size, layer))
        unit.append(1000 * layer + np.tile(np.arange(units), size // units))
        bias.append(np.full(size, path[-1] == "bias" and layers[layer].bias_scale is not None))
    flat = np.concatenate(columns, axis=2)
    weighted = np.einsum("nsc,ncp->nsp", seeds, flat)
    reference = Reference(
        flat.reshape(-1, flat.shape[2]),
        np.einsum("ncp,nc->p", flat, residual) / n,
        np.einsum("nsp,nsq->pq", weighted, weighted) / n,
        *([], []),
        *map(np.concatenate, (owner, unit, bias)),
        n,
    )
    return reference, order


def coupling(depth, seed=0):
    matrix = np.random.default_rng(seed).normal(size=(depth, depth))
    return matrix @ matrix.T / depth + np.eye(depth)


def structures(depth, space):
    return {
        "exact": ng.Exact(space),
        "layer-wise": ng.LayerWise(coupling(depth), space),
        "blocks": ng.BlockDiagonal(space),
        "tri-diagonal": ng.BlockTriDiagonal("sample"),
        "units": ng.UnitWise(space),
        "diagonal": ng.Diagonal(),
        "quasi-diagonal": ng.QuasiDiagonal(),
    }


CASES = [
    ("mixed", SOFTMAX, "exact", "sample"),
    ("convnet", MSE, "mc", "parameter"),
    ("residual", SOFTMAX, "exact", "auto"),
    ("transformer", SOFTMAX, "empirical", "sample"),
    ("autoencoder", MSE, "exact", "sample"),
]


def flatten(named, paths):
    """Updates by path of the layer and name as one vector."""
    return np.concatenate([np.ravel(named[path[:-1]][path[-1]]) for path in paths])


@pytest.mark.parametrize(("name", "loss", "fisher", "space"), CASES)
def test_against_dense(name, loss, fisher, space):
    model, x, y = problem(name, loss)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    key = jax.random.key(2)
    made = structures(len(ng.describe(model, x).layers), space)
    cases = {case: (structure, DAMPING) for case, structure in made.items()}
    # a singular value of 1e-7 in the residual network leaves its rank in doubt
    if fisher == "exact" and name != "residual":
        cases |= {f"undamped {case}": (made[case], 0.0) for case in ("exact", "blocks")}

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, x, y):
        model = nnx.merge(graphdef, params, rest)
        settings = {"loss": loss, "fisher": fisher, "key": key}
        signals, residual = ng.fisher_signals(model, x, y, num_samples=2, **settings)
        found = {
            case: named_updates(signals.layers, structure.solve(signals, residual, rho))
            for case, (structure, rho) in cases.items()
        }
        public = ng.natural_gradient(
            model, x, y, structure=ng.Diagonal(), damping=DAMPING, mc_samples=2, **settings
        )
        jacobian = jax.jacobian(lambda p: nnx.merge(graphdef, p, rest)(x))(params)
        return signals, jacobian, found, public

    signals, jacobian, found, public = run(params, x, y)
    outputs = np.asarray(signals.outputs)
    jacobian = {tuple(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(jacobian)}
    seeds = seeds_of(loss, fisher, outputs, y, key)
    reference, order = dense_reference(jacobian, outputs, signals.layers, loss, y, seeds)
    public = {tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(public)}
    for case, (structure, rho) in cases.items():
        expected, condition = solve_dense(structure, reference, rho)
        assert condition < 1e8
        scale = np.abs(expected).max()
        got = flatten(found[case], order)
        np.testing.assert_allclose(got / scale, expected / scale, atol=1e-8, err_msg=case)
        if case == "diagonal":
            got = np.concatenate([np.ravel(public[path]) for path in order])
            np.testing.assert_allclose(got / scale, expected / scale, atol=1e-8)


def kronecker(reference, order, seen, derivatives, sharing, last_layer, damping):
    """G of K-FAC on ``Mixed``, from what its layers see and the derivatives of seeded outputs.

    Args:
      reference, order: of the network.
      seen: inputs by layer, (N, T, G, K).
      derivatives: by layer, (N, S, T, G, M/G).
      sharing, last_layer: as in ``ng.KFAC``.
      damping: added to both factors.
    """
    n = reference.num_samples
    starts = np.cumsum([0] + [int(np.prod(shape)) for _, shape in order])
    index = {
        path: np.arange(a, b).reshape(shape)
        for (path, shape), a, b in zip(order, starts[:-1], starts[1:], strict=True)
    }
    # without factors: a block a unit
    matrix = (reference.unit[:, None] == reference.unit) * reference.fisher
    matrix = matrix + damping * np.eye(len(matrix))
    for name, a in seen.items():
        d, groups = derivatives[name], a.shape[2]
        a = np.concatenate([a, np.ones((*a.shape[:3], 1))], axis=3)
        over_a = n * a.shape[1]
        if sharing == "reduce":
            a, d, over_a = a.mean(1, keepdims=True), d.sum(2, keepdims=True), n
        over_b = n**2 if name == "readout" and last_layer == "scaled" else n
        rows = [index[name, "kernel"].reshape(a.shape[3] - 1, groups, -1)]
        rows = np.concatenate([*rows, index[name, "bias"].reshape(1, groups, -1)])
        for g in range(groups):
            left = np.einsum("ntj,ntk->jk", a[:, :, g], a[:, :, g]) / over_a
            right = np.einsum("nsti,nstm->im", d[:, :, :, g], d[:, :, :, g]) / over_b
            left, right = left + damping * np.eye(len(left)), right + damping * np.eye(len(right))
            places = rows[:, g].reshape(-1)
            matrix[places] = 0
            matrix[np.ix_(places, places)] = np.kron(left, right)
    return matrix


def test_kfac_and_coefficients_of_a_mixed_network():
    """K-FAC in all its forms; and J' G^{-1} J^T / N of every structure."""
    model, x, y = problem("mixed", SOFTMAX)
    other = x[:2] + 0.3
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    made = structures(5, "sample") | {"kfac": ng.KFAC()}
    variants = {
        (sharing, last, space): ng.KFAC(sharing=sharing, last_layer=last, space=space)
        for sharing, last, space in (
            ("expand", "scaled", "sample"),
            ("expand", "literal", "parameter"),
            ("reduce", "scaled", "sample"),
            ("reduce", "literal", "auto"),
        )
    }

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, x, y, patches):
        model = nnx.merge(graphdef, params, rest)
        signals, residual = ng.fisher_signals(model, x, y, loss=SOFTMAX)
        there = ng.jacobian_signals(model, other)
        found = {
            key: named_updates(signals.layers, kfac.solve(signals, residual, DAMPING))
            for key, kfac in variants.items()
        }
        coefficients = {
            case: structure.coefficient(there, signals, DAMPING) for case, structure in made.items()
        }

        def jacobian(x):
            return jax.jacobian(lambda p: nnx.merge(graphdef, p, rest)(x))(params)

        pure = nnx.as_pure(params)
        zeros = {"conv": (4, 4), "tokens": (8, 4), "readout": (1, 3)}
        zeros = {name: jnp.zeros(shape) for name, shape in zeros.items()}
        outputs, seen = jax.vmap(lambda a: twin(pure, a, zeros))(patches)
        derivatives = jax.vmap(jax.jacobian(lambda e, a: twin(pure, a, e)[0]), (None, 0))(
            zeros, patches
        )
        twins = outputs, seen, derivatives
        return signals, found, coefficients, jacobian(x), jacobian(other), twins

    patches = patches_by_hand(np.asarray(x))
    signals, found, coefficients, *jacobians, twins = run(params, x, y, patches)
    outputs, seen, derivatives = jax.tree.map(np.asarray, twins)
    np.testing.assert_allclose(outputs, signals.outputs, rtol=1e-10)
    here, there = (
        {tuple(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(jacobian)}
        for jacobian in jacobians
    )
    # the seeds that the library takes: coefficients depend on the basis
    seeds = np.swapaxes(SOFTMAX.factor(signals.outputs), 1, 2)
    reference, order = dense_reference(here, outputs, signals.layers, SOFTMAX, y, seeds)
    shapes = [(path, here[path].shape[2:]) for path in order]
    groups = {"conv": 2, "tokens": 1, "readout": 1}
    seeded = {
        name: np.einsum("nsc,nctm->nstm", seeds, d).reshape(
            *seeds.shape[:2], len(d[0, 0]), groups[name], -1
        )
        for name, d in derivatives.items()
    }
    metrics = {
        case: metric(structure, reference, DAMPING)
        for case, structure in made.items()
        if case != "kfac"
    }
    for key in variants:
        dense = kronecker(reference, shapes, seen, seeded, *key[:2], DAMPING)
        expected = np.linalg.solve(dense, reference.gradient)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(flatten(found[key], order) / scale, expected / scale, atol=1e-8)
        if key == ("expand", "scaled", "sample"):
            metrics["kfac"] = dense
    left = np.concatenate([there[path].reshape(2 * 3, -1) for path in order], axis=1)
    right = np.einsum("nsc,ncp->nsp", seeds, reference.jacobian.reshape(len(x), 3, -1))
    right = right.reshape(-1, left.shape[1])
    for case, found in coefficients.items():
        expected = left @ np.linalg.solve(metrics[case], right.T) / len(x)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-8, err_msg=case)


def test_pairs_of_positions_and_jacobians_give_one_gram_matrix(monkeypatch):
    rng = np.random.default_rng(0)

    def shared(n, t):
        a, d = rng.normal(size=(n, t, 2, 3)), rng.normal(size=(n, 2, t, 2, 4))
        return SharedSignals(jnp.asarray(a), jnp.asarray(d), 0.7, ("layer",))

    here, there = shared(3, 4), shared(2, 5)
    grams = {}
    for pairs in (True, False):
        monkeypatch.setattr(SharedSignals, "pairs_are_cheaper", lambda *args, pairs=pairs: pairs)
        grams[pairs] = here.gram(), here.gram(there)
    dense, cross = np.asarray(here.to_dense()), np.asarray(there.to_dense())
    for own, mixed in grams.values():
        np.testing.assert_allclose(own, dense @ dense.T, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(mixed, dense @ cross.T, rtol=1e-11, atol=1e-11)
    monkeypatch.undo()
    assert shared(2, 1).pairs_are_cheaper()
    assert not shared(3, 40).pairs_are_cheaper()


@pytest.mark.parametrize("groups", [1, 2])
def test_products_over_shared_signals(groups):
    """Against the explicit Jacobian: every product, and the explicit form of the same layer."""
    rng = np.random.default_rng(groups)
    a, d = rng.normal(size=(3, 4, groups, 2)), rng.normal(size=(3, 2, 4, groups, 3))
    layer = SharedSignals(jnp.asarray(a), jnp.asarray(d), 0.7, ("layer",))
    jacobian = np.einsum("ntgk,nstgm->nskgm", a, d).reshape(3, 2, 2, -1)
    jacobian = np.concatenate([jacobian, 0.7 * d.sum(2).reshape(3, 2, 1, -1)], axis=2)
    flat = jacobian.reshape(6, -1)
    v, step = rng.normal(size=(3, 2)), rng.normal(size=flat.shape[1])
    for signals in (layer, layer.explicit()):
        assert (signals.num_params, signals.num_seeds) == (flat.shape[1], 2)
        update = signals.unravel(jnp.asarray(step))
        direction = signals.combine(jnp.asarray(v))
        pulled = matrix_of(signals.pull_back(direction)).reshape(-1)
        pairs = {
            "dense": (signals.to_dense(), flat),
            "norms": (signals.gram_norms(), np.sum(flat**2, axis=1).reshape(3, 2)),
            "jvp": (signals.jvp(update), (flat @ step).reshape(3, 2)),
            "vjp": (pulled, flat.T @ v.reshape(-1)),
            "dual": (
                jnp.sum(signals.push_forward(update) * direction),
                step @ flat.T @ v.reshape(-1),
            ),
            "gram times": (
                signals.gram_times(direction).reshape(-1),
                flat @ flat.T @ v.reshape(-1),
            ),
            "squares": (matrix_of(signals.squares()).reshape(-1), np.sum(flat**2, axis=0)),
        }
        factor = rng.normal(size=(3, 2, 1))
        mixed = np.einsum("nsr,nsp->nrp", factor, flat.reshape(3, 2, -1))
        pairs["reseed"] = (signals.reseed(jnp.asarray(factor)).to_dense(), mixed[:, 0])
        pairs["seeds"] = (signals.take_seeds(1, 2).to_dense(), flat[1::2])
        for name, (got, expected) in pairs.items():
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11, err_msg=name)
