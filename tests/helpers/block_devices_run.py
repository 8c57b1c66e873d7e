"""Analytic kernels on the devices of two processes; each is started by the tests.

Leaves kernels as NumPy files, and as JSON which device computed how many blocks, and messages.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from flax import nnx

DEVICES = 4
SAMPLES = 16


def inputs():
    return np.random.default_rng(0).normal(size=(SAMPLES, 3))


def images():
    return np.random.default_rng(1).normal(size=(5, 4, 4, 2))


def dense():
    import natgrad_flax as ng

    return ng.MLP((3, 2, 2, 1), bias_variance=0.1, rngs=nnx.Rngs(0))


def convolutional():
    import natgrad_flax as ng

    return ng.ConvNet((4, 4, 2), channels=(2,), outputs=1, strides=2, rngs=nnx.Rngs(0))


class Stopped(Exception):
    pass


def main(folder, port, process):
    # before the first use of JAX
    jax.config.update("jax_num_cpu_devices", DEVICES)
    from natgrad_flax import devices

    devices.connect(f"127.0.0.1:{port}", 2, process, timeout=20, start_timeout=60)
    from ntk_analysis import analytic, block_devices, conv_kernels

    analytic._BLOCK, conv_kernels._ENTRIES, block_devices._PAYS = 2, 16, 16
    used = Counter()
    for name in ("dense_block", "convolutional_block"):
        block = getattr(analytic, name)

        def counted(limit, left, right, block=block, **options):
            values = block(limit, left, right, **options)
            ids = {device.id for value in values for device in value.devices()}
            used.update([",".join(map(str, sorted(ids)))])
            return values

        setattr(analytic, name, counted)

    found = {}

    def run(name, model=None, *arrays, **options):
        used.clear()
        kernels = analytic.analytic_kernels(
            model or dense(), *(arrays or (inputs(),)), parts=("tangent", "ntk"), **options
        )
        found[name] = dict(used)
        np.savez(folder / f"{name}-{process}.npz", **kernels.arrays)

    run("automatic")
    run("local", devices=jax.local_devices())
    run("cross", None, inputs()[:3] + 1, inputs(), devices=jax.local_devices())
    run("conv", convolutional(), images(), devices=jax.local_devices()[:2])
    run("together", devices=jax.devices())

    def stop(done, total):
        if done == 20:
            raise Stopped

    try:
        run("stopped", devices=jax.devices(), store=folder / "store", progress=stop)
    except Stopped:
        found["stopped"] = dict(used)
    told = []
    options = {"devices": jax.devices(), "store": folder / "store"}
    run("resumed", progress=lambda *at: told.append(at), **options)
    found["told"] = told
    others = [device for device in jax.devices() if device.process_index != process]
    for name, arguments, options in (
        ("different", (dense(), inputs() + process), {"devices": jax.devices()}),
        ("others", (dense(), inputs()), {"devices": others}),
    ):
        try:
            analytic.analytic_kernels(*arguments, **options)
        except ValueError as error:
            found[name] = str(error)
    (folder / f"found-{process}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
