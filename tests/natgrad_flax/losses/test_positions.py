"""Outputs with positions, class numbers and weights, against dense matrices and the same without.

Equal to rounding: positions without coupling are samples, and what has weight 0 is not there.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import natgrad_flax as ng
from natgrad_flax import devices

pytestmark = pytest.mark.usefixtures("x64")
N, T, V = 4, 5, 3
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 7, (N, T))
LABELS = RNG.integers(0, V, (N, T))
MASK = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]], bool)
WEIGHTS = RNG.uniform(0.2, 2, (N, T)) * np.asarray(MASK)
SOFTMAX = ng.SoftmaxCrossEntropy()
RHO = 0.1


class Tokens(nnx.Module):
    """Two layers at every token, behind attention to the tokens before where it is causal."""

    def __init__(self, outputs=V, *, causal=False):
        keys = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.causal = causal
        self.embed = nnx.Embed(7, 4, **keys)
        self.hidden = nnx.Linear(4, 5, **keys)
        self.readout = nnx.Linear(5, outputs, **keys)

    def __call__(self, x):
        h = self.embed(x)
        if self.causal:
            scores = h @ h.mT + jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2)), 0, -jnp.inf)
            h = h + jax.nn.softmax(scores) @ h
        return self.readout(jnp.tanh(self.hidden(h)))


class Rows(Tokens):
    """Tokens without an axis of positions: (N,) to (N, V)."""

    def __call__(self, x):
        return super().__call__(x[:, None])[:, 0]


STRUCTURES = [
    ng.Exact(),
    ng.BlockDiagonal(),
    ng.KFAC(last_layer="literal"),
    ng.KFAC(last_layer="literal", split="pi", space="sample"),
    ng.EKFAC(),
    ng.UnitWise(),
    ng.Diagonal(),
    ng.QuasiDiagonal(),
]


def step(model, x, y, *, structure=STRUCTURES[0], loss=SOFTMAX, **settings):
    settings = {"damping": RHO, **settings}
    found = ng.natural_gradient(model, x, y, structure=structure, loss=loss, **settings)
    return ravel_pytree(nnx.as_pure(found))[0]


def close(found, expected, tolerance=1e-10):
    scale = np.linalg.norm(expected)
    assert np.isfinite(found).all()
    assert scale > 0
    assert np.linalg.norm(found - expected) <= tolerance * scale


def dense(model, x, y, weights, loss):
    """Gradient and Fisher of sum w l / sum w, by automatic differentiation."""
    graphdef, state = nnx.split(model, nnx.Param)
    flat, unravel = ravel_pytree(nnx.as_pure(state))

    def run(flat):
        state = unravel(flat)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a, state))(x)

    jacobian = jax.jacrev(run)(flat)
    outputs = run(flat)
    jacobian = jacobian.reshape(-1, outputs.shape[-1], len(flat))
    rows, targets = outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1, *y.shape[2:])
    one = lambda f, y: loss.values(f[None], y[None])[0]  # noqa: E731
    w = weights.reshape(-1) / weights.sum()
    slope = jnp.einsum("n,nc,ncp->p", w, jax.vmap(jax.grad(one))(rows, targets), jacobian)
    h = loss.fisher(rows, targets) if loss.needs_targets else loss.fisher(rows)
    fisher = jnp.einsum("n,nap,nab,nbq->pq", w, jacobian, h, jacobian)
    return slope, fisher


CASES = {
    "softmax": (SOFTMAX, V, LABELS),
    "smoothed": (ng.SoftmaxCrossEntropy(label_smoothing=0.2), V, LABELS),
    "one-hot": (SOFTMAX, V, jax.nn.one_hot(LABELS, V)),
    "sigmoid": (ng.SigmoidCrossEntropy(), V, RNG.integers(0, 2, (N, T, V))),
    "counts": (ng.Poisson(), V, RNG.integers(0, 4, (N, T, V))),
    "gaussian": (ng.GaussianNegativeLogLikelihood(), 4, RNG.normal(size=(N, T, 2))),
    "squares": (ng.MeanSquaredError(), V, RNG.normal(size=(N, T, V))),
    "robust": (ng.Huber(), V, 3 * RNG.normal(size=(N, T, V))),
    "a function": (
        ng.GaussNewton(lambda f, y: jnp.sum(jnp.log(jnp.cosh(f - y)))),
        V,
        RNG.normal(size=(N, T, V)),
    ),
    "a likelihood": (ng.Likelihood(lambda f, y: jax.nn.logsumexp(f) - f[y]), V, LABELS),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_dense_solve(name):
    loss, outputs, targets = CASES[name]
    model = Tokens(outputs, causal=True)
    slope, fisher = dense(model, TOKENS, targets, WEIGHTS, loss)
    expected = jnp.linalg.solve(fisher + RHO * jnp.eye(len(fisher)), slope)
    close(step(model, TOKENS, targets, loss=loss, weights=WEIGHTS), expected)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
class TestFlattened:
    def test_positions_without_coupling_are_samples(self, structure):
        expected = step(Rows(), TOKENS.reshape(-1), LABELS.reshape(-1), structure=structure)
        close(step(Tokens(), TOKENS, LABELS, structure=structure), expected)

    def test_masked_positions_are_not_there(self, structure):
        """Nothing of them is looked at, not even a class number that there is none of."""
        kept = (TOKENS[MASK], LABELS[MASK])
        expected = step(Rows(), *kept, structure=structure)
        odd = jnp.where(MASK, LABELS, -100)
        close(step(Tokens(), TOKENS, odd, structure=structure, weights=MASK), expected)

    def test_weights_are_how_often_a_sample_is_there(self, structure):
        """0, 1 or 2 times; a scale is nothing, nor are microbatches."""
        model, x, y = Rows(), TOKENS[:, :2].reshape(-1), LABELS[:, :2].reshape(-1)
        times = np.array([0, 2, 1, 0, 1, 2, 1, 1])
        expected = step(model, np.repeat(x, times), np.repeat(y, times), structure=structure)
        close(step(model, x, y, structure=structure, weights=3.5 * times, microbatches=2), expected)


SCALED = [
    ng.KFAC(),
    ng.KFAC(space="sample"),
    ng.KFAC(split="pi", first_layer="scaled", space="parameter"),
]
RELATIVE = ng.RelativeDamping(0.1)
BY_GRAM_DIAGONALS = [
    ng.Exact(),
    ng.BlockDiagonal(),
    ng.LayerWise(((1.0, 0.3), (0.3, 1.0))),
    ng.UnitWise(),
    ng.Foof("inputs"),
    ng.Foof("units"),
    ng.Diagonal(),
]


class TestScalings:
    """The N of K-FAC's scalings and of relative dampings counts no sample of weight 0."""

    THERE = np.asarray([1, 0, 1, 1, 0], bool)

    def batch(self):
        n = len(self.THERE)
        x = jnp.asarray(RNG.normal(size=(n, 2)))
        return ng.MLP((2, 6, V), rngs=nnx.Rngs(0), param_dtype=jnp.float64), x, np.arange(n) % V

    @pytest.mark.parametrize(
        ("structure", "damping"),
        [(structure, damping) for structure in SCALED for damping in (RHO, RELATIVE)]
        + [(structure, RELATIVE) for structure in BY_GRAM_DIAGONALS],
        ids=repr,
    )
    def test_deletion(self, structure, damping):
        model, x, y = self.batch()
        kept = (x[self.THERE], y[self.THERE])
        settings = {"structure": structure, "damping": damping}
        found = step(model, x, y, weights=7.0 * self.THERE, **settings)
        close(found, step(model, *kept, **settings))

    def test_positions(self):
        kept = (TOKENS[:2], LABELS[:2])
        there = np.arange(N) < 2
        found = step(Tokens(causal=True), TOKENS, LABELS, structure=SCALED[0], weights=there)
        close(found, step(Tokens(causal=True), *kept, structure=SCALED[0]))

    @pytest.mark.parametrize("structure", [*SCALED, ng.QuasiDiagonal()], ids=repr)
    def test_averages(self, structure):
        model, x, y = self.batch()
        params = nnx.state(model, nnx.Param)
        found = []
        for arrays, settings in (
            ((x, y), {"weights": jnp.asarray(self.THERE)}),
            ((x[self.THERE], y[self.THERE]), {}),
        ):
            tx = ng.natural_gradient_descent(
                1.0,
                structure=structure,
                loss=SOFTMAX,
                damping=ng.RelativeDamping(0.1),
                average=ng.MovingAverage(),
                example=(model, x),
            )

            def update(x, y, settings, tx=tx):
                return tx.update(params, tx.init(params), module=model, x=x, y=y, **settings)[0]

            found.append(ravel_pytree(jax.jit(update)(*arrays, settings))[0])
        close(*found)

    def test_heads(self):
        """A sample counts that one of the heads looks at."""
        loss = ng.Heads((ng.MeanSquaredError(), ng.MeanSquaredError()))
        weights = (jnp.asarray([1.0, 0, 0]), jnp.asarray([0, 1.0, 0]))

        class Twice(nnx.Module):
            def __init__(self):
                self.layer = ng.MLP((2, 1), rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.layer(x), self.layer(2 * x)

        def counted(weights):
            y = (jnp.ones((3, 1)),) * 2
            x, settings = jnp.ones((3, 2)), {"loss": loss, "weights": weights}
            return ng.fisher_signals(Twice(), x, y, **settings)[0].num_counted

        assert counted(weights) == 2
        assert counted((weights[0], None)) == 3
        assert counted(None) == 3

    def test_no_layer_with_inputs(self):
        """A parameter that scales features has no inputs that a Kronecker factor would weigh."""

        class Scales(nnx.Module):
            def __init__(self):
                self.scale = nnx.Param(jnp.asarray([0.5, -1.0, 2.0]))

            def __call__(self, x):
                return x * self.scale

        x = jnp.asarray(RNG.normal(size=(len(self.THERE), 3)))
        y = np.arange(len(x)) % 3
        found = step(Scales(), x, y, weights=1.0 * self.THERE, damping=RELATIVE)
        close(found, step(Scales(), x[self.THERE], y[self.THERE], damping=RELATIVE))


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_the_gradient_at_a_large_damping(fisher):
    model = Tokens(causal=True)
    slope, _ = dense(model, TOKENS, LABELS, WEIGHTS, SOFTMAX)
    for structure in (ng.Exact(), ng.BlockDiagonal()):
        found = step(
            model,
            TOKENS,
            LABELS,
            structure=structure,
            weights=WEIGHTS,
            fisher=fisher,
            key=jax.random.key(0),
            damping=1e9,
        )
        close(1e9 * found, slope, 1e-7)


def test_drawn_targets_of_all_positions():
    """One direction a draw; the sampled Fisher tends to the exact one."""
    model = Tokens(causal=True)
    settings = {"loss": SOFTMAX, "weights": WEIGHTS}
    signals, _ = ng.fisher_signals(
        model, TOKENS, LABELS, fisher="mc", key=jax.random.key(0), num_samples=20_000, **settings
    )
    assert signals.num_directions == 20_000
    rows = signals.to_dense()
    exact = ng.fisher_signals(model, TOKENS, LABELS, **settings)[0].to_dense()
    expected = exact.T @ exact
    assert np.linalg.norm(rows.T @ rows - expected) <= 0.03 * np.linalg.norm(expected)


def test_weights_of_samples_count_for_all_of_their_positions():
    weights = jnp.asarray([0.5, 1, 0, 2])
    expected = step(Tokens(causal=True), TOKENS, LABELS, weights=jnp.repeat(weights[:, None], T, 1))
    close(step(Tokens(causal=True), TOKENS, LABELS, weights=weights), expected)


def test_a_mesh():
    """Of one device; weights and positions take the same way as on several."""
    settings = {"structure": ng.KFAC(), "loss": SOFTMAX, "damping": RHO, "weights": WEIGHTS}
    model, mesh = Tokens(causal=True), jax.make_mesh((1,), ("data",))
    found = devices.sharded_natural_gradient(model, TOKENS, LABELS, mesh=mesh, **settings)
    expected = ng.natural_gradient(model, TOKENS, LABELS, **settings)
    close(*(ravel_pytree(nnx.as_pure(tree))[0] for tree in (found, expected)))


def test_images():
    """Two axes of positions, and a Fisher with a batch of its own that is padded."""

    class Pixels(Tokens):
        def __call__(self, x):
            return super().__call__(x.reshape(len(x), -1)).reshape(*x.shape, -1)

    model, x, y = Pixels(), TOKENS[:, :4].reshape(N, 2, 2), LABELS[:, :4].reshape(N, 2, 2)
    expected = step(Tokens(), TOKENS[:, :4], LABELS[:, :4])
    close(step(model, x, y), expected)
    padded = jnp.concatenate([x, x[:2]])
    mask = jnp.arange(N + 2) < N
    close(step(model, x, y, fisher_x=padded, fisher_weights=mask), expected)


def test_a_prompt_counts_among_the_inputs_of_a_kronecker_factor():
    """What is masked, but what other outputs depend on, counts by the mean of its sample."""
    mask = jnp.asarray([[0, 0, 1, 1, 0]] * N)
    signals, _ = ng.fisher_signals(Tokens(causal=True), TOKENS, LABELS, loss=SOFTMAX, weights=mask)
    hidden, readout = signals.layers[1:]
    row = np.array([0, 0, 2.5, 2.5, 0])
    np.testing.assert_allclose(readout.row_weights, np.tile(row, (N, 1)))
    # attention acts before the hidden layer, so that is used in its place alone
    np.testing.assert_allclose(hidden.row_weights, np.tile(row, (N, 1)))
    embed = np.where(row == 0, [1, 1, 0, 0, 0], row)
    np.testing.assert_allclose(signals.layers[0].row_weights, np.tile(embed, (N, 1)))


def test_operator_and_description():
    model = Tokens(causal=True)
    _, fisher = dense(model, TOKENS, LABELS, WEIGHTS, SOFTMAX)
    found = ng.fisher(model, TOKENS, structure=ng.Exact(), loss=SOFTMAX, weights=WEIGHTS)
    close(found.to_dense(), fisher)
    described = ng.describe(model, TOKENS, structure=ng.KFAC(), loss=SOFTMAX, fisher="exact")
    assert (described.num_outputs, described.num_directions) == (T * V, T * (V - 1))
    assert ng.describe(model, TOKENS, loss=SOFTMAX, mc_samples=2).num_directions == 2
    assert ng.jacobian_signals(model, TOKENS).num_directions == T * V


@pytest.mark.parametrize(
    "settings",
    [
        {"structure": ng.KFAC(), "fisher": "mc", "damping": 0.3},
        {"structure": ng.Exact(), "damping": ng.LevenbergMarquardt(0.3)},
        {"structure": ng.KFAC(), "fisher": "mc", "damping": 0.3, "average": (0.9, 2)},
    ],
    ids=["mc", "adaptive", "averaged"],
)
def test_training_goes_downhill(settings):
    """Through nnx.Optimizer, with a mask, and with as many microbatches as one likes."""
    ends = []
    for microbatches in (1, 2):
        model, more = Tokens(causal=True), dict(settings, loss=SOFTMAX, microbatches=microbatches)
        if "average" in more:
            decay, every = more["average"]
            more |= {"average": ng.MovingAverage(decay, every), "example": (model, TOKENS)}
        tx = ng.natural_gradient_descent(0.1, **more)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def train(model, optimizer):
            grads = nnx.state(model, nnx.Param)
            optimizer.update(model, grads, module=model, x=TOKENS, y=LABELS, weights=MASK)
            return SOFTMAX(model(TOKENS), LABELS, MASK)

        before = float(SOFTMAX(model(TOKENS), LABELS, MASK))
        for _ in range(20):
            after = float(train(model, optimizer))
        assert after < 0.9 * before
        ends.append(after)
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


def test_adaptive_damping_looks_at_what_counts():
    """Its path with samples masked is that without them, which the loss of the others is not."""
    mask = np.arange(9) < 3
    x, y = np.tile([0, 1, 2], 3), np.where(mask, 0, 1)
    paths = []
    for arrays in ((x, y, mask), (x[mask], y[mask], None)):
        model = Rows()
        settings = {"structure": ng.Exact(), "loss": SOFTMAX, "microbatches": 1}
        tx = ng.natural_gradient_descent(0.5, damping=ng.LevenbergMarquardt(0.1), **settings)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def train(model, optimizer, x, y, weights):
            grads = nnx.state(model, nnx.Param)
            optimizer.update(model, grads, module=model, x=x, y=y, weights=weights)

        path = []
        for _ in range(5):
            train(model, optimizer, *arrays)
            path.append(float(optimizer.opt_state.damping[...]))
        paths.append(path)
    assert len(set(paths[0])) > 2
    np.testing.assert_allclose(*paths, rtol=1e-6)


def test_readme(capsys):
    """The example runs as it stands, and its loss falls."""
    text = (Path(__file__).parents[3] / "docs/guides/losses.md").read_text()
    block = re.search(r"<!-- language model -->\n```python\n(.*?)```", text, re.DOTALL)
    assert block, "the page has no block after <!-- language model -->"
    exec(block[1], {"jax": jax, "ng": ng, "nnx": nnx})
    losses = list(map(float, capsys.readouterr().out.split()))
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]


def test_a_vocabulary_makes_no_squares():
    """Of 50,000 words a Monte-Carlo step holds a few arrays like the outputs."""
    words = 50_000

    class Unigram(nnx.Module):
        def __init__(self):
            self.readout = nnx.Linear(2, words, dtype=jnp.float32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.readout(x)

    graphdef, state = nnx.split(Unigram())

    @jax.jit
    def run(state, x, y, mask, key):
        model = nnx.merge(graphdef, state)
        found = ng.natural_gradient(
            model,
            x,
            y,
            structure=ng.Diagonal(),
            loss=SOFTMAX,
            damping=0.1,
            fisher="mc",
            key=key,
            weights=mask,
        )
        return nnx.as_pure(found)

    x, y = jnp.ones((2, 6, 2), jnp.float32), jnp.zeros((2, 6), int)
    compiled = run.lower(state, x, y, jnp.ones((2, 6)), jax.random.key(0)).compile()
    outputs = 2 * 6 * words * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * outputs
