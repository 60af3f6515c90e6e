"""What XLA makes of the sampler and of an update on eight emulated devices, as JSON: run by sharding_test.py.

python tests/eight_devices.py DATA,FSDP,TENSOR ...
"""

import json
import os
import sys
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from drirl_jax import losses, optimizer, rollout, sharding
from drirl_jax.config import default
from drirl_jax.models.transformer import Config, Transformer
from drirl_jax.stages import objectives
from drirl_jax.stages.base import POLICIES
from drirl_jax.types import Group, length_mask

SHAPE = Config(vocab=4096, width=256, layers=4, heads=8, kv_heads=8, head_dim=32, ffn=768)
P, G, S, T = 16, 8, 64, 64


def placed(tree):
    """Shapes of the tree, on the mesh by their paths."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, where)),
        tree,
        sharding.specs(tree),
    )


def dealt(shape, dtype=jnp.int32):
    where = NamedSharding(jax.sharding.get_mesh(), sharding.spec(shape, ("prompts",)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def told(compiled, state=None):
    """Bytes a device for what the function keeps while it runs, and which parts of its first result lie elsewhere than
    the table says, and which are cut."""
    out = {"bytes": compiled.memory_analysis().temp_size_in_bytes}
    if state is not None:
        wanted, got = jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(compiled.output_shardings[0])
        found = [(jax.tree_util.keystr(path), x, s) for (path, x), s in zip(wanted, got, strict=True)]
        out["elsewhere"] = [path for path, x, s in found if not s.is_equivalent_to(x.sharding, x.ndim)]
        out["cut"] = [path for path, _, s in found if not s.is_fully_replicated]
    return out


def sampler(model):
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (P, G)))
    options = dict(max_new=T, temperature=1.0, eos=(1,), compact=(1 / 2,))
    sample = rollout.sample.lower(model, dealt((P, S)), dealt((P,)), keys, **options)
    return told(sample.compile())


def update(model, tune):
    config, policy = default(), POLICIES[tune]
    transformation = optimizer.make(config.align.optimizer, 10)

    def init(model):
        params = policy.init(config.policy, model, jax.random.key(0))
        return optimizer.init(transformation, objectives.init(objectives.OBJECTIVES["grpo"], params, model))

    def weights(length_PG):
        return losses.token_weights("sequence", length_mask(length_PG, T), G)

    train = placed(jax.eval_shape(init, model))
    group = Group(dealt((P, S)), dealt((P,)), dealt((P, G, T)), dealt((P, G)), dealt((P,)))
    per_token = dealt((P, G, T), jnp.float32)
    batch = objectives.Batch(
        group,
        dealt((P, G, 1), jnp.float32),
        per_token,
        per_token,
        jax.tree.map(lambda x: dealt(x.shape, x.dtype), jax.eval_shape(weights, group.response_len)),
    )

    def updated(train, model, batch):
        loss = partial(objectives.grpo_loss, model, policy, config)
        return optimizer.step(transformation, loss, train, batch, 1)

    return told(jax.jit(updated, donate_argnums=0).lower(train, model, batch).compile(), train)


def main(meshes):
    out = {}
    for mesh in meshes:
        shape = [int(n) for n in mesh.split(",")]
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        with jax.set_mesh(jax.sharding.Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)):
            model = placed(jax.eval_shape(lambda: Transformer(SHAPE, jax.random.key(0))))
            out[mesh] = {"sample": sampler(model)} | {tune: update(model, tune) for tune in POLICIES}
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
