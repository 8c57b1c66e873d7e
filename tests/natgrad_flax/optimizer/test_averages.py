"""Mini-batches: moving averages, projected momentum, a Fisher batch of its own, micro-batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_signals import jacobian_of, rows_of

import natgrad_flax as ng
from natgrad_flax import checkpoint
from natgrad_flax.signals.shared import ExplicitSignals

MSE, CROSS_ENTROPY = ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()
RHO = 0.05
MODEL = ng.MLP((3, 4, 2), rngs=nnx.Rngs(0))
X, Y = jnp.ones((4, 3)), jnp.ones((4, 2))


class Mixed(nnx.Module):
    """A convolution, a normalisation, a layer that is called twice, and a readout."""

    def __init__(self):
        kind = {"param_dtype": jnp.float64, "dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(1, 2, (2, 2), strides=2, padding="VALID", **kind)
        self.norm = nnx.LayerNorm(2, **kind)
        self.tied = nnx.Linear(8, 8, use_bias=False, **kind)
        self.out = nnx.Linear(8, 3, **kind)

    def __call__(self, x):
        x = self.norm(jnp.tanh(self.conv(x))).reshape(x.shape[0], -1)
        return self.out(self.tied(jnp.tanh(self.tied(x))))


def batches(count, n, loss=MSE):
    """x (count, N, 4, 4, 1) and y (count, N, 3)."""
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(count, n, 4, 4, 1)), rng.normal(size=(count, n, 3))
    return jnp.asarray(x), jnp.asarray(y if loss == MSE else np.eye(3)[y.argmax(axis=2)])


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def scanned(tx, model, x, y):
    """Updates of the batches one after the other, at fixed parameters, and the last state."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, state, x, y):
        def step(state, batch):
            inputs, targets = batch
            module = nnx.merge(graphdef, params)
            update, state = tx.update(params, state, params, module=module, x=inputs, y=targets)
            return state, update

        return jax.lax.scan(step, state, (x, y))

    state, updates = run(params, tx.init(params), x, y)
    return [jax.tree.map(lambda leaf, t=t: leaf[t], updates) for t in range(len(x))], state


@partial(jax.jit, static_argnames=("graphdef", "loss", "fisher"))
def seeded(params, x, y, key, graphdef, loss, fisher):
    model = nnx.merge(graphdef, params)
    return ng.fisher_signals(model, x, y, loss=loss, fisher=fisher, key=key)


def dense_batches(model, x, y, loss, fisher="exact", keys=None):
    """Of every batch the layers' signals, and the residual's coefficients (N S,), if any."""
    graphdef, params = nnx.split(model)
    for t in range(len(x)):
        key = None if keys is None else keys[t]
        signals, residual = seeded(params, x[t], y[t], key, graphdef, loss, fisher)
        yield signals, None if keys is not None else np.asarray(residual.coefficients).ravel()


def in_parameters(model, signals, parts):
    """One matrix (fan_in, M) a layer as an update in the order of ``flat``."""
    named = {}
    for layer, part in zip(signals.layers, parts, strict=True):
        for name, leaf in layer.parameters(layer.update(jnp.asarray(part))).items():
            named[(*layer.path, name)] = leaf
    tree = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return np.concatenate([np.ravel(named[tuple(path)]) for path, _ in tree])


def jacobians(model, signals):
    """The Jacobian (N S, P) with columns in the order of ``flat``, and each column's layer."""
    sizes = [layer.num_params for layer in signals.layers]
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    shapes = [(layer.fan_in, layer.num_units) for layer in signals.layers]
    place = in_parameters(
        model, signals, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    )
    rows = np.concatenate([jacobian_of(layer) for layer in signals.layers], axis=1)
    return rows[:, place], np.repeat(np.arange(len(sizes)), sizes)[place]


def mean_over(history, decay):
    """The average with bias correction, s_t / (1 - decay^t), s_t from zero."""
    s = 0.0
    for value in history:
        s = decay * s + (1 - decay) * value
    return s / (1 - decay ** len(history))


