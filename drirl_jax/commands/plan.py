"""What a run would take on a TPU slice or a node of GPUs, told by their own compilers, which need no such chip.

python -m drirl_jax plan --config configs/llama31_8b.py --topology v5e:8x8
python -m drirl_jax plan --config configs/llama31_8b.py:gpus --topology h100:8

Needs the libtpu of this jax, or its CUDA plugin (the extras `plan`, `cuda`). For GRPO with rewards of the IRL stage,
one by the prompt's category: every jitted function that holds the model is compiled for the chips as config.mesh lays
it out, with prompts of data.max_prompt tokens of their own (a prefix that they share is not counted) and responses of
their full length. Times on a TPU are the compiler's estimate of its fusions and, apart, the bytes of the collectives at
the rate of all of a chip's links: a step takes at least the larger and at most about the sum. Of a GPU's time its
compiler tells nothing: see `seconds_of`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict

from drirl_jax import checks, rollout
from drirl_jax import config as config_lib
from drirl_jax import main as command
from drirl_jax.costs import programs
from drirl_jax.models import families, flash, hf, reward
from drirl_jax.models.architecture import Config
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import console, sharding
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.stages import align, irl, objectives, optimizer
from drirl_jax.stages.base import POLICIES, Context, reshard
from drirl_jax.types import Group, InputError, PyTree

TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice, as v5e:8x8, v5p:2x2x4 or v6e:4x4, or h100:8.")
MODEL = flags.DEFINE_string("model", None, "A preset of models/families.py, where config.policy.init is not at hand.")
PLAN = flags.DEFINE_string("plan_json", None, "Write the figures to this file too.")


class Chip(NamedTuple):
    """A chip: its platform, bytes of memory, bfloat16 operations a second, bytes a second over all its links, cycles a
    second where the compiler tells cycles, bytes a second of its memory where it does not."""

    platform: str
    memory: float
    flops: float
    links: float
    clock: float = 0.0
    bandwidth: float = 0.0


# As their makers publish them (cloud.google.com/tpu/docs, nvidia.com/h100: SXM); a TPU's clock follows from the
# operations a cycle.
CHIPS = {
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 200e9, clock=1.5e9),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 600e9, clock=1.75e9),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 448e9, clock=1.75e9),
    "h100": Chip("gpu", 84929347584, 989e12, 450e9, bandwidth=3.35e12),
}
# What XLA asks a GPU for, and is told here as there is none.
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
    """A platform's compiler: its name in jax, the package that has it, and options."""

    name: str
    package: str
    options: dict


# Without a GPU nothing can be tried out, which is how XLA chooses among its own products and the libraries' ones.
COMPILERS = {
    "tpu": Compiler("tpu", "drirl_jax[plan]", {}),
    "gpu": Compiler("cuda", "drirl_jax[cuda]", {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}),
}
KERNEL_RATE = 0.5  # of a chip's peak, assumed of products whose cycles the compiler does not tell


class Program(NamedTuple):
    """A jitted function of the run.

    Attributes:
        name: what it does.
        times: how often it runs in a step of the alignment; 0 for the other stages.
        traced: () -> what `jax.jit(f).trace(*args)` gives.
        args: its arguments, shapes with their places.
        loop: how often its while loops run, if it has any.
        mesh: the one it runs on, if not the one that is set.
    """

    name: str
    times: int
    traced: Callable
    args: tuple
    loop: int = 1
    mesh: jax.sharding.Mesh | None = None


def dealt(tree: PyTree) -> PyTree:
    """The same of a batch: by its first axis, the prompts."""
    return sharding.sharded_shapes(tree, lambda path, x: ("prompts",))


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    """A batch's array of whole numbers."""
    return dealt(jax.ShapeDtypeStruct(shape, jnp.int32))


def group(P: int, S: int, G: int, T: int) -> Group:
    """The shapes of a group."""
    return Group(ids(P, S), ids(P), ids(P, G, T), ids(P, G), ids(P))


