"""Plans a run on a TPU slice or a node of GPUs. The chips' own compilers give the figures; no such chip is needed.

python -m drirl_jax plan --config configs/llama31_8b.py --topology v5e:8x8
python -m drirl_jax plan --config configs/llama31_8b.py:gpus --topology h100:8

It needs the libtpu of this jax, or its CUDA plugin (the extras `plan`, `cuda`). It plans GRPO with rewards of the IRL
stage, where the prompt's category selects the reward. It compiles every jitted function that holds the model for these
chips, sharded as config.mesh says. Prompts have data.max_prompt tokens, not counting a shared prefix; responses have
their full length.

Times on a TPU are two numbers: the compiler's estimate of its fusions, and the bytes of the collectives at the rate of
all links of a chip. A step takes at least the larger of the two, and at most about their sum. A GPU's compiler gives no
times: see `compute_seconds`.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple, Sequence

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict

from drirl_jax import checks
from drirl_jax import config as config_lib
from drirl_jax.commands import cli
from drirl_jax.costs import programs
from drirl_jax.costs.run_programs import Program, RunPrograms
from drirl_jax.models import families, flash, hf
from drirl_jax.models.architecture import Config
from drirl_jax.runtime import console, sharding
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.types import InputError, PyTree

TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice, as v5e:8x8, v5p:2x2x4 or v6e:4x4, or h100:8.")
MODEL = flags.DEFINE_string(
    "model", None, "A preset of models/families.py; use it if the model of config.policy.init is not on this machine."
)
PLAN = flags.DEFINE_string("plan_json", None, "Write the figures to this file too.")


class Chip(NamedTuple):
    """A chip: its platform, bytes of memory, bfloat16 operations a second, bytes a second over all its links. Then its
    cycles a second (only if its compiler gives cycles), else the bytes a second of its memory."""

    platform: str
    memory: float
    flops: float
    links: float
    clock: float = 0.0
    bandwidth: float = 0.0


# The makers publish these (cloud.google.com/tpu/docs, nvidia.com/h100: SXM). A TPU's clock follows from its
# operations a cycle.
CHIPS = {
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 200e9, clock=1.5e9),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 600e9, clock=1.75e9),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 448e9, clock=1.75e9),
    "h100": Chip("gpu", 84929347584, 989e12, 450e9, bandwidth=3.35e12),
}
# XLA asks the GPU for these facts. Here there is no GPU, so they are given.
H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }"""


class Compiler(NamedTuple):
    """A platform's compiler: its name in jax, the package that contains it, and options."""

    name: str
    package: str
    options: dict


# XLA chooses between its own matrix products and a library's by trying them on the GPU. Here that is not possible.
COMPILERS = {
    "tpu": Compiler("tpu", "drirl_jax[plan]", {}),
    "gpu": Compiler("cuda", "drirl_jax[cuda]", {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}),
}
KERNEL_RATE = 0.5  # assumed share of a chip's peak for products whose cycles the compiler does not give


def measure(program: Program, resident: list[PyTree], chip: Chip) -> dict:
    """The figures of one program on one chip (see `table`). If it does not fit, "needs" is the compiler's message."""
    if program.mesh is not None:
        with jax.set_mesh(program.mesh):
            return measure(program._replace(mesh=None), resident, chip)
    traced, chips = program.traced(), jax.sharding.get_mesh().size
    jaxpr = programs.without_dead_code(traced.jaxpr.jaxpr)
    flops = programs.operations(jaxpr, lambda length: length or program.loop) / chips
    figures = {"name": program.name, "times": program.times, "flops": flops}
    try:
        compiler = COMPILERS[chip.platform]
        compiled = traced.lower(lowering_platforms=(compiler.name,)).compile(compiler_options=compiler.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"needs": " ".join(str(error).split())[:300]}
    memory, traffic = compiled.memory_analysis(), programs.traffic(compiled.as_text(), program.loop)
    # Not the compiled arguments: a tree takes memory even where the program does not read it.
    other_args = [arg for arg in program.args if not any(arg is tree for tree in resident)]
    argument_bytes = sum(map(sharding.bytes_per_device, [*resident, *other_args]))
    work_bytes = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    work_bytes += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if argument_bytes + work_bytes > chip.memory:
        return figures | {"needs": f"{(argument_bytes + work_bytes) / 2**30:.1f} GiB of {chip.memory / 2**30:.1f}"}
    flops_once = programs.operations(jaxpr, lambda length: 1) / chips
    kernel_flops = programs.operations(jaxpr, lambda length: length or program.loop, kernels=True) / chips
    bytes_read = program.loop * sum(map(sharding.bytes_per_device, program.args))
    return figures | {
        "memory": argument_bytes + work_bytes,
        "seconds": compute_seconds(
            chip, cycles=traffic.cycles, matmul_flops=flops, kernel_flops=kernel_flops, bytes_read=bytes_read
        ),
        "collective_bytes": traffic.collective_bytes,
        "collective_seconds": sum(traffic.collective_bytes.values()) / chip.links,
        "xla_flops_once": (compiled.cost_analysis() or {}).get("flops", 0.0),  # None on a GPU
        "flops_once": flops_once,
    }


def compute_seconds(chip: Chip, *, cycles: float, matmul_flops: float, kernel_flops: float, bytes_read: float) -> float:
    """Seconds that a program computes on a chip.

    On a TPU: the cycles of its fusions, plus the operations in kernels at KERNEL_RATE of the peak. A GPU's compiler
    gives no cycles. There it is the larger of two times: all operations at KERNEL_RATE of the peak, and the bytes read
    at the full rate of the memory. Operations inside cuDNN are not counted.

    Args:
        cycles: of a TPU's fusions.
        matmul_flops, kernel_flops: operations of matrix products outside kernels and inside them.
        bytes_read: bytes of the arguments, times the number of iterations of the program's loop.
    """
    if chip.clock:
        return cycles / chip.clock + kernel_flops / (KERNEL_RATE * chip.flops)
    return max((matmul_flops + kernel_flops) / (KERNEL_RATE * chip.flops), bytes_read / chip.bandwidth)