class Oracle:
    """K-FAC and EKFAC with averages, in NumPy, for one layer."""

    def __init__(self, kind, decay, last):
        self.kind, self.decay, self.last = kind, decay, last
        self.left, self.right, self.squares = [], [], []

    def renew(self, layer, invert):
        n, jacobian = layer.num_samples, jacobian_of(layer)
        if isinstance(layer, ExplicitSignals):
            units = jacobian.reshape(-1, layer.fan_in, layer.num_units)
            self.left.append(np.einsum("rkm,rjm->mkj", units, units) / n)
            if invert or self.kind == "EKFAC":
                blocks = mean_over(self.left, self.decay)
                self.inverse = np.linalg.inv(blocks + RHO * np.eye(layer.fan_in))
            return
        a, d = rows_of(layer)
        self.left.append(np.einsum("ntgk,ntgj->kj", a, a) / (n * a.shape[1]))
        self.right.append(np.einsum("nstgm,nstgi->mi", d, d) / n)
        factors = mean_over(self.left, self.decay), mean_over(self.right, self.decay)
        if self.kind == "KFAC" and invert:
            over = n if self.last else 1
            self.inverse = [
                np.linalg.inv(factor + RHO * np.eye(len(factor)))
                for factor in (factors[0], factors[1] / over)
            ]
        if self.kind == "EKFAC":
            if invert:
                self.basis, self.squares = [np.linalg.eigh(f)[1] for f in factors], []
            turned = self.basis[0].T @ jacobian.reshape(-1, *self.shape(layer)) @ self.basis[1]
            self.squares.append(np.sum(turned**2, axis=0) / n)

    @staticmethod
    def shape(layer):
        return layer.fan_in, layer.num_units

    def apply(self, layer, slope):
        matrix = slope.reshape(self.shape(layer))
        if isinstance(layer, ExplicitSignals):
            return np.einsum("mkj,jm->km", self.inverse, matrix)
        if self.kind == "KFAC":
            return self.inverse[0] @ matrix @ self.inverse[1]
        u, v = self.basis
        return u @ ((u.T @ matrix @ v) / (mean_over(self.squares, self.decay) + RHO)) @ v.T


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("structure", "microbatches"), [(ng.KFAC(), 1), (ng.EKFAC(), 2)])
def test_averages_and_intervals_in_a_scan(structure, microbatches):
    """Statistics every 2 steps, inverses and bases every 4: against NumPy, step by step."""
    model, (x, y) = Mixed(), batches(6, 12)
    average = ng.MovingAverage(0.8, every=2, inverse_every=4)
    tx = ng.natural_gradient_descent(
        1.0,
        structure=structure,
        loss=MSE,
        damping=RHO,
        average=average,
        example=(model, jax.ShapeDtypeStruct(x.shape[1:], x.dtype)),
        microbatches=microbatches,
    )
    updates, state = scanned(tx, model, x, y)
    seen = list(dense_batches(model, x, y, MSE))
    affine = [not isinstance(a, ExplicitSignals) for a in seen[0][0].layers]
    last = max(i for i, is_affine in enumerate(affine) if is_affine)
    oracles = [Oracle(structure.name, 0.8, index == last) for index in range(len(affine))]
    for t, (signals, residual) in enumerate(seen):
        parts = []
        for layer, oracle in zip(signals.layers, oracles, strict=True):
            if t % 2 == 0:
                oracle.renew(layer, invert=t % 4 == 0)
            parts.append(oracle.apply(layer, jacobian_of(layer).T @ residual / len(x[t])))
        wanted = in_parameters(model, signals, parts)
        np.testing.assert_allclose(
            flat(updates[t]), -wanted, atol=1e-8 * np.abs(wanted).max(), err_msg=f"step {t}"
        )
    assert state.kept.renewals == 3
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("damping", [0.0, RHO, ng.RelativeDamping(0.1)])
def test_without_a_past_the_rows_of_a_wide_layer_are_kept(damping, x64):
    model = ng.MLP((9, 7, 2), bias_variance=0.5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(3, 4, 9))), jnp.asarray(rng.normal(size=(3, 4, 2)))
    settings = {"structure": ng.KFAC(split="pi"), "loss": MSE, "damping": damping}
    average = ng.MovingAverage(decay=0.0)
    tx = ng.natural_gradient_descent(1.0, average=average, example=(model, x[0]), **settings)
    updates, state = scanned(tx, model, x, y)
    for update, inputs, targets in zip(updates, x, y, strict=True):
        expected = ng.natural_gradient(model, inputs, targets, **settings)
        np.testing.assert_allclose(flat(update), -flat(expected), rtol=1e-9, atol=1e-10)
    kept = [entry["rows"].shape for entry in state.kept.moments.factors]
    assert kept == [(4, 10), (4, 8)]


