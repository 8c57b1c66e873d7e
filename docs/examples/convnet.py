"""A ConvNet: K-FAC in mini-batches

Stock layers of Flax, mini-batches, factors that are averaged over batches and renewed now and
then: this is how K-FAC is used on networks whose weights are shared by positions.
"""

# gallery: 7

# %%
# Handwritten digits as 8 × 8 images, and two convolutions.
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from natgrad_datasets import load

import natgrad_flax as ng

data = load("digits", layout="image", num_train=1200, num_test=360)
x, y = jnp.asarray(data.x_train) * 8, jnp.asarray(data.labels_train)
x_test, y_test = jnp.asarray(data.x_test) * 8, jnp.asarray(data.labels_test)
loss = ng.SoftmaxCrossEntropy()
BATCH, STEPS = 100, 60


def network():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        *(nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.relu),
        *(nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs), nnx.relu),
        *(lambda h: h.mean((1, 2)), nnx.Linear(32, 10, rngs=rngs)),
    )


# %%
# Which formula serves which layer, and what it costs, is known from shapes alone.
print(ng.describe(network(), x[:BATCH], structure=ng.KFAC(), loss=loss, fisher="mc"))


# %%
# One loop for all. Adam and SGD ignore what the natural gradient asks for.
def train(tx):
    model = network()
    optimizer = nnx.Optimizer(model, optax.with_extra_args_support(tx), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        gradient = nnx.grad(lambda m: loss(m(x), y))(model)
        optimizer.update(model, gradient, module=model, x=x, y=y)

    @nnx.jit
    def judge(model):
        return loss(model(x), y), (model(x_test).argmax(1) != y_test).mean()

    history, draws = [judge(model)], np.random.default_rng(0)
    for _ in range(STEPS):
        batch = draws.choice(len(x), BATCH, replace=False)
        step(model, optimizer, x[batch], y[batch])
        history.append(judge(model))
    return np.array(history)


# %%
# For training the last layer of K-FAC is literal (by default it is scaled as theory wants it), and
# the damping is split between the factors. Three learning rates each; momentum behind K-FAC, too.
def kfac(rate):
    return optax.chain(
        ng.natural_gradient_descent(
            rate,
            structure=ng.KFAC(last_layer="literal", split="pi"),
            loss=loss,
            damping=1e-3,
            fisher="mc",
            average=ng.MovingAverage(decay=0.9, every=5),
            example=(network(), x[:BATCH]),
        ),
        optax.trace(0.9),
    )


tried = {
    "SGD, momentum": [optax.sgd(rate, momentum=0.9) for rate in (0.1, 0.3, 1.0)],
    "Adam": [optax.adam(rate) for rate in (0.003, 0.01, 0.03)],
    "K-FAC, momentum": [kfac(rate) for rate in (0.001, 0.003, 0.01)],
}

# %%
# The best of each by its last training loss.
figure, axes = plt.subplots(1, 2)
for (name, candidates), color in zip(tried.items(), ("0.6", "#0072B2", "#CC79A7"), strict=True):
    best = min(map(train, candidates), key=lambda history: np.nan_to_num(history[-1, 0], nan=9))
    axes[0].semilogy(best[:, 0], color=color, label=name)
    axes[1].plot(100 * best[:, 1], color=color, label=name)
    print(f"{name:<16} loss {best[-1, 0]:.3f}, test error {best[-1, 1]:.1%}")
axes[0].set(xlabel="step", title="training loss")
axes[1].set(xlabel="step", title="test error, %", ylim=(0, 100))
axes[0].legend()
plt.show()
