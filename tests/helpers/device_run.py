"""A training run of one process or of several, which may kill itself; started by the tests.

Each process trains on its own part of the batches, writes a checkpoint after every step and goes
on from the last one. At the end process 0 leaves the parameters.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import jax


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--timeout", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--kill-after", type=int)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4 // arguments.processes)

    from natgrad_flax import devices

    if arguments.processes > 1:
        devices.connect(
            f"127.0.0.1:{arguments.port}",
            arguments.processes,
            arguments.process,
            timeout=arguments.timeout,
            start_timeout=60,
        )
    try:
        with devices.lost_peers():
            train(arguments)
    except devices.LostPeerError as error:
        print(error, file=sys.stderr, flush=True)
        # the others cannot be waited for
        os._exit(3)
    return 0


def train(arguments: argparse.Namespace) -> None:
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import natgrad_flax as ng
    from natgrad_flax import checkpoint, devices
    from natgrad_flax.checkpoint import stored_arrays

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    parts = jax.make_array_from_callback(whole.shape, rows, lambda index: whole[index])
    assert stored_arrays.digest(parts) == stored_arrays.digest(whole)
    structure, loss = devices.Sharded(ng.KFAC(), mesh), ng.SoftmaxCrossEntropy()
    model = ng.MLP((5, 8, 3), bias_variance=0.1, rngs=nnx.Rngs(0))
    transformation = ng.natural_gradient_descent(
        0.2, structure=structure, loss=loss, damping=0.1, fisher="mc"
    )
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    for tree in (model, optimizer):
        nnx.update(tree, devices.replicate(mesh, nnx.state(tree)))
    start = 0
    if arguments.folder.is_dir():
        _, start = checkpoint.restore(arguments.folder, model, optimizer, structure=structure)

    @nnx.jit
    def update(model, optimizer, x, y):
        unused = nnx.state(model, nnx.Param)
        optimizer.update(model, unused, module=model, x=x, y=y)

    for step in range(start, arguments.steps):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(8, 5)).astype(np.float32)
        y = np.eye(3, dtype=np.float32)[rng.integers(3, size=8)]
        size = len(x) // arguments.processes
        mine = slice(arguments.process * size, (arguments.process + 1) * size)
        update(model, optimizer, *devices.shard_batch(mesh, x[mine], y[mine]))
        jax.block_until_ready(nnx.state(model))
        checkpoint.save(arguments.folder, model, optimizer, structure=structure, step=step + 1)
        print(f"step {step + 1}", flush=True)
        if step + 1 == arguments.kill_after and arguments.process == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    # parts of the parameters can lie on the devices of the other process
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    flat = jax.jit(
        lambda *leaves: jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]),
        out_shardings=everywhere,
    )(*jax.tree.leaves(nnx.state(model)))
    if arguments.process == 0:
        np.save(arguments.folder / "parameters.npy", np.asarray(flat.addressable_data(0)))


if __name__ == "__main__":
    raise SystemExit(main())