def test_an_eigenbasis_is_kept_once():
    model, x = ng.MLP((9, 7, 2), rngs=nnx.Rngs(0)), jnp.ones((3, 9))
    tx = ng.natural_gradient_descent(
        1.0,
        structure=ng.EKFAC(),
        loss=MSE,
        damping=1.0,
        average=ng.MovingAverage(),
        example=(model, x),
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(tx.init(nnx.state(model)))]
    # the factor of the first layer's inputs, and its eigenvectors
    assert shapes.count((1, 9, 9)) == 2


def test_bias_correction_weighs_the_past_by_powers_of_the_decay():
    average, mean = ng.MovingAverage(0.75), jnp.zeros(())
    values = [3.0, -1.0, 2.0]
    for count, value in enumerate(values, 1):
        mean = average.mix(mean, jnp.asarray(value), jnp.asarray(count))
    weights = 0.75 ** np.arange(2, -1, -1)
    np.testing.assert_allclose(mean, weights @ values / weights.sum(), rtol=1e-6)


def test_steps_without_a_renewal_do_no_work_of_the_fisher():
    """All of it stands in one conditional, of which the other branch factorises nothing."""
    x, y = X[None], Y[None]
    tx = ng.natural_gradient_descent(
        1.0,
        structure=ng.KFAC(),
        loss=MSE,
        damping=RHO,
        average=ng.MovingAverage(every=3),
        example=(MODEL, x[0]),
    )
    graphdef, params = nnx.split(MODEL)

    def step(params, state):
        module = nnx.merge(graphdef, params)
        return tx.update(params, state, params, module=module, x=x[0], y=y[0])

    jaxpr = jax.make_jaxpr(step)(params, tx.init(params)).jaxpr
    (switch,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    held, renewed = (str(branch) for branch in switch.params["branches"])
    assert "cholesky" in renewed
    assert "cholesky" not in held
    rest = [str(eqn) for eqn in jaxpr.eqns if eqn is not switch]
    assert not any("cholesky" in text for text in rest)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("structure", "loss", "fisher"),
    [
        (ng.Exact(), MSE, "exact"),
        (ng.BlockDiagonal(), MSE, "exact"),
        (ng.Exact(), CROSS_ENTROPY, "mc"),
    ],
    ids=["exact", "blocks", "mc"],
)
def test_momentum_is_the_nearest_step_that_fits_the_batch(structure, loss, fisher):
    """phi = argmin (1/N) |J phi - w|^2 + rho |phi - mu before|^2, solved in NumPy."""
    model, (x, y), mu = Mixed(), batches(3, 12, loss), 0.9
    tx = ng.natural_gradient_descent(
        1.0, structure=structure, loss=loss, damping=RHO, fisher=fisher, momentum=mu
    )
    updates, state = scanned(tx, model, x, y)
    np.testing.assert_allclose(flat(state.kept), -flat(updates[-1]), rtol=1e-12)
    key, keys = jax.random.key(0), []
    for _ in x:
        key, draw = jax.random.split(key)
        keys.append(draw)
    batch = dense_batches(model, x, y, loss)
    sampled = dense_batches(model, x, y, loss, "mc", keys)
    before = np.zeros(len(flat(updates[0])))
    for update, (signals, residual) in zip(updates, batch, strict=True):
        jacobian, owner = jacobians(model, signals)
        slope = jacobian.T @ residual / 12
        if fisher == "mc":
            jacobian, _ = jacobians(model, next(sampled)[0])
        found = -flat(update)
        blocks = [np.ones_like(owner, bool)]
        if structure.name == "BlockDiagonal":
            blocks = [owner == index for index in range(len(signals.layers))]
        for block in blocks:
            part = jacobian[:, block]
            metric = part.T @ part / 12 + RHO * np.eye(block.sum())
            wanted = np.linalg.solve(metric, slope[block] + RHO * mu * before[block])
            np.testing.assert_allclose(found[block], wanted, atol=1e-8 * np.abs(wanted).max())
        before = found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_spring_corrects_its_start_and_bounds_its_steps(max_norm, tmp_path):
    """Four steps of a plain NumPy loop, in the middle of which the run is saved and restored."""
    rate, mu = 0.3, 0.9
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 1))
    w, phi, wanted, bounded = np.zeros(5), np.zeros(5), [], []
    for k, (x, y) in enumerate(zip(xs, ys[..., 0], strict=True), 1):
        phi = mu * phi + np.linalg.solve(
            x.T @ x / 3 + RHO * np.eye(5), x.T @ (x @ (w - mu * phi) - y) / 3
        )
        u = phi / np.sqrt(1 - mu ** (2 * k))
        eta = rate if max_norm is None else min(rate, max_norm / np.linalg.norm(u))
        bounded.append(eta < rate)
        w = w - eta * u
        wanted.append(w)
    assert any(bounded) == (max_norm is not None)

    momentum = ng.SPRING(mu, max_norm=max_norm)
    settings = {"structure": ng.Exact(), "loss": MSE, "damping": RHO, "momentum": momentum}
    zeros = nnx.initializers.zeros
    model = nnx.Linear(
        5, 1, use_bias=False, kernel_init=zeros, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(model, ng.natural_gradient_descent(rate, **settings), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        optimizer.update(model, nnx.state(model, nnx.Param), module=model, x=x, y=y)

    for k in range(4):
        step(model, optimizer, xs[k], ys[k])
        np.testing.assert_allclose(model.kernel[:, 0], wanted[k], atol=1e-12)
        if k == 1:
            checkpoint.save(tmp_path, model, optimizer, structure=ng.Exact(), step=2)
            step(model, optimizer, xs[0], ys[0])
            checkpoint.restore(tmp_path, model, optimizer, structure=ng.Exact())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_fisher_on_a_batch_of_its_own(fisher):
    """The gradient of 6 samples under the Fisher of 12 others, in two parts each."""
    model, (x, y) = Mixed(), batches(1, 6)
    (more,), (targets,) = batches(1, 12)
    found = ng.natural_gradient(
        model,
        x[0],
        y[0],
        structure=ng.Exact(),
        loss=MSE,
        damping=RHO,
        fisher=fisher,
        fisher_x=more,
        fisher_y=targets if fisher == "empirical" else None,
        microbatches=2,
    )
    ((here, residual),) = dense_batches(model, x, y, MSE)
    ((there, other),) = dense_batches(model, more[None], targets[None], MSE)
    jacobian, _ = jacobians(model, there)
    if fisher == "empirical":
        jacobian = np.einsum("ns,nsp->np", other.reshape(12, 3), jacobian.reshape(12, 3, -1))
    slope = jacobians(model, here)[0].T @ residual / 6
    metric = jacobian.T @ jacobian / 12 + RHO * np.eye(len(slope))
    wanted = np.linalg.solve(metric, slope)
    np.testing.assert_allclose(flat(found), wanted, atol=1e-8 * np.abs(wanted).max())


@pytest.mark.usefixtures("x64")
def test_targets_drawn_in_parts_are_those_of_the_batch():
    model, (x, y) = Mixed(), batches(1, 6, CROSS_ENTROPY)
    graphdef, params = nnx.split(model)

    @jax.jit
    def signals(params):
        settings = {"loss": CROSS_ENTROPY, "fisher": "mc", "key": jax.random.key(3)}
        module = nnx.merge(graphdef, params)
        return [
            ng.fisher_signals(module, x[0], y[0], num_samples=2, microbatches=m, **settings)
            for m in (1, 3)
        ]

    whole, parts = signals(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_an_optimizer_of_nnx_keeps_averages_and_momentum():
    """Two steps through nnx.Optimizer, which hands over a model without variables."""
    x, y = jnp.stack([X, 2 * X]), jnp.stack([Y, -Y])
    for settings in (
        {"structure": ng.KFAC(), "average": ng.MovingAverage(0.5)},
        {"structure": ng.Exact(), "momentum": 0.9},
    ):
        model = nnx.clone(MODEL)
        if "average" in settings:
            settings["example"] = (model, x[0])
        tx = ng.natural_gradient_descent(0.1, loss=MSE, damping=RHO, **settings)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        start = flat(nnx.state(model, nnx.Param))

        @nnx.jit
        def step(model, optimizer, x, y):
            grads = nnx.grad(lambda m: MSE(m(x), y))(model)
            return optimizer.update(model, grads, module=model, x=x, y=y)

        moved = sum(flat(step(model, optimizer, x[t], y[t])) for t in range(2))
        np.testing.assert_allclose(
            flat(nnx.state(model, nnx.Param)), start + moved, rtol=1e-4, atol=1e-6
        )
        assert np.abs(moved).max() > 1e-3
        assert optimizer.opt_state.steps[...] == 2
