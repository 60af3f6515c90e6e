"""What lies where: by path, on meshes that fit, and in what XLA compiles for eight devices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from drirl_jax.models import lora, reward
from drirl_jax.models.transformer import Config, Transformer
from drirl_jax.runtime import sharding
from drirl_jax.stages import optimizer
from drirl_jax.types import InputError, TrainState

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=24, tied=False)


def axes(tree):
    """By path, the logical axes that are told for each array."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path).replace(".value", ""): sharding.logical_axes(path, x.ndim) for path, x in found}


def test_each_matrix_is_found_by_its_path_in_any_tree():
    model = jax.eval_shape(lambda: Transformer(SHAPE, jax.random.key(0)))
    found = axes(model)
    assert found[".embed"] == found[".head"] == ("vocab", "width")
    assert found[".blocks.q"] == found[".blocks.k"] == found[".blocks.v"] == (None, "heads", "width")
    assert found[".blocks.o"] == (None, "width", "heads")
    assert found[".blocks.gate"] == found[".blocks.up"] == (None, "ffn", "width")
    assert found[".blocks.down"] == (None, "width", "ffn")
    assert found[".norm"] == found[".blocks.attn_norm"] == ()

    rewards = jax.eval_shape(lambda m: reward.init_lora(m, jax.random.key(0), 3, rank=2, alpha=4), model)
    found = axes(TrainState(rewards, *[None] * 4))
    assert found[".params.adapter['q'].a"] == (None, "categories", None, "width")
    assert found[".params.adapter['q'].b"] == (None, "categories", None, "heads")
    assert found[".params.adapter['down'].a"] == (None, "categories", None, "ffn")
    assert found[".params.adapter['down'].b"] == (None, "categories", None, "width")
    assert found[".params.heads"] == ("categories", "width") and found[".params.bias"] == ()

    full = axes(jax.eval_shape(lambda m: reward.init_full(m, jax.random.key(0), 3), model))
    assert full[".models.blocks.o"] == ("categories", None, "width", "heads")
    assert full[".models.head"] == ("categories", "vocab", "width") and full[".heads"] == ("categories", "width")

    single = jax.eval_shape(lambda m: lora.init(m, jax.random.key(0), rank=2, alpha=4), model)
    assert axes(single)["['o'].a"] == (None, None, "heads") and axes(single)["['o'].b"] == (None, None, "width")


def test_what_an_optimiser_keeps_lies_as_its_parameter():
    model = jax.eval_shape(lambda: Transformer(SHAPE, jax.random.key(0)))
    section = ConfigDict(
        {"name": "adamw", "learning_rate": 1.0, "warmup": 1, "schedule": "constant", "b1": 0.9, "b2": 0.9}
        | {"weight_decay": 0.0, "clip_norm": 1.0, "average": 0.5}
    )
    state = jax.eval_shape(lambda m: optimizer.init(optimizer.make(section, 4), m), model)
    of = {path: found for path, found in axes(state).items() if path.endswith(".blocks.down")}
    assert len(of) == 4  # the parameter, both moments, the average
    assert set(of.values()) == {(None, "width", "ffn")}


class Device:
    """Enough of a device to stand in a mesh."""

    platform, device_kind, process_index = "cpu", "fake", 0

    def __init__(self, number):
        self.id = number


def section(data=0, fsdp=1, tensor=1):
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    "asked, prompts, devices, wanted",
    [
        (section(), [16, 8], 8, (8, 1, 1)),
        (section(), [16, 4], 8, (4, 1, 1)),  # four prompts cannot be dealt out to eight
        (section(), [5], 8, (5, 1, 1)),
        (section(fsdp=4), [16, 8], 8, (2, 4, 1)),
        (section(tensor=8), [3], 8, (1, 1, 8)),
        (section(data=2, fsdp=2, tensor=2), [16], 8, (2, 2, 2)),
        (section(data=1), [16], 8, (1, 1, 1)),
        (section(), [16], 1, (1, 1, 1)),
    ],
)
def test_the_mesh_takes_what_can_share_the_prompts(asked, prompts, devices, wanted):
    mesh = sharding.make_mesh(asked, prompts, jax.devices() * devices)
    assert tuple(mesh.shape.values()) == wanted and mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    "asked, prompts, message",
    [
        (section(data=16), [16], "asks for 16 x 1 x 1 devices and there are 8"),
        (section(fsdp=3, tensor=3), [9], "asks for 1 x 3 x 3 devices and there are 8"),
        (section(data=2, fsdp=4), [16, 4], "deals prompts out to 8 .* does not divide the 4"),
        (section(fsdp=8), [4], "deals prompts out to 8 .* does not divide the 4"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(asked, prompts, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(asked, prompts, jax.devices() * 8)


def test_the_mesh_for_sampling_is_of_the_same_devices():
    mesh = sharding.make_mesh(section(fsdp=8), [16], jax.devices() * 8)
    assert sharding.sampling_mesh(section(tensor=0), 16, mesh) is None
    assert tuple(sharding.sampling_mesh(section(tensor=2), 16, mesh).shape.values()) == (4, 1, 2)
    for asked, prompts in ((section(tensor=2), 3), (section(data=2, tensor=2), 16)):
        with pytest.raises(InputError, match="config.sampler.mesh is of . devices, config.mesh of 8"):
            sharding.sampling_mesh(asked, prompts, mesh)


# By how much less memory a device takes: the residual streams lie whole along the tensor axis, weights along data.
LESS = {"1,8,1": 6, "1,1,8": 2.5, "2,2,2": 4}


@pytest.fixture(scope="module")
def compiled():
    """By mesh and function, what `eight_devices` tells."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "eight_devices.py"), "1,1,1", *LESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_memory_of_what_runs_falls_with_the_devices(compiled):
    alone, told = compiled["1,1,1"], compiled
    for mesh, factor in LESS.items():
        for function in ("sample", "lora", "full"):
            assert told[mesh][function]["bytes"] < alone[function]["bytes"] / factor, (mesh, function)


@pytest.mark.parametrize("tune, cut", [("lora", 7 * 3), ("full", 8 * 3)])
def test_an_update_returns_parameters_and_moments_where_the_table_says(compiled, tune, cut):
    for mesh in LESS:
        # Of each matrix, or of one half of a pair at least, the parameter and both moments.
        assert not compiled[mesh][tune]["elsewhere"] and len(compiled[mesh][tune]["cut"]) >= cut, mesh


def test_weights_in_bfloat16_give_the_bits_of_float32_ones(compiled):
    assert compiled["2,2,2"]["differing"] == 0


def test_rows_that_have_ended_are_dropped_on_each_device_without_a_change(compiled):
    said, lengths, _ = compiled["1,1,1"]["uncompacted"]
    # Rows end one after the other, so that each share of the batch is passed, and some last to the end.
    flat = sorted(length for of_prompt in lengths for length in of_prompt)
    assert flat[0] < 8 and flat[16] < flat[32] < flat[48] and flat[-1] == 48
    for mesh in ("1,1,1", *LESS):
        assert compiled[mesh]["responses"] == compiled["1,1,1"]["uncompacted"], mesh
