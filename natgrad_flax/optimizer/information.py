"""The Fisher information of a model on a batch as a linear operator on its parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import own_promotion
from natgrad_flax.losses import LossLike
from natgrad_flax.optimizer.checks import (
    check_microbatches,
    check_needed_batch,
    check_settings,
)
from natgrad_flax.optimizer.fisher_operator import FisherOperator
from natgrad_flax.optimizer.preflight import preflight
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import Batch, Fisher, FisherKind, check_key
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.structures import Structure

if TYPE_CHECKING:
    pass


@own_promotion()
def fisher(
    model: nnx.Module,
    x: Any,
    y: Any = None,
    *,
    structure: Structure,
    loss: LossLike,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    mc_samples: int = 1,
    wrt: Any = nnx.Param,
    weights: Any = None,
    microbatches: int = 1,
    check_samples: bool = True,
) -> FisherOperator:
    """The Fisher information of a model on a batch, as a structure approximates it.

    F = (1/N) sum_n J_n^T H_n J_n with H the Fisher of the outputs, so N F is that of all samples
    together. Its products and solves never form the P x P matrix.

    Args:
      model: any nnx module whose outputs for a sample do not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of such arrays.
      y: targets, shape (N, ..., C), for ``fisher="empirical"`` and for ``ng.GaussNewton`` only.
      structure: the Fisher approximation.
      loss: the loss, which says what the outputs mean, or those of several heads.
      fisher: "exact", "mc", "empirical" or "improved", as for ``natural_gradient``.
      key: a jax.random key, for "mc".
      mc_samples: targets drawn a sample, for "mc".
      wrt: the parameters.
      weights: of samples or positions, as for ``natural_gradient``.
      microbatches: parts, a divisor of N, in which the model runs one after the other.
      check_samples: as for ``natural_gradient``.

    Returns:
      The operator; its vectors are trees like ``nnx.state(model, wrt)``.

    Raises:
      ValueError, TypeError: bad settings or a bad batch, before any work.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 16, 3), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(1), (20, 4))
      >>> # without the scaling that theory asks of steps
      >>> kfac = ng.KFAC(last_layer="literal")
      >>> F = ng.fisher(model, x, structure=kfac, loss=ng.SoftmaxCrossEntropy())
      >>> params = nnx.state(model, nnx.Param)

      Laplace posterior N(theta, (N F + tau)^{-1}), a draw and the volume that evidence asks for:

      >>> n, tau = 20, 1.0
      >>> draw = F.sample_inverse(jax.random.key(2), damping=tau / n)
      >>> posterior = jax.tree.map(lambda p, d: p + d / n**0.5, params, draw)
      >>> log_volume = -0.5 * (F.logdet(damping=tau / n) + F.num_params * jnp.log(n))

      Elastic weight consolidation, the penalty of a step away from an old task's parameters:

      >>> step = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
      >>> penalty = 0.5 * F.quadratic_form(step)

      Influence of a training sample on the loss of a test sample, -g_test^T (F + rho)^{-1} g:

      >>> graphdef, state = nnx.split(model)
      >>> def loss_of(state, x, label):
      ...     return -jax.nn.log_softmax(nnx.merge(graphdef, state)(x[None])[0])[label]
      >>> g_train, g_test = (jax.grad(loss_of)(state, x[i], 0) for i in (0, 1))
      >>> influence = -F.inner(g_test, F.solve(g_train, damping=0.1))

      Pruning (optimal brain damage): what the loss rises by when a weight is removed:

      >>> saliency = jax.tree.map(lambda p, f: 0.5 * f * p**2, params, F.diagonal())

      Eigenvectors by SciPy:

      >>> from scipy.sparse.linalg import eigsh
      >>> largest = eigsh(F.to_scipy(), k=2, return_eigenvectors=False)
      >>> bool(jnp.isclose(largest.max(), F.eigenvalues().max(), rtol=1e-3))
      True
    """
    # a positive number: what is looked at is a Fisher without a gradient
    which = check_settings(structure, loss, fisher, 1.0, mc_samples, wrt)
    check_key(fisher, key)
    if which.made_of_targets and y is None:
        raise ValueError(f'fisher="{fisher}" is made of targets: pass y')
    if y is not None and not which.made_of_targets:
        raise ValueError(
            f'fisher="{fisher}" takes no targets: pass y for "empirical" and "improved" only'
        )
    x, y, weights = check_needed_batch(model, x, y, weights, which.loss, which.made_of_targets)
    which = replace(which, microbatches=check_microbatches(microbatches, x))
    batch = Batch(x, y, weights, key=key)
    model, which = which.bound(model, x)
    preflight(structure, model, which, batch, 1.0)
    if check_samples:
        check_samples_alone(model, x)
    graphdef, state = nnx.split(model)
    signals = _signals(state, batch, graphdef=graphdef, structure=structure, fisher=which)
    shapes = jax.eval_shape(lambda: nnx.state(model, which.wrt))
    return FisherOperator(structure, signals, shapes, which.wrt)


@partial(jax.jit, static_argnames=("structure", "fisher"))
def _signals(
    state: Any, batch: Batch, *, graphdef: Any, structure: Structure, fisher: Fisher
) -> Signals:
    return fisher.signals(nnx.merge(graphdef, state), batch, structure.passes)[0]
