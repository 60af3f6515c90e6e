"""Costs by hand, the programs of a run traced, and, with libtpu, a plan by the TPU compiler."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import commands
from jax.experimental import pallas as pl

from configs import quickstart
from drirl_jax.commands import plan
from drirl_jax.costs import programs, roofline
from drirl_jax.costs.run_programs import RunPrograms
from drirl_jax.models import families
from drirl_jax.runtime import sharding

SHAPE = families.PRESETS["smollm2-135m"]


def count(function, *shapes, trips=lambda length: length or 7):
    jaxpr = jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr.jaxpr
    return programs.operations(programs.without_dead_code(jaxpr), trips)


def test_operations_by_hand():
    one = 2 * 3 * 4 * 4  # [3, 4] @ [4, 4]
    assert count(lambda x, w: x @ w, (3, 4), (4, 4)) == one

    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    def looped(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    def chosen(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(scanned, (3, 4), (4, 4)) == 5 * one and count(looped, (3, 4), (4, 4)) == 7 * one
    assert count(scanned, (3, 4), (4, 4), trips=lambda length: 1) == one
    assert count(chosen, (3, 4), (4, 4)) == 2 * one
    # Forward and the gradient of the input; that of the weights is needed by nobody.
    assert count(jax.grad(lambda x, w: (x @ w).sum()), (3, 4), (4, 4)) == one
    # Recomputed in the backward pass: three products.
    again = jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)
    assert count(jax.grad(lambda x, w: again(x, w).sum()), (3, 4), (4, 4)) == 3 * one


def test_what_is_written_for_one_device_counts_for_all():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    cut = jax.sharding.PartitionSpec(("data", "fsdp"))

    def product(x, w):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(cut, None), out_specs=cut)(x, w)

    with jax.set_mesh(None):  # a run in another file leaves its own
        assert count(product, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


def test_kernels_are_counted_apart():
    def double(x, o):
        o[...] = x[...] @ jnp.ones((4, 4))

    block = pl.BlockSpec((3, 4), lambda i: (i, 0))

    def kernel(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(double, grid=(5,), in_specs=[block], out_specs=block, out_shape=shape)(x)

    jaxpr = jax.jit(lambda x, w: kernel(x) @ w).trace(jnp.ones((15, 4)), jnp.ones((4, 4))).jaxpr.jaxpr
    every = 2 * 15 * 4 * 4  # of the product outside, and of the kernel's five blocks
    assert programs.operations(jaxpr, lambda n: n) == programs.operations(jaxpr, lambda n: n, kernels=True) == every


HLO = """HloModule jit_f

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]) parameter(0)
  %a = bf16[2,4]{1,0} fusion(%p), kind=kLoop, calls=%inside, backend_config={"window_config":{"estimated_cycles":"100"}}
  %g = bf16[8,4]{1,0} all-gather(%a), dimensions={0}
  %s = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%a), dimensions={0}
  %d = bf16[8,4]{1,0} all-gather-done(%s)
  %e = bf16[2,4]{1,0} fusion(%d), kind=kCustom, calls=%part.1
  %f = bf16[2,4]{1,0} fusion(%e), kind=kCustom, calls=%part.2
  %k = bf16[2,4]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 4
}}
  ROOT %t = (s32[], bf16[8,4]) tuple(%p, %g)
}

