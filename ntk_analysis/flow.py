"""Natural-gradient flow of the linearised network, for losses whose dynamics are not linear."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from natgrad_flax import Loss, Residual, Signals, SoftmaxCrossEntropy, Structure
from natgrad_flax.arguments.scalars import as_number, as_values, shown
from natgrad_flax.losses import check_loss
from natgrad_flax.optimizer.gradient import resolve_damping
from ntk_analysis.coefficient import Damping, check_coefficient_fits, check_theory_arguments
from ntk_analysis.dynamics import check_targets
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.resonance import warn_of_resonance

Metric = Literal["initial", "current"]
_MAX_STEPS = 200_000
_STIFF, _LARGEST_IMPLICIT = 1e4, 2000


@dataclass(frozen=True, eq=False)
class LinearisedFlow:
    """Outputs of the linearised network along the flow, all float64.

    Attributes:
      times: t, shape (T,).
      outputs_train: f_t(x), shape (T, N, C).
      outputs_test: f_t(x'), shape (T, N', C), or None without test inputs.
      targets_train: y, shape (N, C).
      loss: the loss that is descended.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> found = na.predict_flow(
      ...     ng.Exact(), model, x, y, [0.0, 1.0], loss=ng.MeanSquaredError()
      ... )
      >>> found.times.tolist(), found.outputs_train.shape
      ([0.0, 1.0], (2, 4, 1))
    """

    times: Matrix
    outputs_train: Matrix
    outputs_test: Matrix | None
    targets_train: Matrix
    loss: Loss

    @property
    def train_losses(self) -> Matrix:
        """The loss on the training samples at each time, shape (T,)."""
        return _losses(self.loss, self.outputs_train, self.targets_train)

    def test_losses(self, targets: ArrayLike) -> Matrix:
        """The loss on the test samples at each time, shape (T,).

        Args:
          targets: y', shape (N', C).

        Raises:
          ValueError: there are no test outputs, or targets of the wrong shape or form.
        """
        if self.outputs_test is None:
            raise ValueError("no test outputs were predicted: pass x_test to predict_flow")
        _, n, c = self.outputs_test.shape
        wanted = check_targets(targets, (n, c))
        self.loss.check_targets(wanted)
        return _losses(self.loss, self.outputs_test, wanted)


def predict_flow(
    structure: Structure,
    model: nnx.Module,
    x: ArrayLike,
    y: ArrayLike,
    times: Sequence[float] | Matrix,
    damping: Damping = 0.0,
    x_test: ArrayLike | None = None,
    *,
    loss: Loss | None = None,
    metric: Metric = "initial",
    rtol: float = 1e-8,
    atol: float = 1e-8,
) -> LinearisedFlow:
    """Training of the linearised network in continuous time, by an adaptive solver (diffrax).

    df/dt = -J G^{-1} J^T r(f) / N with the Jacobian J of initialisation (Karakida & Osawa 2020,
    Sections 2 and D). Time t stands for t / eta steps of a small learning rate eta. For
    ``GradientDescent()`` it is the flow of the neural tangent kernel, df/dt = -Theta r(f).

    A softmax Fisher does not see a shift of all logits of a sample. At zero damping structures
    therefore differ in such shifts on the training samples even where they agree in the losses.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      model: any module built of layers with signals.
      x: training inputs, shape (N, ...).
      y: targets, shape (N, C), of the form that the loss takes.
      times: when to report the outputs: increasing, the first at least 0.
      damping: rho, added to the Fisher in the 1/N convention, or an ``ng.RelativeDamping``.
      x_test: test inputs, shape (N', ...).
      loss: ``ng.SoftmaxCrossEntropy()`` by default, or ``ng.MeanSquaredError()``.
      metric: "initial", G at initialisation throughout; or "current", G = J^T H(f_t) J / N in the
        approximation of the structure, which follows the outputs f_t (and so does a relative
        damping). They agree for losses of constant H and for ``GradientDescent()``.
      rtol: relative tolerance of the solver, in the outputs.
      atol: absolute tolerance of the solver, in the outputs.

    Returns:
      The outputs at every time.

    Raises:
      ValueError, TypeError: bad arguments, or a structure that does not suit the network.
      RuntimeError: the solver failed, or reached its limit of steps.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> found = na.predict_flow(
      ...     ng.Exact(), model, x, y, [0.0, 1.0], loss=ng.MeanSquaredError()
      ... )
      >>> losses = found.train_losses
      >>> bool(np.isclose(losses[1] / losses[0], np.exp(-2), rtol=1e-5))
      True
    """
    loss = SoftmaxCrossEntropy() if loss is None else loss
    check_loss(loss)
    if loss.needs_targets:
        raise TypeError(
            f"loss must be one whose Fisher the outputs decide alone, got {loss!r}: along a flow "
            "the Hessian of any function has no factor of fixed rank"
        )
    if metric not in get_args(Metric):
        raise ValueError(f'metric must be "initial" or "current", got {metric!r}')
    if not all(0 < (as_number(value) or 0) < math.inf for value in (rtol, atol)):
        raise ValueError(f"rtol and atol must be positive, got {shown(rtol)} and {shown(atol)}")
    check_theory_arguments(structure, damping, "empirical")
    moments = _times(times)
    initial = initial_signals(model, x, x_test)
    targets = check_targets(y, (initial.num_train, initial.num_outputs))
    loss.check_targets(targets)
    outputs = signal_flow(
        structure, initial, targets, moments, damping, loss, metric, rtol=rtol, atol=atol
    )
    n = initial.num_train
    outside = outputs[:, n:] if initial.num_test else None
    return LinearisedFlow(moments, outputs[:, :n], outside, targets, loss)


def signal_flow(
    structure: Structure,
    initial: InitialSignals,
    targets: Matrix,
    times: Matrix,
    damping: Damping,
    loss: Loss,
    metric: Metric,
    *,
    rtol: float = 1e-8,
    atol: float = 1e-8,
) -> Matrix:
    """As ``predict_flow``, from signals that are at hand.

    Returns:
      f_t on training, then test samples, shape (T, N + N', C).

    Raises:
      ValueError: the structure does not suit the network, or an array cannot fit in memory.
      RuntimeError: the solver failed, or reached its limit of steps.
    """
    with jax.enable_x64(True):
        plain = initial.train
        weighted = plain.mix_directions(loss.factor(plain.outputs))
        check_coefficient_fits(structure, weighted)
        structure.check(weighted, damping)
        warn_of_resonance(structure, weighted, damping)
        field: Callable[..., Array]
        arguments: tuple[Any, ...]
        stiff = False
        if metric == "current":
            field = _current_field(structure, loss, damping)
            arguments = (initial.everything, plain, jnp.asarray(targets))
        else:
            matrix = residual_coefficient(structure, initial, loss, damping)
            field = _initial_field(loss)
            arguments = (jnp.asarray(matrix), jnp.asarray(targets))
            # A natural gradient levels the rates, so an explicit method suits it. Rates far apart
            # over a long time (gradient descent) are stiff: an implicit method then saves steps,
            # each of which factorises a matrix of the side of all outputs.
            spread = float(np.linalg.norm(matrix[: plain.size])) * times[-1]
            stiff = spread > _STIFF and len(matrix) <= _LARGEST_IMPLICIT
        outputs = initial.everything.outputs
        return _integrate(field, outputs, times, arguments, stiff, rtol, atol)


def residual_coefficient(
    structure: Structure, initial: InitialSignals, loss: Loss, damping: Damping = 0.0
) -> Matrix:
    """J(x') G_0^{-1} J(x)^T / N with the Fisher of a loss at f_0, as a matrix that acts on r.

    A structure's own matrix acts on w with r = R_0 w. Any later residual lies in the range of R_0
    as well (for softmax, vectors whose entries sum to 0), so w = R_0^+ r sample by sample.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      initial: signals of training and test samples.
      loss: the loss.
      damping: as in ``predict_flow``.

    Returns:
      Float64, shape ((N + N') C, N C): training rows, then test rows.
    """
    with jax.enable_x64(True):
        plain = initial.train
        factor = loss.factor(plain.outputs)
        weighted = plain.mix_directions(factor)
        rho = resolve_damping(structure, weighted, damping)
        acting = np.asarray(structure.coefficient(initial.everything, weighted, rho))
    # columns of unlikely classes are short, not outside of the range
    lengths = np.linalg.norm(np.asarray(factor), axis=1, keepdims=True)
    inverses = np.linalg.pinv(np.asarray(factor) / lengths) / lengths.swapaxes(1, 2)
    n, s, c = inverses.shape
    combined: Matrix = np.einsum("rns,nsc->rnc", acting.reshape(-1, n, s), inverses)
    return combined.reshape(-1, n * c)


@functools.cache
def _initial_field(loss: Loss) -> Callable[..., Array]:
    """f' = -Theta-bar r(f) for a constant matrix; one function a loss, so that it compiles once."""

    def field(time: Array, outputs: Array, arguments: tuple[Array, Array]) -> Array:
        matrix, targets = arguments
        residual = loss.residual(outputs[: len(targets)], targets)
        return -(matrix @ residual.reshape(-1)).reshape(outputs.shape)

    return field


@functools.cache
def _current_field(structure: Structure, loss: Loss, damping: Damping) -> Callable[..., Array]:
    """f' = -J G(f)^{-1} J^T r(f) / N: the update in the parameters, pushed forward."""

    def field(time: Array, outputs: Array, arguments: tuple[Signals, Signals, Array]) -> Array:
        everything, plain, targets = arguments
        inside = outputs[: len(targets)]
        weighted = plain.mix_directions(loss.factor(inside))
        residual = Residual(loss.coefficients(inside, targets), None)
        updates = structure.solve(weighted, residual, resolve_damping(structure, weighted, damping))
        moved = (a.jvp(b) for a, b in zip(everything.layers, updates, strict=True))
        return -sum(moved, start=jnp.zeros_like(outputs))

    return field


def _integrate(
    field: Callable[..., Array],
    start: Array,
    times: Matrix,
    arguments: tuple[Any, ...],
    stiff: bool,
    rtol: float,
    atol: float,
) -> Matrix:
    # imported here: it takes seconds, and nothing else needs it
    import diffrax

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Kvaerno5() if stiff else diffrax.Tsit5(),
        t0=0.0,
        t1=float(times[-1]),
        dt0=None,
        y0=start,
        args=arguments,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=_MAX_STEPS,
        throw=False,
    )
    outputs = np.asarray(solution.ys)
    if solution.result != diffrax.RESULTS.successful or not np.isfinite(outputs).all():
        limit = solution.result == diffrax.RESULTS.max_steps_reached
        reason = f"it reached {_MAX_STEPS} steps" if limit else "its steps or outputs broke down"
        raise RuntimeError(
            f"the flow up to t = {times[-1]:g} could not be solved: {reason}. Use an earlier last "
            "time, a larger damping, or larger rtol and atol"
        )
    return outputs


def _times(times: Sequence[float] | Matrix) -> Matrix:
    values = as_values("times", times)
    if not np.isfinite(values).all():
        raise ValueError(f"times must be a sequence of finite numbers, got {times!r}")
    if values[0] < 0 or (np.diff(values) <= 0).any() or values[-1] <= 0:
        raise ValueError(
            "times must increase, start at 0 or later and end after 0, got "
            f"{np.array2string(values, threshold=6)}"
        )
    return values


def _losses(loss: Loss, outputs: Matrix, targets: Matrix) -> Matrix:
    with jax.enable_x64(True):
        wanted = jnp.asarray(targets)
        return np.array([float(loss(jnp.asarray(values), wanted)) for values in outputs])
