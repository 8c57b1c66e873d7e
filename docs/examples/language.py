"""A language model: nothing to tune

A causal transformer learns the bytes of a module of Python's standard library. K-FAC renews its
factors every ten steps; its learning rate, momentum and damping are chosen at every step by the
quadratic model of the loss, so no rate is tried.
"""

# gallery: 8

# %%
# The text, and windows of it.
import argparse
import inspect

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import natgrad_flax as ng

text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)
CONTEXT, SEQUENCES, STEPS = 48, 32, 150
loss = ng.SoftmaxCrossEntropy()
train_text, test_text = np.split(text, [len(text) * 9 // 10])


def windows(text, seed, count=SEQUENCES):
    starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT - 1, count)
    rows = text[starts[:, None] + np.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


x_test, y_test = windows(test_text, 0, 256)


def network():
    sizes = {"context": CONTEXT, "width": 64, "depth": 2, "heads": 4, "mlp": 128}
    return ng.LanguageModel(128, **sizes, rngs=nnx.Rngs(0))


# %%
# Every position of a sequence is a prediction of its own, and one draw of targets covers all of
# them. Which formula serves what, and what it costs:
print(ng.describe(network(), x_test[:32], structure=ng.KFAC(), loss=loss, fisher="mc"))


# %%
# Adam at three learning rates, and K-FAC without one.
def train(tx):
    model = network()
    optimizer = nnx.Optimizer(model, optax.with_extra_args_support(tx), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, gradient = nnx.value_and_grad(lambda m: loss(m(x), y))(model)
        optimizer.update(model, gradient, module=model, x=x, y=y)
        return value

    history = [float(step(model, optimizer, *windows(train_text, seed))) for seed in range(STEPS)]
    return np.array(history), model


kfac = ng.natural_gradient_descent(
    structure=ng.KFAC(last_layer="literal", split="pi"),
    loss=loss,
    fisher="mc",
    average=ng.MovingAverage(decay=0.9, every=10),
    example=(network(), x_test[:SEQUENCES]),
)
found = {f"Adam, {rate}": train(optax.adam(rate)) for rate in (0.001, 0.003, 0.01)}
found["K-FAC"] = train(kfac)

# %%
figure, axes = plt.subplots()
for (name, (history, model)), color in zip(
    found.items(), ("0.8", "0.6", "0.4", "#CC79A7"), strict=True
):
    smooth = np.convolve(history, np.ones(10) / 10, "valid")
    axes.plot(np.arange(9, STEPS), smooth, color=color, label=name)
    print(f"{name:<12} test loss {loss(model(x_test), y_test):.3f} nats a byte")
axes.set(xlabel="step", ylabel="training loss, nats a byte (mean of ten steps)")
axes.legend()
plt.show()

# %%
# What it writes after `def `, the likeliest byte at a time.
model = found["K-FAC"][1]


@nnx.jit
def following(model, tokens, last):
    return jnp.argmax(model(tokens)[0, last])


written = list(b"    def ")
while len(written) < 200:
    recent = written[-CONTEXT:]
    tokens = jnp.array([recent + [0] * (CONTEXT - len(recent))])
    written.append(int(following(model, tokens, len(recent) - 1)))
print(bytes(written).decode())
