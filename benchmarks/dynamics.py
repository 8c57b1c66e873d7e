"""Whether networks train as their initial kernels predict, structure by structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from natgrad_datasets import Dataset

import natgrad_flax as ng
import ntk_analysis as na
from benchmarks.common import Suite, by_profile, unit
from benchmarks.kernel_problems import medians
from ntk_analysis.dynamics import squared_losses
from ntk_analysis.empirical import Matrix
from ntk_analysis.methods import (
    STRUCTURES,
    LearningRate,
    Method,
    select_methods,
    theoretical_learning_rate,
)

SAMPLES, TEST_SAMPLES = 40, 40
CLASSES = (0, 7)
STEPS = (1, 3)
REPEATS = 3
SMALLEST_GAP = 1e-6
"""Smaller gaps are rounding, and are shown as this."""
TOLERANCE = 1e-6

NAMES = [name for name, structure in STRUCTURES.items() if not structure.without_biases]
"""Without biases, as here, the others are one of these."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a network did.

    Attributes:
      outputs: f_t at the inputs that were asked for, before the first and after each step,
        (steps + 1, N', C).
      first_move: how the linearised network moves in the first step: J(x') (theta_1 - theta_0),
        (N', C).
    """

    outputs: Matrix
    first_move: Matrix


def find_method(name: str) -> Method:
    """A structure with the damping at which it is trained, at its theoretical learning rate."""
    return select_methods((name,), 1.0, None)[0]


def digits() -> Dataset:
    """0 against 7, in float64."""
    return natgrad_datasets.load(
        "digits", classes=CLASSES, num_train=SAMPLES, num_test=TEST_SAMPLES, dtype="float64"
    )


def make_model(data: Dataset, width: int) -> ng.MLP:
    """The ReLU network M_0-M-M-C without biases, in float32."""
    return ng.MLP(
        (data.input_dim, width, width, data.output_dim),
        activation="relu",
        weight_variance=2.0,
        rngs=nnx.Rngs(0),
    )


def learning_rate(method: Method, model: ng.MLP, x: ArrayLike) -> LearningRate:
    """1 / alpha, or 1 / lambda_max of the coefficient matrix where that does not hold."""
    coefficient = na.coefficient_matrix(method.structure, model, x, damping=method.damping)
    return theoretical_learning_rate(method, model, np.shape(x)[0], coefficient)


def train(
    method: Method, rate: float, model: ng.MLP, x: Array, y: Array, inputs: Array, steps: int
) -> Trained:
    """Trains a copy of a network with ``ng.natural_gradient_descent`` on the mean squared error.

    Args:
      method: the structure and its damping.
      rate: the learning rate.
      model: the network, in the precision of the inputs; it is not changed.
      x: training inputs (N, M_0).
      y: targets (N, C).
      inputs: where the outputs are wanted, (N', M_0).
      steps: number of steps.

    Raises:
      ArithmeticError: an output is not finite.
    """
    graphdef, start = nnx.split(model)
    transformation = ng.natural_gradient_descent(
        rate, structure=method.structure, loss=ng.MeanSquaredError(), damping=method.damping
    )

    @jax.jit
    def step(parameters: nnx.State, state: Any) -> Any:
        module = nnx.merge(graphdef, parameters)
        # incoming gradients are taken for their tree only
        updates, state = transformation.update(
            parameters, state, parameters, module=module, x=x, y=y
        )
        return optax.apply_updates(parameters, updates), state

    def forward(parameters: nnx.State) -> Array:
        return nnx.merge(graphdef, parameters)(inputs)

    @jax.jit
    def move(before: nnx.State, after: nnx.State) -> Array:
        return jax.jvp(forward, (before,), (jax.tree.map(jnp.subtract, after, before),))[1]

    compiled = jax.jit(forward)
    parameters, state = start, transformation.init(start)
    outputs = [compiled(parameters)]
    for _ in range(steps):
        parameters, state = step(parameters, state)
        outputs.append(compiled(parameters))
        if len(outputs) == 2:
            first_move = np.asarray(move(start, parameters), np.float64)
    found = np.asarray(jnp.stack(outputs), np.float64)
    if not np.isfinite(found).all():
        raise ArithmeticError(f"{method.name}: training gives outputs that are not finite")
    return Trained(found, first_move)


def check_first_step(name: str, trained: Matrix, predicted: Matrix, tolerance: float) -> None:
    """Compares the first step with theory, where they must agree at every width.

    Args:
      name: of the structure.
      trained: how the linearised network moves in the first step, any shape.
      predicted: f_1 - f_0 of the prediction, the same shape.
      tolerance: largest relative difference.

    Raises:
      ArithmeticError: they differ.
    """
    difference = np.linalg.norm(trained - predicted) / np.linalg.norm(predicted)
    if not difference <= tolerance:
        raise ArithmeticError(
            f"{name}: the first step is not the one of its coefficient matrix (relative difference "
            f"{difference:.1e}, at most {tolerance:g}): solve and coefficient contradict each other"
        )


class Dynamics(Suite):
    """The distance of a finite network from the training curve that its initial kernels predict.

    ReLU networks 64-M-M-1 in NTK parametrisation without biases on 40 handwritten digits (0 against
    7), mean squared error, trained in float64 at the theoretical learning rate. The distance falls
    as the width grows, about as 1 / sqrt(M); K-FAC needs the widest networks. The first step of the
    linearised network must agree with the prediction to 1e-6 at every width, or the case fails.
    """

    params: ClassVar[tuple[list[Any], ...]] = (
        by_profile(smoke=["exact"], fast=NAMES, regular=NAMES, large=NAMES),
        by_profile(smoke=[64], fast=[256], regular=[256, 1024], large=[256, 1024, 4096]),
        list(STEPS),
    )
    param_names: ClassVar = ["structure", "width", "steps"]

    def setup(self, folder: str, *case: Any) -> None:
        """Reads or measures the figures; one training serves all numbers of steps."""
        super().setup(folder, *case[:-1])

    def measure(self, structure: str, width: int) -> dict[str, float]:
        """The gaps after each number of steps; see the class.

        Raises:
          ArithmeticError: the first step is not the predicted one, or outputs are not finite.
        """
        data, method = digits(), find_method(structure)
        model = make_model(data, width)
        rate = learning_rate(method, model, data.x_train).value
        theory = na.predict_dynamics(
            method.structure,
            model,
            data.x_train,
            data.y_train,
            rate,
            max(STEPS),
            method.damping,
            data.x_test,
        )
        with jax.enable_x64(True):
            graphdef, state = nnx.split(model)
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
            x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
            inputs = jnp.concatenate([x, jnp.asarray(data.x_test)])
            trained = train(method, rate, nnx.merge(graphdef, wide), x, y, inputs, max(STEPS))
        predicted = np.concatenate([theory.outputs_train, theory.outputs_test], axis=1)
        check_first_step(structure, trained.first_move, predicted[1] - predicted[0], TOLERANCE)
        return gaps(trained.outputs[:, : len(x)], theory)

    @unit("share of the initial loss")
    def track_loss_gap(self, folder: str, structure: str, width: int, steps: int) -> float:
        """|loss trained - loss predicted| / initial loss on the training set.

        A rise means that training leaves its linearisation earlier: larger steps in the parameters
        for the same outputs, or a structure that has changed. 1e-6 stands for less.
        """
        return self.figures[f"loss gap {steps}"]

    @unit("share of the initial residual")
    def track_output_gap(self, folder: str, structure: str, width: int, steps: int) -> float:
        """|f trained - f predicted| / |f_0 - y| on the training set; norms over all samples.

        Sees what the loss does not, and earlier. 1e-6 stands for less.
        """
        return self.figures[f"output gap {steps}"]


def gaps(outputs: Matrix, theory: na.LinearisedDynamics) -> dict[str, float]:
    """Both gaps after each number of steps.

    Args:
      outputs: of the network on the training set, (steps + 1, N, C).
      theory: the prediction.
    """
    targets = theory.targets_train
    losses = squared_losses(outputs, targets)
    start = np.linalg.norm(outputs[0] - targets)
    found: dict[str, float] = {}
    for step in STEPS:
        loss = abs(losses[step] - theory.train_losses[step]) / losses[0]
        distance = np.linalg.norm(outputs[step] - theory.outputs_train[step]) / start
        found[f"loss gap {step}"] = max(float(loss), SMALLEST_GAP)
        found[f"output gap {step}"] = max(float(distance), SMALLEST_GAP)
    return found


class Prediction(Suite):
    """What a prediction costs: ``predict_dynamics`` on the networks and data of ``Dynamics``.

    The kernels of the network at initialisation, the coefficient matrix and ten steps, in float64,
    each compiled before. A prediction whose loss rises in some step fails the case.
    """

    params: ClassVar[tuple[list[Any], ...]] = Dynamics.params[:2]
    param_names: ClassVar = Dynamics.param_names[:2]

    def measure(self, structure: str, width: int) -> dict[str, float]:
        """Median seconds of a prediction.

        Raises:
          ArithmeticError: a predicted loss rises at the theoretical learning rate.
        """
        data, method = digits(), find_method(structure)
        model = make_model(data, width)
        rate = learning_rate(method, model, data.x_train).value
        losses: list[Matrix] = []

        def predict() -> None:
            theory = na.predict_dynamics(
                method.structure, model, data.x_train, data.y_train, rate, 10, method.damping
            )
            losses.append(theory.train_losses)

        seconds = medians({"prediction": predict}, REPEATS)["prediction"]
        # below this share what is left is rounding
        if not (np.diff(losses[0]) <= 1e-12 * losses[0][0]).all():
            raise ArithmeticError(f"{structure}: the predicted loss rises, {losses[0]}")
        return {"seconds": seconds}

    @unit("seconds")
    def track_seconds(self, *case: Any) -> float:
        """Median of three calls. A rise makes every sweep and report slower."""
        return self.figures["seconds"]
