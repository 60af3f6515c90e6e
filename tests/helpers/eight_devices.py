"""The sampler and an update on eight emulated devices, told as JSON: run by sharding_test.py.

python tests/helpers/eight_devices.py DATA,FSDP,TENSOR ...
"""

import json
import os
import sys

# On few cores XLA's threads, one a core, would wait for each other in collectives without end.
os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "64"}

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import rollout
from drirl_jax.config import default
from drirl_jax.costs.run_programs import Program, RunPrograms
from drirl_jax.models import lora, transformer, vocabulary
from drirl_jax.models.transformer import Config, Transformer
from drirl_jax.runtime import sharding
from drirl_jax.stages.base import POLICIES
from drirl_jax.types import Group

SHAPE = Config(vocab=4096, width=256, layers=4, heads=8, kv_heads=8, head_dim=32, ffn=768)


def programs(tune: str) -> dict[str, Program]:
    """By name, those of a step of 16 prompts x 8 responses, 64 + 64 tokens."""
    config = default()
    config.update({"policy": {"tune": tune}, "align": {"batch": 16}, "data": {"max_prompt": 64}})
    return {program.name: program for program in RunPrograms(config, SHAPE).scheduled()}


def told(program: Program) -> dict:
    """Bytes a device for what it keeps while it runs."""
    return {"bytes": program.traced().lower().compile().memory_analysis().temp_size_in_bytes}


def update(program: Program) -> dict:
    """The same, and which parts of the new state lie elsewhere than the old one's, and which are cut."""
    compiled = program.traced().lower().compile()
    wanted = jax.tree_util.tree_flatten_with_path(program.args[0])[0]
    got = jax.tree.leaves(compiled.output_shardings[0])
    found = [(jax.tree_util.keystr(path), x, s) for (path, x), s in zip(wanted, got, strict=True)]
    return {
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
        "elsewhere": [path for path, x, s in found if not s.is_equivalent_to(x.sharding, x.ndim)],
        "cut": [path for path, _, s in found if not s.is_fully_replicated],
    }


def responses(compact: tuple[float, ...]) -> list:
    """What a small model says, its rows ending one after the other."""
    model = sharding.place(Transformer(SHAPE._replace(vocab=64, width=32, layers=1, ffn=48), jax.random.key(0)))
    prompt = sharding.shard_prompts(
        np.tile(np.arange(8, dtype=np.int32), (8, 1)) + np.arange(8, dtype=np.int32)[:, None]
    )
    keys = rollout.response_keys(jax.random.key(1), jnp.arange(8), 8)
    length = sharding.shard_prompts(np.full(8, 8, np.int32))
    out = rollout.sample(model, prompt, length, keys, max_new=48, temperature=1.0, eos=(3, 40), compact=compact)
    return [np.asarray(x).tolist() for x in out[:3]]


def differing() -> float:
    """The largest difference that weights in bfloat16 make to a gradient of adapters, for those in float32 of the same
    numbers."""
    config = SHAPE._replace(vocab=64, width=32, layers=2, ffn=48, dtype="bfloat16", weights="bfloat16")
    half = sharding.place(Transformer(config, jax.random.key(0)))
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(half, jax.random.key(1), rank=4, alpha=4))
    ids = np.random.default_rng(0).integers(0, 64, (8, 4, 12)).astype(np.int32)
    lengths = np.full(8, 12, np.int32), np.full((8, 4), 12, np.int32)
    batch = Group(*map(sharding.shard_prompts, (ids[:, 0], lengths[0], ids, lengths[1], lengths[0])))

    @jax.jit
    def slope(adapter, model):
        def total(adapter):
            hidden = transformer.apply(model, batch, adapter)
            return vocabulary.token_logprobs(model, hidden, batch, 1.0)[0].sum()

        return jax.grad(total)(adapter)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    got, want = (jax.tree.leaves(slope(sharding.place(adapter), model)) for model in (half, wide))
    assert all(x.dtype == jnp.float32 and np.abs(x).max() > 0 for x in got)
    return max(float(np.abs(a - b).max()) for a, b in zip(got, want))


def main(meshes: list[str]) -> None:
    out = {}
    for mesh in meshes:
        sizes = dict(zip(sharding.AXES, map(int, mesh.split(","))))
        with jax.set_mesh(sharding.make_mesh(ConfigDict(sizes), [16], jax.devices())):
            of = {tune: programs(tune) for tune in POLICIES}
            out[mesh] = {"sample": told(of["full"]["sample"])} | {tune: update(of[tune]["update"]) for tune in of}
            out[mesh]["responses"] = responses(rollout.COMPACT)
            if mesh == meshes[0]:
                out[mesh]["uncompacted"] = responses(())
            if mesh == meshes[-1]:
                out[mesh]["differing"] = differing()
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
