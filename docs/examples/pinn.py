"""An equation: natural gradients beside Adam

Networks that solve differential equations are trained on residuals, and these are badly
conditioned: Adam needs tens of thousands of steps. The residuals are outputs like others, so the
natural gradient of this loss is there without another line.
"""

# gallery: 5

# %%
# −Δu = f on the unit square, u = 0 on its boundary, with a solution that is known:
# u = sin(πx) sin(2πy). The model returns what the network leaves of the equation inside, and its
# values on the boundary.
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import natgrad_flax as ng


class Residuals(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 40, rngs=rngs)
        self.second = nnx.Linear(40, 40, rngs=rngs)
        self.readout = nnx.Linear(40, 1, rngs=rngs)

    def u(self, x):
        return self.readout(jnp.tanh(self.second(jnp.tanh(self.first(x)))))

    def __call__(self, points):
        x = points["x"]

        def second_derivative(direction):
            along = jnp.broadcast_to(direction, x.shape)
            first = lambda x: jax.jvp(self.u, (x,), (along,))[1]
            return jax.jvp(first, (x,), (along,))[1]

        laplacian = second_derivative(jnp.array([1.0, 0])) + second_derivative(jnp.array([0, 1.0]))
        return jnp.where(points["boundary"], self.u(x), -laplacian)


def solution(x):
    return jnp.sin(jnp.pi * x[:, :1]) * jnp.sin(2 * jnp.pi * x[:, 1:])


grid = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, 25)], indexing="ij"), -1).reshape(-1, 2)
x = jnp.asarray(grid, jnp.float32)
boundary = ((x == 0) | (x == 1)).any(1, keepdims=True)
points = {"x": x, "boundary": boundary}
y = jnp.where(boundary, 0, 5 * jnp.pi**2 * solution(x))
weights = jnp.where(boundary[:, 0], 500.0, 1.0)
loss = ng.MeanSquaredError()

fine = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, 60)], indexing="ij"), -1).reshape(-1, 2)
fine = jnp.asarray(fine, jnp.float32)
truth = solution(fine)

# %%
# The same loop for both. `tx.update` of Adam ignores what the natural gradient asks for.


def train(tx, steps, every):
    model = Residuals(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.with_extra_args_support(tx), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda m: loss(m(points), y, weights))(model)
        optimizer.update(model, gradient, module=model, x=points, y=y, weights=weights)

    @nnx.jit
    def error(model):
        return jnp.linalg.norm(model.u(fine) - truth) / jnp.linalg.norm(truth)

    history = [(0, float(error(model)))]
    for done in range(1, steps + 1):
        step(model, optimizer)
        if done % every == 0:
            history.append((done, float(error(model))))
    return model, np.array(history)


natural, natural_errors = train(
    ng.natural_gradient_descent(0.5, structure=ng.Exact(), loss=loss, damping=1e-3),
    steps=100,
    every=5,
)
adam, adam_errors = train(optax.adam(optax.cosine_decay_schedule(5e-3, 2000)), 2000, every=50)
print(f"natural gradient, {natural_errors[-1][0]:.0f} steps: error {natural_errors[-1][1]:.1e}")
print(f"Adam, {adam_errors[-1][0]:.0f} steps: error {adam_errors[-1][1]:.1e}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.7))
for axis, values, title in (
    (axes[0], natural.u(fine), "u of the network"),
    (axes[1], jnp.log10(jnp.abs(natural.u(fine) - truth) + 1e-9), "log₁₀ of its error"),
):
    colors = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if axis is axes[0] else {"cmap": "viridis"}
    image = axis.imshow(values.reshape(60, 60).T, origin="lower", extent=(0, 1, 0, 1), **colors)
    figure.colorbar(image, ax=axis, shrink=0.8)
    axis.set(title=title, xticks=(0, 1), yticks=(0, 1))
axes[2].loglog(*adam_errors[1:].T, color="0.5", label="Adam")
axes[2].loglog(*natural_errors[1:].T, color="#0072B2", label="natural gradient")
axes[2].set(xlabel="step", title="relative error")
axes[2].legend(fontsize="small")
plt.show()

# %%
# The same equation in five dimensions, in equal seconds: see [Equations](../guides/equations.md).
