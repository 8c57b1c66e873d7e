"""Laplace posterior: what the network does not know

The Fisher at the end of training is the curvature of the posterior: N(θ, (N F + τ)⁻¹) is the
Laplace approximation, and linearising the network gives error bars for its predictions. The
operator `ng.fisher` has all that this needs, for every structure.
"""

# gallery: 4

# %%
# Noisy samples of a function with a gap between them, and a small network.
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import natgrad_flax as ng
from ntk_analysis.palette import STYLES

NOISE, PRIOR = 0.15, 1.0  # standard deviation of a sample, precision of a parameter
draw = np.random.default_rng(0)
x = np.concatenate([draw.uniform(-3, -1, 25), draw.uniform(1, 2.2, 25)])[:, None]
y = np.sin(2 * x) + NOISE * draw.normal(size=x.shape)
x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

model = nnx.Sequential(
    *(nnx.Linear(1, 24, rngs=nnx.Rngs(1)), jnp.tanh),
    *(nnx.Linear(24, 24, rngs=nnx.Rngs(2)), jnp.tanh),
    nnx.Linear(24, 1, rngs=nnx.Rngs(3)),
)
loss = ng.MeanSquaredError()
damping = PRIOR * NOISE**2 / len(x)


# %%
# The maximum a posteriori, by Adam: with noise of variance s² and a prior precision τ the loss has
# the penalty τ s² / 2N |θ|².
@nnx.jit
def step(model, optimizer):
    def objective(model):
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        return loss(model(x), y) + damping / 2 * squares

    optimizer.update(model, nnx.grad(objective)(model))


optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(0.02, 3000)), wrt=nnx.Param)
for _ in range(3000):
    step(model, optimizer)
print(f"loss {loss(model(x), y):.4f}, of which noise {0.5 * NOISE**2:.4f}")

# %%
# The curvature of the posterior is N F / s² + τ, so that F wants the damping τ s² / N, and the
# variance of an output at x' is J' (N F / s² + τ)⁻¹ J'ᵀ. Parameters are drawn by
# `sample_inverse`, and a Jacobian-vector product carries each draw to the outputs.
fine = jnp.linspace(-4.5, 4.5, 300)[:, None]
graphdef, params = nnx.split(model, nnx.Param)


def outputs(params):
    return nnx.merge(graphdef, params)(fine)


def draws(structure, number=100):
    F = ng.fisher(model, x, structure=structure, loss=loss)

    def one(key):
        step = F.sample_inverse(key, damping=damping)
        scaled = jax.tree.map(lambda s: s * NOISE / len(x) ** 0.5, step)
        return jax.jvp(outputs, (params,), (scaled,))[1]

    keys = jax.random.split(jax.random.key(0), number)
    return jnp.stack([one(key) for key in keys])[..., 0]


# %%
# K-FAC's last layer is literal here: by default it is scaled, for training at the rate of theory.
# Dark: one standard deviation, light: two; thin lines are draws.
KFAC = ng.KFAC(last_layer="literal", split="pi")
figure, axes = plt.subplots(1, 3, sharey=True, figsize=(7.2, 3.2))
mean = np.asarray(outputs(params)[:, 0])
line = np.asarray(fine[:, 0])
for axis, structure in zip(axes, (ng.Exact(), KFAC, ng.Diagonal()), strict=True):
    style = STYLES[type(structure).__name__]
    moved = np.asarray(draws(structure))
    deviation = moved.std(0)
    for width, alpha in ((2, 0.15), (1, 0.25)):
        low, high = mean - width * deviation, mean + width * deviation
        axis.fill_between(line, low, high, color=style.color, alpha=alpha, linewidth=0)
    axis.plot(line, (mean + moved[:4]).T, color=style.color, linewidth=0.5, alpha=0.8)
    axis.plot(line, mean, color=style.color, linewidth=2)
    axis.plot(x, y, "k.", markersize=3)
    axis.set(title=style.label, xlabel="x", ylim=(-3, 3))
    between, among = np.abs(line) < 0.3, np.abs(line + 2) < 0.3
    numbers = (
        f"{deviation[between].mean():.2f} in the gap, {deviation[among].mean():.2f} at samples"
    )
    print(f"{style.label:<10}{numbers}")
plt.show()

# %%
# The exact Fisher is sure where there are samples and unsure between and beyond them. K-FAC, at a
# small part of the price, is as sure at the samples and not unsure enough elsewhere; the diagonal
# forgets which parameters vary together, and is as unsure at the samples as between them.
