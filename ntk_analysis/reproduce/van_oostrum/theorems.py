"""The theorems of van Oostrum et al. (2022) on random maps, metrics and objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax import geometry
from natgrad_flax.geometry import Map, Metric, Objective, Representation
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, between, check
from ntk_analysis.reproduce.ruler import relative_error

DRAWS = 8
"""Random instances of each claim; the worst of them counts."""


@dataclass(frozen=True)
class Case:
    """A parametrisation with a curved image and curved fibres, a metric and an objective.

    Attributes:
      phi: from d parameters to D numbers, of rank r around xi.
      metric: of the ambient space, different at every point.
      objective: of points.
      change: a diffeomorphism of the parameters.
      xi: parameters (d,).
      free: a random (d, d) matrix.
    """

    phi: Map
    metric: Metric
    objective: Objective
    change: Map
    xi: Array
    free: Array

    def psi(self, theta: Array) -> Array:
        """phi o f."""
        return self.phi(self.change(theta))

    @property
    def natural(self) -> Representation:
        """The natural parameter gradient with the Moore-Penrose inverse."""
        return lambda phi, xi: geometry.natural_parameter_gradient(
            phi, self.objective, xi, self.metric
        )

    @property
    def ambient(self) -> Array:
        """The gradient of the ambient space at phi(xi)."""
        return geometry.ambient_gradient(self.objective, self.phi(self.xi), self.metric)


def draw(seed: int, params: int, ambient: int, rank: int) -> Case:
    """A random case; all functions are smooth and of order one."""
    rng = np.random.default_rng(seed)
    first = jnp.asarray(rng.standard_normal((rank, params)) / 2)
    second = jnp.asarray(rng.standard_normal((ambient, rank)))
    root = jnp.asarray(rng.standard_normal((ambient, ambient)))
    weight = jnp.asarray(rng.standard_normal(ambient))
    mix = jnp.asarray(rng.standard_normal((params, params)) + 3 * np.eye(params))
    xi, free = rng.standard_normal(params) / 4, rng.standard_normal((params, params))
    bend = jnp.asarray(rng.standard_normal((rank, params)))
    return Case(
        phi=lambda xi: second @ jnp.sin(first @ xi + jnp.cos(bend @ xi) / 4),
        metric=lambda z: root @ root.T + (1 + z @ z) * jnp.eye(ambient),
        objective=lambda z: weight @ z + jnp.sum(jnp.cos(z)),
        change=lambda theta: mix @ theta + jnp.tanh(theta) / 5,
        xi=jnp.asarray(xi),
        free=jnp.asarray(free),
    )


def worst(measure: Callable[[Case], float], params: int, ambient: int, rank: int) -> float:
    """The largest value of a measure over the draws."""
    return max(measure(draw(seed, params, ambient, rank)) for seed in range(DRAWS))


def smallest(measure: Callable[[Case], float], params: int, ambient: int, rank: int) -> float:
    """The smallest value of a measure over the draws."""
    return min(measure(draw(seed, params, ambient, rank)) for seed in range(DRAWS))


SETTING = (
    "phi = B sin(A xi + cos(C xi) / 4), whose fibres are curved, a metric that depends on the "
    f"point, {DRAWS} random draws, float64"
)


@check(
    "VO-Eq2",
    "The gradient of a model is a projection",
    claim="The natural gradient on a model is the orthogonal projection of the gradient of the "
    "space around it on the tangent space (Eq. 2); the projection is idempotent and self-adjoint "
    "in the metric.",
    setting=f"d = 5 parameters, D = 4, rank 3; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_2(report: Report) -> Outcome:
    """The projection of ``span_projection`` by its defining properties."""
    report("projecting")

    def properties(case: Case) -> tuple[float, float, float]:
        projection = geometry.span_projection(case.phi, case.xi, case.metric)
        matrix = case.metric(case.phi(case.xi))
        jacobian = jax.jacfwd(case.phi)(case.xi)
        # what is left over is orthogonal to every coordinate vector
        rest = case.ambient - projection @ case.ambient
        adjoint = matrix @ projection
        return (
            relative_error(projection @ projection, projection),
            relative_error(adjoint.T, adjoint),
            float(jnp.linalg.norm(jacobian.T @ matrix @ rest) / jnp.linalg.norm(matrix @ rest)),
        )

    found = [properties(draw(seed, 5, 4, 3)) for seed in range(DRAWS)]
    square, adjoint, rest = (max(values) for values in zip(*found, strict=True))
    return Outcome(
        (
            below("Pi^2 - Pi, relative", square, 1e-10),
            below("g Pi - (g Pi)^T, relative", adjoint, 1e-10),
            below("grad - Pi grad against the coordinate vectors", rest, 1e-10),
        )
    )


@check(
    "VO-Eq4",
    "Generalised inverses solve what can be solved",
    claim="A A^- w = w for every generalised inverse A^- and every w in the range of A (Eq. 4).",
    setting=f"A of shape 6 x 5 and rank 3, A^- = A^+ + Z - A^+ A Z A A^+, {DRAWS} draws",
    origin="ours",
    fast=True,
)
@in_float64
def eq_4(report: Report) -> Outcome:
    """Random inverses that are neither reflexive nor symmetric."""
    report("inverting")
    rng, errors, gaps = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        matrix = jnp.asarray(rng.standard_normal((6, 3)) @ rng.standard_normal((3, 5)))
        free = jnp.asarray(rng.standard_normal((5, 6)))
        inverse = geometry.any_generalised_inverse(matrix, free)
        inside = matrix @ jnp.asarray(rng.standard_normal(5))
        errors.append(relative_error(matrix @ (inverse @ inside), inside))
        gaps.append(relative_error(inverse, jnp.linalg.pinv(matrix)))
    return Outcome(
        (
            below("A A^- w - w, relative", max(errors), 1e-10),
            above("A^- - A^+, relative, in every draw", min(gaps), 0.1),
        )
    )


@check(
    "VO-Thm1",
    "The push-forward is the projected gradient, whatever the inverse",
    claim="d phi G^- grad_xi L = Pi grad L for every generalised inverse (Lemma 1, Theorem 1), and "
    "it is the natural gradient of the model where the coordinate vectors span its tangent space.",
    setting=f"d = 5, D = 4, rank 3, and d = 6, D = 4, rank 4; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def theorem_1(report: Report) -> Outcome:
    """Moore-Penrose and a random inverse against the projection."""

    def error(case: Case, free: bool) -> float:
        inverse = None
        if free:
            inverse = lambda gram: geometry.any_generalised_inverse(gram, case.free)  # noqa: E731
        vector = geometry.natural_parameter_gradient(
            case.phi, case.objective, case.xi, case.metric, inverse
        )
        moved = geometry.push_forward(case.phi, case.xi, vector)
        projection = geometry.span_projection(case.phi, case.xi, case.metric)
        return relative_error(moved, projection @ case.ambient)

    def proper(case: Case) -> float:
        moved = geometry.push_forward(case.phi, case.xi, case.natural(case.phi, case.xi))
        return relative_error(moved, case.ambient)

    report("comparing push-forwards")
    return Outcome(
        (
            below(
                "Moore-Penrose inverse, relative", worst(lambda c: error(c, False), 5, 4, 3), 1e-10
            ),
            below("random inverse, relative", worst(lambda c: error(c, True), 5, 4, 3), 1e-8),
            below("proper points: against the gradient itself", worst(proper, 6, 4, 4), 1e-8),
            above("the same at rank 3, in every draw", smallest(proper, 5, 4, 3), 1e-3),
        )
    )


@check(
    "VO-Thm2",
    "Reparametrisation invariance on the model",
    claim="For psi = phi o f with a diffeomorphism f, the push-forwards of the two natural "
    "parameter gradients are equal (Theorem 2).",
    setting=f"d = 5, D = 4, rank 3, f(theta) = A theta + tanh(theta) / 5; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def theorem_2(report: Report) -> Outcome:
    """The violation of the natural gradient, and of the gradient for comparison."""

    def violation(case: Case) -> float:
        return float(geometry.model_violation(case.natural, case.phi, case.change, case.xi))

    def of_gradient(case: Case) -> float:
        def plain(phi: Map, xi: Array) -> Array:
            slope: Array = jax.grad(lambda here: case.objective(phi(here)))(xi)
            return slope

        return float(geometry.model_violation(plain, case.phi, case.change, case.xi))

    report("changing parameters")
    return Outcome(
        (
            below("natural gradient: difference on the model", worst(violation, 5, 4, 3), 1e-10),
            above("ordinary gradient, in every draw", smallest(of_gradient, 5, 4, 3), 1e-3),
        )
    )


@check(
    "VO-Rem1",
    "Where the parametrisation is a diffeomorphism, all notions agree",
    claim="If phi is a diffeomorphism onto the model, invariance on the model and on the parameter "
    "space are the same, and the natural gradient has both (Remark 1).",
    setting=f"d = 3, D = 4, rank 3; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def remark_1(report: Report) -> Outcome:
    """Both violations of an immersion."""
    report("changing parameters")

    def on_parameters(case: Case) -> float:
        return float(geometry.parameter_violation(case.natural, case.phi, case.change, case.xi))

    def on_model(case: Case) -> float:
        return float(geometry.model_violation(case.natural, case.phi, case.change, case.xi))

    return Outcome(
        (
            below("difference of parameter vectors", worst(on_parameters, 3, 4, 3), 1e-9),
            below("difference on the model", worst(on_model, 3, 4, 3), 1e-10),
        )
    )


@check(
    "VO-Sec3.2",
    "No invariance on the parameter space",
    claim="In overparametrised models df(grad_theta) differs from grad_xi, by a vector that d phi "
    "maps to zero; it is F^T (F G F^T)^+ F grad_xi L, the solution of G y = grad_xi L that is "
    "shortest in the norm |F^-T y| (Eqs. 26-33).",
    setting=f"d = 5, D = 4, rank 3, F the transposed derivative of f; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def section_3_2(report: Report) -> Outcome:
    """The vector of Eq. 31, written out."""
    report("changing parameters")

    def parts(case: Case) -> tuple[float, float, float, float]:
        theta, xi = case.xi, case.change(case.xi)
        derivative = jax.jacfwd(case.change)(theta)
        moved = derivative @ case.natural(case.psi, theta)
        mine = case.natural(case.phi, xi)
        gram = geometry.gram_matrix(case.phi, xi, case.metric)
        slope = jax.grad(lambda here: case.objective(case.phi(here)))(xi)
        inner = jnp.linalg.pinv(derivative.T @ gram @ derivative, rtol=1e-11)
        printed = derivative @ inner @ derivative.T @ slope
        unseen = geometry.push_forward(case.phi, xi, moved - mine)
        # the shortest solution has no part in the kernel of G, in its own norm
        kernel = jnp.eye(len(xi)) - jnp.linalg.pinv(gram, rtol=1e-11) @ gram
        back = jnp.linalg.inv(derivative)
        leak = kernel.T @ back.T @ back @ moved
        return (
            relative_error(moved, mine),
            float(jnp.linalg.norm(unseen) / jnp.linalg.norm(moved - mine)),
            relative_error(moved, printed),
            float(jnp.linalg.norm(leak) / jnp.linalg.norm(back @ moved)),
        )

    found = [parts(draw(seed, 5, 4, 3)) for seed in range(DRAWS)]
    gap, unseen, printed, leak = zip(*found, strict=True)
    return Outcome(
        (
            above("|y_Theta - y_Xi| / |y_Xi|, in every draw", min(gap), 1e-3),
            below("d phi (y_Theta - y_Xi), relative", max(unseen), 1e-9),
            below("y_Theta against Eq. 31, relative", max(printed), 1e-8),
            below("F^-T y_Theta against the kernel of G: not shorter", max(leak), 1e-8),
        )
    )


@check(
    "VO-traj",
    "Finite steps end apart, by the square of the step",
    claim="One step of finite size with phi and with phi o f ends at different points of the model "
    "(Section 4, discussion); the difference is of the second order.",
    setting=f"d = 5, D = 4, rank 3, step sizes 1e-3 and 5e-4; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def trajectories(report: Report) -> Outcome:
    """The ratio of gaps at a step size and at half of it."""
    report("stepping")

    def ratio(case: Case) -> float:
        gaps = [
            float(geometry.finite_step_gap(case.natural, case.phi, case.change, case.xi, rate))
            for rate in (1e-3, 5e-4)
        ]
        return gaps[0] / gaps[1]

    ratios = [ratio(draw(seed, 5, 4, 3)) for seed in range(DRAWS)]
    return Outcome(
        (
            between("gap(eta) / gap(eta / 2), smallest", min(ratios), 3.5, 4.5),
            between("gap(eta) / gap(eta / 2), largest", max(ratios), 3.5, 4.5),
        )
    )