def run_programs(config: ConfigDict, shape: Config) -> tuple[list[PyTree], Iterator[Program]]:
    """What lies on the devices all the time (trunk, train state, reward bank), and the functions; on the mesh that is
    set."""
    c, T, S = config.align, config.sampler.max_new, config.data.max_prompt
    # Nothing here may run: the mesh is of devices that are not there.
    model = sharding.sharded_shapes(jax.eval_shape(lambda: Transformer(shape, jax.random.key(0))))
    context = Context(config, model, None, None, {})
    policy, objective, roles = POLICIES[config.policy.tune], objectives.OBJECTIVES[c.objective], objectives.ROLES
    transformation = align.make_transformation(config)

    def init(model):
        params = policy.init(config.policy, model, jax.random.key(0))
        return optimizer.init(transformation, objectives.init_params(objective, params, model))

    def init_rewards(model):
        return irl.init_rewards(dataclasses.replace(context, model=model))

    train = sharding.sharded_shapes(jax.eval_shape(init, model))
    rewards = sharding.sharded_shapes(jax.eval_shape(init_rewards, model))
    statistics = sharding.sharded_shapes(jax.eval_shape(lambda: jnp.zeros(rewards.bias.shape)))
    bank = reward.Bank(rewards, statistics, statistics)

    sampling = sharding.sampling_mesh(config.sampler.mesh, c.batch, jax.sharding.get_mesh())

    def sample(name, times, model, P, G, T, temperature) -> Iterator[Program]:
        if sampling:
            held = (model,)
            yield Program(f"{name}: move", times, lambda: reshard.trace(*held), held, mesh=sampling)
            model = jax.eval_shape(reshard, model)
        with jax.set_mesh(sampling or jax.sharding.get_mesh()):
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (P, G)))
            options = dict(max_new=T, temperature=temperature, eos=(0,), compact=())  # no row ends before the others
            args = (sharding.sharded_shapes(model), ids(P, S), ids(P), keys)
        yield Program(name, times, lambda: rollout.sample.trace(*args, **options), args, T, sampling)

    def aligned() -> Iterator[Program]:
        merged = model
        if config.policy.tune == "lora":
            args = (model, train.params.policy)
            merged = sharding.sharded_shapes(jax.eval_shape(policy.merged, *args))
            yield Program("merge", 1, lambda: policy.merged.trace(*args), args)
        P, G, shared = c.batch, c.group, context.shared
        yield from sample("sample", 1, merged, P, G, T, config.sampler.temperature)
        whole = group(P, S, G + 1 + roles[config.grpo.contrast].counts, T)
        begun = None
        if shared.layers:
            yield Program("trunk", 1, lambda: align.run_trunk.trace(model, whole, layers=shared.layers), (model, whole))
            begun = dealt(jax.eval_shape(lambda m, g: align.run_trunk(m, g, layers=shared.layers), model, whole))
        args = (model, bank, whole, begun if shared.rewards else None)
        yield Program("rewards", 1, lambda: jax.jit(reward.score).trace(*args), args)

        def scored(model, params, group, begun, logp, value, alpha):
            kept, answered = jnp.ones(alpha.shape, bool), np.zeros(P, bool)
            found = objectives.ScoredGroup(group, logp, value, alpha, kept, begun, shared.policy, answered)
            return objective.batch(dataclasses.replace(context, model=model), model, params, found)[0]

        def floats(*shape):
            return dealt(jax.ShapeDtypeStruct(shape, jnp.float32))

        members = whole.response.shape[1]
        batch = jax.eval_shape(
            scored, model, train.params, whole, begun, floats(P, G, T), floats(P, members), floats(P, G)
        )
        if config.grpo.beta_kl > 0:
            sampled = (model, group(P, S, G, T), config.sampler.temperature, begun and dealt(_first(begun, G)))
            yield Program("reference", 1, lambda: objectives.logprobs.trace(*sampled), sampled)
        updated = (train, model, dealt(batch))
        yield Program("update", c.epochs, lambda: align.make_update(config, transformation).trace(*updated), updated)

    def learned() -> Iterator[Program]:
        K, P = len(irl.negative_weights(config.irl)), config.irl.batch
        pairs = irl.Pairs(group(P, S, 1 + K, T), ids(P, K), ids(P, K), ids(P, K))
        optimiser = optimizer.make(config.irl.optimizer, config.irl.steps)
        state = sharding.sharded_shapes(jax.eval_shape(lambda m: optimizer.init(optimiser, init_rewards(m)), model))
        args = (state, model, pairs)
        yield Program("irl update", 0, lambda: irl.make_update(config, optimiser).trace(*args), args)
        P = sharding.round_up_prompts(max(1, config.evals.batch // config.irl.samples))
        yield from sample("irl sample", 0, model, P, config.irl.samples, T, config.sampler.temperature)

    def every() -> Iterator[Program]:
        yield from aligned()
        if "irl" in config.schedule:
            yield from learned()
        if "evals" in config.schedule:
            e = config.evals
            yield from sample("evals sample", 0, model, sharding.round_up_prompts(e.batch), 1, e.max_new, e.temperature)

    return [model, train, bank], every()


def _first(begun, members: int):
    return jax.eval_shape(lambda b: b.members(slice(members)), begun)


def measure(program: Program, resident: list[PyTree], chip: Chip) -> dict:
    """The figures of one program, a chip: see `table`. Where it does not fit, "needs" is the compiler's sentence."""
    if program.mesh is not None:
        with jax.set_mesh(program.mesh):
            return measure(program._replace(mesh=None), resident, chip)
    traced, chips = program.traced(), jax.sharding.get_mesh().size
    jaxpr = programs.used(traced.jaxpr.jaxpr)
    logical = programs.operations(jaxpr, lambda length: length or program.loop) / chips
    told = {"name": program.name, "times": program.times, "flops": logical}
    try:
        compiler = COMPILERS[chip.platform]
        compiled = traced.lower(lowering_platforms=(compiler.name,)).compile(compiler_options=compiler.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return told | {"needs": " ".join(str(error).split())[:300]}
    memory, traffic = compiled.memory_analysis(), programs.traffic(compiled.as_text(), program.loop)
    # Not the compiled arguments: what a program does not read of a tree lies there all the same.
    apart = [arg for arg in program.args if not any(arg is tree for tree in resident)]
    held = sum(map(sharding.bytes_per_device, [*resident, *apart]))
    works = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    works += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if held + works > chip.memory:
        return told | {"needs": f"{(held + works) / 2**30:.1f} GiB of {chip.memory / 2**30:.1f}"}
    once = programs.operations(jaxpr, lambda length: 1) / chips
    kernels = programs.operations(jaxpr, lambda length: length or program.loop, kernels=True) / chips
    read = program.loop * sum(map(sharding.bytes_per_device, program.args))
    return told | {
        "memory": held + works,
        "seconds": seconds_of(chip, traffic.cycles, logical, kernels, read),
        "moved": traffic.moved,
        "moving": sum(traffic.moved.values()) / chip.links,
        "xla_flops_once": (compiled.cost_analysis() or {}).get("flops", 0.0),  # None of a GPU
        "flops_once": once,
    }


def seconds_of(chip: Chip, cycles: float, products: float, kernels: float, read: float) -> float:
    """How long a program computes on a chip.

    On a TPU: the cycles of its fusions, and the operations in kernels at KERNEL_RATE of the peak. On a GPU, whose
    compiler tells no cycles: all operations at KERNEL_RATE of the peak, or what it reads at the full rate of the
    memory where that takes longer; operations inside of cuDNN are not among them.

    Args:
        cycles: of a TPU's fusions.
        products, kernels: operations of matrix products outside of kernels and in them.
        read: bytes of the arguments, once for every turn of the program's loop.
    """
    if chip.clock:
        return cycles / chip.clock + kernels / (KERNEL_RATE * chip.flops)
    return max((products + kernels) / (KERNEL_RATE * chip.flops), read / chip.bandwidth)


def chip_of(topology: str) -> Chip:
    """The row of CHIPS that a topology begins with. Raises InputError where there is none."""
    kind = topology.partition(":")[0]
    config_lib.require(
        kind in CHIPS, f"--topology is {topology}: give one of {', '.join(CHIPS)} and a shape, as v5e:8x8."
    )
    return CHIPS[kind]


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Chips that are not there, to compile for. Raises InputError where no compiler knows them."""
    platform, shape = chip_of(topology).platform, topology.partition(":")[2]
    try:
        if platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would ask the driver, which is not there
        asked = {"target_config": H100, "topology": f"1x1x{int(shape)}"}
        return topologies.get_topology_desc(platform="cuda", **asked).devices
    except Exception as error:
        raise InputError(
            f"the compiler knows no {topology} ({' '.join(str(error).split())[:120]}): pip install "
            f"'{COMPILERS[platform].package}', and give a shape that is made, as v5e:8x8 or h100:8."
        ) from error


def plan(config: ConfigDict, shape: Config, topology: str) -> dict:
    """The figures of every program of the run on these chips.

    Raises:
        InputError: the config is of what is not planned, the chips are unknown, their compiler is not installed, or the
            mesh does not fit.
    """
    asked = (config.align.objective, config.reward.source, config.reward.route)
    config_lib.require(
        asked == ("grpo", "irl", "category"),
        f"a plan is of align.objective, reward.source and reward.route 'grpo', 'irl' and 'category', not of {asked}.",
    )
    devices = devices_of(topology)
    mesh = sharding.make_mesh(config.mesh, config_lib.micro_batch_sizes(config), devices)
    with jax.set_mesh(mesh):
        resident, every = run_programs(config, shape)
        found = [measure(program, resident, chip_of(topology)) for program in every]
        held = sum(map(sharding.bytes_per_device, resident))
        return {"topology": topology, "mesh": dict(mesh.shape), "resident": held, "programs": found}


def table(result: dict) -> str:
    """The figures as text, a chip: memory, operations, the compiler's time and the share of peak that it implies, bytes
    moved and their time; then the alignment step, and what to change where something does not fit."""
    chip = chip_of(result["topology"])
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
        kinds = ", ".join(f"{kind} {moved / 1e9:.2f}" for kind, moved in sorted(row["moved"].items()))
        lines.append(
            f"{row['name']:18}{row['memory'] / 2**30:8.2f}{row['flops'] / 1e12:9.2f}{row['seconds']:9.3f}{share:>9}"
            f"{sum(row['moved'].values()) / 1e9:10.2f}{row['moving']:9.3f}  {kinds}"
        )
    if any("needs" in row for row in result["programs"]):
        lines.append("Does not fit: raise config.mesh.fsdp, align.accumulate or align.minibatches, lower align.batch, "
                     "sampler.max_new or data.max_prompt, or take a larger slice.")  # fmt: skip
        return "\n".join(lines)
    step = [row for row in result["programs"] if row["times"]]
    computing, moving = (sum(row["times"] * row[key] for row in step) for key in ("seconds", "moving"))
    dearest = max(step, key=lambda row: row["times"] * max(row["seconds"], row["moving"]))
    bound = "its collectives" if dearest["moving"] > dearest["seconds"] else "its computation"
    fullest = max(result["programs"], key=lambda row: row["memory"])
    most = f"to {computing + moving:.2f} s" if chip.clock else "s at least"
    lines.append(
        f"A step: {max(computing, moving):.2f} {most}, most of it {dearest['name']} by {bound}; "
        f"fullest in {fullest['name']}, {fullest['memory'] / chip.memory:.0%} of a chip's memory."
    )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The plan that the flags ask for. Raises InputError."""
    for flag in (command.CONFIG, TOPOLOGY):
        config_lib.require(flag.value is not None, f"--{flag.name} is missing: {__doc__.splitlines()[2]}")
    config = command.CONFIG.value
    checks.validate(config)
    if MODEL.value:
        known = ", ".join(families.PRESETS)
        config_lib.require(MODEL.value in families.PRESETS, f"--model is {MODEL.value}: choose one of {known}.")
        shape = families.PRESETS[MODEL.value]
    else:
        shape = families.config_from_hf(hf.read_config(hf.resolve(config.policy.init)))
    shape = shape._replace(**{name: config.policy[name] for name in ("dtype", "weights", "attention")})
    flash.require(shape, chip_of(TOPOLOGY.value).platform)
    result = plan(config, shape, TOPOLOGY.value)
    console.print_result(table(result), **result)
    if PLAN.value:
        replace_file(expand_path(PLAN.value), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command.start(main, resumes=False)
