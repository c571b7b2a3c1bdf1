"""One process of a distributed training job: `python process_training.py CONFIG.json RANK`.

Trains two sharded weights on a mesh over all processes, saves checkpoints, and prints what it holds
at the end as one line of JSON. Run by `test_multiprocess.py`, which also trains without processes.
"""

import functools
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jsn

DEVICES = 2
"""Virtual devices of each process."""


def main(config: dict, rank: int) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{config['port']}"
    jax.distributed.initialize(address, config["processes"], rank, initialization_timeout=120)
    assert jax.device_count() == DEVICES * config["processes"]
    print(json.dumps(train(jax.devices(), rank, **config["training"])), flush=True)


def train(devices: list, rank: int, steps: int, directory: str = "", kill: object = None) -> dict:
    """Trains on a mesh of these devices, from the last checkpoint in the directory, if any.

    `kill=[rank, step]` kills that process once it has taken that step. Returns what is held: the
    first step, the sigmas of every device that is here, and how many entries of weights are.
    """
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    everywhere = NamedSharding(mesh, P())
    places = {"in": NamedSharding(mesh, P("data")), "out": NamedSharding(mesh, P(None, "data"))}
    rules = [("", jsn.Matrix())]

    def start():
        keys = jax.random.split(jax.random.key(0))
        params = {
            name: jax.random.normal(key, (16, 16)) for name, key in zip(places, keys, strict=True)
        }
        return params, jsn.init(params, rules=rules, block_size=4, warmup=3)

    shapes = jax.eval_shape(start)
    sharding = (places, jsn.state_sharding(places, *shapes))

    def loss(params, state, index):
        params, state = jsn.normalize(params, state)
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), index), (16, 16))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
        return (jnp.tanh(x @ params["in"]) @ params["out"]).mean(), state

    @functools.partial(jax.jit, out_shardings=sharding, donate_argnums=(0, 1))
    def step(params, state, index):
        grads, state = jax.grad(loss, has_aux=True)(params, state, index)
        return jax.tree.map(lambda x, g: x - 0.5 * g, params, grads), state

    first, manager = 0, None
    if directory:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            save_interval_steps=2, max_to_keep=2, enable_async_checkpointing=False
        )
        manager = ocp.CheckpointManager(directory, options=options)
    last = None if manager is None else manager.latest_step()
    if manager is not None and last is not None:
        first = last
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            sharding,
        )
        args = ocp.args.StandardRestore({"params": target[0], "sn_state": target[1]})
        restored = manager.restore(first, args=args)
        params, state = restored["params"], restored["sn_state"]
    else:
        params, state = jax.jit(start, out_shardings=sharding)()
    for index in range(first, steps):
        params, state = step(params, state, index)
        if manager is not None:
            trees = {"params": params, "sn_state": state}
            manager.save(index + 1, args=ocp.args.StandardSave(trees))
        if [rank, index + 1] == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    sigmas = jax.jit(jsn.sigmas, out_shardings=everywhere)(params, state)
    shards = [shard.data for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    sigmas = {name: [float(s.data) for s in x.addressable_shards] for name, x in sigmas.items()}
    entries = sum(shard.size for shard in shards)
    return {"rank": rank, "first": first, "sigmas": sigmas, "entries": entries}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), int(sys.argv[2]))