def find_chip(topology: str) -> Chip:
    """The entry of CHIPS that the topology begins with. Raises InputError if there is none."""
    kind = topology.partition(":")[0]
    config_lib.require(
        kind in CHIPS, f"--topology is {topology}: give one of {', '.join(CHIPS)} and a shape, as v5e:8x8."
    )
    return CHIPS[kind]


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Devices to compile for; they need not exist. Raises InputError if no compiler knows them."""
    platform, shape = find_chip(topology).platform, topology.partition(":")[2]
    try:
        if platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # otherwise it asks the driver, which is missing
        options = {"target_config": H100, "topology": f"1x1x{int(shape)}"}
        return topologies.get_topology_desc(platform="cuda", **options).devices
    except Exception as error:
        raise InputError(
            f"the compiler knows no {topology} ({' '.join(str(error).split())[:120]}): pip install "
            f"'{COMPILERS[platform].package}', and give a shape that exists, as v5e:8x8 or h100:8."
        ) from error


def plan(config: ConfigDict, shape: Config, topology: str) -> dict:
    """The figures of every program of the run on these chips.

    Raises:
        InputError: this kind of config cannot be planned, the chips are unknown, their compiler is not installed, or
            the mesh does not fit.
    """
    choices = (config.align.objective, config.reward.source, config.reward.route)
    config_lib.require(
        choices == ("grpo", "irl", "category"),
        f"plan needs align.objective, reward.source and reward.route = 'grpo', 'irl' and 'category', not {choices}.",
    )
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(config.mesh, config_lib.micro_batch_sizes(config), devices)
    with jax.set_mesh(mesh):
        run = RunPrograms(config, shape)
        figures = [measure(program, run.resident, find_chip(topology)) for program in run.scheduled()]
        resident_bytes = sum(map(sharding.bytes_per_device, run.resident))
        return {"topology": topology, "mesh": dict(mesh.shape), "resident": resident_bytes, "programs": figures}


def table(result: dict) -> str:
    """The figures of one chip as text: memory, operations, the compiler's time, the share of the peak that follows from
    it, bytes moved and their time. Then come the alignment step, and advice if something does not fit."""
    chip = find_chip(result["topology"])
    mesh = " x ".join(f"{axis} {n}" for axis, n in result["mesh"].items())
    lines = [
        f"{result['topology']}, {mesh}; trunk, train state and rewards: {result['resident'] / 2**30:.2f} GiB a chip",
        f"{'program':18}{'GiB':>8}{'TFLOP':>9}{'seconds':>9}{'of peak':>9}{'GB moved':>10}{'seconds':>9}  collectives",
    ]
    for row in result["programs"]:
        if "needs" in row:
            lines.append(f"{row['name']:18} does not fit: {row['needs']}")
            continue
        share = f"{row['flops'] / row['seconds'] / chip.flops:.0%}" if row["seconds"] and chip.clock else "-"
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(row["collective_bytes"].items()))
        lines.append(
            f"{row['name']:18}{row['memory'] / 2**30:8.2f}{row['flops'] / 1e12:9.2f}{row['seconds']:9.3f}{share:>9}"
            f"{sum(row['collective_bytes'].values()) / 1e9:10.2f}{row['collective_seconds']:9.3f}  {kinds}"
        )
    if any("needs" in row for row in result["programs"]):
        lines.append("Does not fit: raise config.mesh.fsdp, align.accumulate or align.minibatches, lower align.batch, "
                     "sampler.max_new or data.max_prompt, or take a larger slice.")  # fmt: skip
        return "\n".join(lines)
    step = [row for row in result["programs"] if row["times"]]
    computing, communicating = (
        sum(row["times"] * row[key] for row in step) for key in ("seconds", "collective_seconds")
    )
    slowest = max(step, key=lambda row: row["times"] * max(row["seconds"], row["collective_seconds"]))
    bottleneck = "its collectives" if slowest["collective_seconds"] > slowest["seconds"] else "its computation"
    fullest = max(result["programs"], key=lambda row: row["memory"])
    upper_bound = f"to {computing + communicating:.2f} s" if chip.clock else "s at least"
    lines.append(
        f"A step: {max(computing, communicating):.2f} {upper_bound}, most of it {slowest['name']} by {bottleneck}; "
        f"fullest in {fullest['name']}, {fullest['memory'] / chip.memory:.0%} of a chip's memory."
    )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Makes the plan that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, cli.CONFIG, TOPOLOGY)
    config = cli.CONFIG.value
    checks.validate(config)
    if MODEL.value:
        preset_list = ", ".join(families.PRESETS)
        config_lib.require(MODEL.value in families.PRESETS, f"--model is {MODEL.value}: choose one of {preset_list}.")
        shape = families.PRESETS[MODEL.value]
    else:
        shape = families.config_from_hf(hf.read_config(hf.resolve(config.policy.init)))
    shape = shape._replace(**{name: config.policy[name] for name in ("dtype", "weights", "attention")})
    flash.check_attention(shape, find_chip(TOPOLOGY.value).platform)
    result = plan(config, shape, TOPOLOGY.value)
    console.print_result(table(result), **result)
    if PLAN.value:
        replace_file(expand_path(PLAN.value), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_command(main, resumes=False)