%part.1 (p: bf16[2,4]) -> bf16[2,4] {
  %h = bf16[16,4]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%part.2 (p: bf16[2,4]) -> bf16[2,4] {
  %h = bf16[16,4]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%unknown (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]) parameter(0)
  ROOT %c = pred[] custom(%p)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %r = f32[] all-reduce(%x), to_apply=%add
  %w = (s32[], bf16[8,4]) while(%x), condition=%condition, body=%body
  %v = (s32[], bf16[8,4]) while(%w), condition=%unknown, body=%body
  ROOT %o = bf16[8,4] fusion(%v), calls=%inside, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_loops_of_a_compiled_program_count_as_often_as_they_run():
    told = programs.traffic(HLO, trips=3)
    assert told.cycles == 7 + (5 + 3) * 100
    # Each run of the body gathers [8, 4] of two bytes twice, and [16, 4] once, in two fusions.
    assert told.collective_bytes == {"all-reduce": 4.0, "all-gather": (5 + 3) * (2 * 64.0 + 128.0)}


@pytest.fixture(scope="module")
def traced():
    """By name, operations of the programs of the quickstart on one device; its config."""
    config = quickstart.get_config()
    with jax.set_mesh(sharding.make_mesh(config.mesh, [4], jax.devices())):
        run = RunPrograms(config, SHAPE)
        found = {
            p.name: programs.operations(programs.without_dead_code(p.traced().jaxpr.jaxpr), lambda n: n or p.loop)
            for p in run.scheduled()
        }
        return found, config, [sharding.bytes_per_device(tree) for tree in run.resident]


def test_the_programs_are_those_of_the_run_and_cost_what_their_shapes_say(traced):
    found, config, resident = traced
    assert list(found) == [
        "merge", "sample", "trunk", "rewards", "reference", "update", "irl update", "irl sample", "evals sample"
    ]  # fmt: skip
    assert resident[0] == 4 * 134_515_008  # the trunk
    with jax.set_mesh(sharding.make_mesh(config.mesh, [4], jax.devices())):
        trunk, *others = RunPrograms(config, SHAPE._replace(weights="bfloat16")).resident
        assert [sharding.bytes_per_device(tree) for tree in (trunk, *others)] == [resident[0] / 2, *resident[1:]]
    shape = roofline.Shape(config.align.batch, config.data.max_prompt, config.align.group_size, config.sampler.max_new)
    forward = roofline.forward_flops(SHAPE, shape)
    bottom = roofline.forward_flops(SHAPE._replace(layers=20), shape._replace(G=shape.G + 2), logits=False)
    top = roofline.forward_flops(SHAPE._replace(layers=10), shape)
    # The bench counts no padding, no masked half of a score and no last token of a response.
    assert bottom < found["trunk"] < 1.15 * bottom and top < found["reference"] < 1.15 * top
    assert forward < found["sample"] < 1.15 * forward


@pytest.mark.slow
def test_the_tpu_compiler_plans_the_quickstart():
    pytest.importorskip("libtpu")
    config = quickstart.get_config()
    config.policy.dtype = "bfloat16"
    result = plan.plan(config, SHAPE._replace(dtype="bfloat16"), "v5e:2x2")
    assert result["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    for row in result["programs"]:
        assert 0 < row["seconds"] and result["resident"] < row["memory"] < 16 * 2**30
        if row["name"] in ("trunk", "rewards", "reference", "update", "irl update"):
            # XLA counts what is elementwise too.
            assert row["flops_once"] <= row["xla_flops_once"] < 1.05 * row["flops_once"]
    assert "A step: " in plan.table(result)


@pytest.mark.slow
def test_xla_plans_two_gpus_with_cudnns_attention(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="pip install 'drirl_jax[cuda]'")
    flags = ["--config=configs/quickstart.py", "--topology=h100:2", "--model=smollm2-135m", "--config.mesh.fsdp=2"]
    flags += ["--config.policy.dtype=bfloat16", "--config.policy.attention=cudnn", f"--plan_json={tmp_path / 'plan'}"]
    subprocess.run(
        [sys.executable, "-m", "drirl_jax.commands.plan", *flags], check=True
    )  # before this process's jax began
    result = json.loads((tmp_path / "plan").read_text())
    assert [row["name"] for row in result["programs"] if "needs" in row] == []
    update = next(row for row in result["programs"] if row["name"] == "update")
    assert result["resident"] < update["memory"] < 8 * 2**30 and update["collective_bytes"]["all-gather"] > 0


def test_a_gpus_seconds_are_its_products_or_what_it_reads():
    chip = plan.CHIPS["h100"]
    seconds = functools.partial(plan.compute_seconds, chip, cycles=0)
    work = {"matmul_flops": 2 * chip.flops, "kernel_flops": chip.flops}
    assert seconds(**work, bytes_read=chip.bandwidth) == 3 / plan.KERNEL_RATE
    assert seconds(matmul_flops=0.1 * chip.flops, kernel_flops=0, bytes_read=2 * chip.bandwidth) == 2
    chip = plan.CHIPS["v5e"]
    work = {"cycles": chip.clock, "matmul_flops": 9e99, "kernel_flops": chip.flops, "bytes_read": 9e99}
    assert plan.compute_seconds(chip, **work) == 1 + 1 / plan.KERNEL_RATE


def test_what_does_not_fit_is_said_with_what_to_change():
    row = {"name": "update", "times": 1, "flops": 1.0, "needs": "Used 20G of 16G hbm."}
    text = plan.table({"topology": "v5e:2x2", "mesh": {"fsdp": 4}, "resident": 1.0, "programs": [row]})
    assert "update             does not fit: Used 20G" in text and "raise config.mesh.fsdp" in text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v9:2x2", "--model=smollm2-135m"], "--topology is v9:2x2: give one of v5e, v5p, v6e, h100"),
        (["--topology=v5e:2x2", "--model=other"], "--model is other: choose one of llama2-7b"),
        (["--model=smollm2-135m"], "--topology is missing"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, message):
    commands.refused(message, plan, "--config=configs/quickstart.py", *flags)
