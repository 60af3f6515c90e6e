"""Plans a run before it starts: its work, memory and time (`python -m drirl_jax.main ... --dry_run`).

Operations are those of `roofline.py`: matrix products by their shapes, responses of full length, no padding. Seconds
are these operations at the rate of a matrix product on this machine, so a real run takes longer. If the workdir already
has timed steps, their median is used instead.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import config as config_lib
from drirl_jax import loading
from drirl_jax.costs.roofline import Machine, Shape, floor, forward_flops, irl_floor, measure_machine
from drirl_jax.data import fingerprints, overlap
from drirl_jax.data.examples import require_both_kinds
from drirl_jax.evals import runner
from drirl_jax.models.architecture import Config
from drirl_jax.reports import status
from drirl_jax.runtime import bucket, lock, sharding, workdirs
from drirl_jax.stages import align, irl, objectives, optimizer, sft
from drirl_jax.stages.base import POLICIES, Context
from drirl_jax.types import PyTree

COUNTED = Machine(flops=1.0, bandwidth=math.inf)  # with this machine the floor's seconds are operations


def plan_run(config: ConfigDict, workdir: pathlib.Path) -> dict:
    """`make_plan` from a config. It makes the checks of `train.run`, but starts nothing and writes nothing.

    Raises:
        InputError: an input of the user is wrong.
    """
    return make_plan(loading.load_context(config, load=False), workdir)


def make_plan(context: Context, workdir: pathlib.Path) -> dict:
    """The plan of a run from its context; the context's model may be shapes only.

    Returns:
        {"workdir", "devices", "mesh", "policy", "parameters": {"policy", "trained", "rewards", "encoder"},
         "records": {split: {category: n}}, "repeated_prompts": see `data.overlap.describe_repeats`, "stages":
         [{"stage", "steps", "done", "finished", "shape": words, "operations": of a step, "seconds": left,
         "seconds_from": "measured" | "least" | None}], "memory": {part: bytes a device}, "memory_limit": bytes or
         None, "rate": operations a second, or None if it was not measured}

    Raises:
        InputError: an input of the user is wrong.
    """
    config = context.config
    needs_both_kinds = {"irl": config.irl.contrast > 0, "align": objectives.grpo.group_roles(config)[1].counts}
    for stage, splits in {"irl": ("train", "valid"), "align": ("train",)}.items():
        for split in splits if needs_both_kinds[stage] and stage in config.schedule else ():
            require_both_kinds(context.examples[split], split)
    question_sets = runner.load_benchmarks(context)
    lock.require_free(workdir)
    if config.reward.init:
        loading.require_same_policy(context, bucket.parse_path(config.reward.init))
    previous_state = status.run_status(workdir) if _is_resumed(context, workdir, question_sets) else None
    shapes = device_trees(context)
    mesh = jax.sharding.get_mesh()
    # The rate is measured on all cores, and emulated devices share these.
    measurable = mesh.size == 1 or jax.default_backend() != "cpu"
    rate = measure_machine(context.model.config).flops * mesh.size if measurable else None
    previous_stages = {stage["stage"]: stage for stage in previous_state["stages"]} if previous_state else {}
    return {
        "workdir": str(workdir),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "policy": config.policy.init,
        "parameters": {name: count(shapes[name]) for name in ("policy", "trained", "rewards", "encoder")},
        "records": _records(context),
        "repeated_prompts": overlap.describe_repeats(context.examples),
        "stages": [_stage(name, context, shapes, previous_stages.get(name), rate) for name in config.schedule],
        "benchmarks": {questions.name: len(questions.items) for questions in question_sets},
        "memory": memory(context, shapes),
        "memory_limit": memory_limit(),
        "rate": rate,
    }


def _is_resumed(context: Context, workdir: pathlib.Path, question_sets: list) -> bool:
    """Whether the workdir holds this run already. Raises InputError if it holds another run."""
    # The options come first: they are few, while hashing many files takes long.
    has_config = workdirs.check_config(context.config, workdir)
    return has_config and workdirs.check_config(
        context.config, workdir, fingerprints.run_contents(context.config, context.text, question_sets)
    )


def count(tree: PyTree) -> int:
    """The number of elements in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _records(context: Context) -> dict[str, dict[str, int]]:
    names = context.config.data.categories
    counters = {split: collections.Counter(rows.category.tolist()) for split, rows in context.examples.items()}
    return {split: {name: counter[i] for i, name in enumerate(names)} for split, counter in counters.items()}


def device_trees(context: Context) -> dict[str, PyTree]:
    """The trees on the devices, as shapes with shardings: policy, its trained part, rewards, encoder, train states."""
    config, key = context.config, jax.random.key(0)
    policy, objective = POLICIES[config.policy.tune], objectives.OBJECTIVES[config.align.objective]
    model = sharding.sharded_shapes(context.model)

    def trained(model):
        return objectives.base.init_params(objective, policy.init(config.policy, model, key), model)

    def rewards(model):
        return irl.init_rewards(dataclasses.replace(context, model=model))

    def state(init, transformation):
        return sharding.sharded_shapes(jax.eval_shape(lambda m: optimizer.init(transformation, init(m)), model))

    return {
        "policy": model,
        "trained": sharding.sharded_shapes(jax.eval_shape(trained, model)),
        "rewards": sharding.sharded_shapes(jax.eval_shape(rewards, model)),
        "encoder": context.embedder.encoder,
        "align": state(trained, align.make_transformation(config)),
        "irl": state(rewards, optimizer.make(config.irl.optimizer, config.irl.steps)),
        "sft": state(trained, optimizer.make(config.sft.optimizer, config.sft.steps)),
    }


# --------------------------------------------------------------------------------------------------- operations


def _shape(context: Context) -> Shape:
    config, examples = context.config, next(iter(context.examples.values()))
    S, R = examples.prompt.shape[1], len(examples.prefix)
    return Shape(config.align.batch, S, config.align.group_size, config.sampler.max_new, R)


def reward_passes(config: ConfigDict) -> int:
    """The number of forward passes of a group for its rewards."""
    separate_passes = config.reward.kind == "full" or config.reward.route != "category"
    return len(config.data.categories) if separate_passes and not config.reward.one_for_all else 1


def align_operations(context: Context, size: int, tuned: int) -> dict[str, float]:
    """Operations of each phase of an alignment step, from `roofline.floor`."""
    config, shape = context.config, _shape(context)
    c, objective = config.align, objectives.OBJECTIVES[config.align.objective]
    roles = objectives.grpo.group_roles(config)
    # Responses that DPO learns from: all G samples and the demonstration, or two of the samples.
    pairs = {"demonstration": 1, "self": 2 - c.group_size}
    trained = pairs[config.dpo.pairs] if c.objective == "dpo" else sum(role.trained for role in roles)
    if not objective.needs_samples:
        shape = shape._replace(G=1)
    by_phase = floor(
        context.model.config, shape, COUNTED,
        size=size, tuned=tuned, shared=context.shared_layers, scored=1 + roles[1].counts, trained=trained,
    )  # fmt: skip
    by_phase["update"] *= c.epochs
    if not objective.needs_samples:
        return {"update": by_phase["update"]}
    if c.objective == "dpo":
        by_phase["reference"] *= (shape.G + trained) / shape.G
    elif config.policy_loss.beta_kl == 0:
        del by_phase["reference"]
    if config.reward.source == "irl":
        by_phase["rewards"] *= reward_passes(config)
    else:
        del by_phase["rewards"]
    if objective.has_value_head:
        by_phase["values"] = forward_flops(context.model.config, shape, logits=False)
    return by_phase


def _sft_shape(context: Context) -> Shape:
    """The largest sizes of a batch of the stage `sft`: one answer a prompt, which may follow an opening."""
    return _shape(context)._replace(P=context.config.sft.batch, G=1, T=config_lib.taught_tokens(context.config))


def _sft_mean_shape(context: Context) -> Shape:
    """Its mean sizes: a batch is as wide as its longest lesson. Own answers count as long as demonstrations."""
    c, examples = context.config.sft, context.examples["train"]
    opening = c.recovery * (1 + c.recovery_tokens) / 2
    mean = [math.ceil(float(np.mean(x))) for x in (examples.prompt_len, examples.demo_len + opening)]
    return _sft_shape(context)._replace(S=mean[0], T=mean[1])


def sft_operations(context: Context, size: int, tuned: int) -> dict[str, float]:
    """Operations of one update of the warm start, and this update's share of the policy's own answers."""
    config, model, shape = context.config, context.model.config, _sft_mean_shape(context)
    update = floor(
        model, shape, COUNTED, size=size, tuned=tuned, shared=context.shared_layers, scored=1, trained=0
    )["update"]  # fmt: skip
    own = sum(map(len, sft.prompts_to_answer(context)))
    sampled = forward_flops(model, _shape(context)._replace(P=own, G=1)) if own else 0.0
    return {"samples": sampled / config.sft.steps, "update": update}


def irl_operations(context: Context) -> dict[str, float]:
    """Operations of one update of the rewards, and this update's share of the sampling of a round."""
    config, c, model, shape = context.config, context.config.irl, context.model.config, _shape(context)
    pairs = shape._replace(P=c.batch, G=1 + len(irl.negative_weights(c)))
    adapted = {"lora": config.reward.layers or model.layers, "head": 0, "full": 2 * model.layers}[config.reward.kind]
    update = irl_floor(model, pairs, COUNTED, 1) - irl_floor(model, pairs, COUNTED, 0)  # backward pass of one layer
    update = irl_floor(model, pairs, COUNTED, 0) + adapted * update
    steps = c.steps // c.rounds
    prompts = min(len(context.examples["train"].id), steps * c.batch) + len(context.examples["valid"].id)
    sampled = forward_flops(model, shape._replace(P=prompts, G=c.samples))
    return {"samples": sampled / steps, "update": update * (reward_passes(config) if adapted > model.layers else 1)}


def evals_operations(context: Context) -> dict[str, float]:
    """Operations of the evaluation of one policy, without the benchmarks."""
    config, model = context.config, context.model.config
    shape = _shape(context)._replace(P=len(context.examples[config.evals.split].id), G=1, T=config.evals.max_new)
    by_phase = {"samples": forward_flops(model, shape)}
    if "irl" in config.schedule or config.reward.init:
        reward_shape = shape._replace(T=config.sampler.max_new)
        by_phase["rewards"] = forward_flops(model, reward_shape, logits=False) * reward_passes(config)
    return by_phase


def _stage(name: str, context: Context, shapes: dict, previous: dict | None, rate: float | None) -> dict:
    """One row of the plan; `previous` is the stage's entry of `status.run_status`, or None."""
    config, shape = context.config, _shape(context)
    tokens = f"{shape.R} + {shape.S}" if shape.R else f"{shape.S}"
    if name == "sft":
        c, steps, sizes = config.sft, config.sft.steps, _sft_shape(context)
        by_phase = sft_operations(context, count(shapes["policy"]), count(shapes["trained"]))
        words = f"{c.batch} prompts of {tokens} tokens x 1 answer of {sizes.T}, at most"
    elif name == "irl":
        c, steps, by_phase = config.irl, config.irl.steps, irl_operations(context)
        negatives = len(irl.negative_weights(c))
        words = f"{c.batch} prompts of {tokens} tokens x (1 demonstration + {negatives} negatives) of {shape.T}"
    elif name == "align":
        c, steps = config.align, config.align.steps
        by_phase = align_operations(context, count(shapes["policy"]), count(shapes["trained"]))
        samples = objectives.OBJECTIVES[c.objective].needs_samples
        group = f"{shape.G} responses" if samples else "their demonstration"
        updates = c.epochs * c.minibatches
        words = f"{c.objective}: {c.batch} prompts of {tokens} tokens x {group} of {shape.T}, {updates} updates"
    else:
        steps, by_phase = len(status.evaluated_policies(config.schedule)), evals_operations(context)
        prompts = len(context.examples[config.evals.split].id)
        words = f"{prompts} prompts of {tokens} tokens x 1 response of {config.evals.max_new}, before and after"
    done, finished = (previous["done"], previous["finished"]) if previous else (0, False)
    operations, steps_left = sum(by_phase.values()), 0 if finished else steps - done
    seconds, source = (steps_left * operations / rate, "least") if rate else (None, None)
    if previous and previous["seconds_left"] is not None:
        seconds, source = previous["seconds_left"], "measured"
    progress = {"stage": name, "steps": steps, "done": done, "finished": finished, "shape": words}
    return progress | {"operations": operations, "phases": by_phase, "seconds": seconds, "seconds_from": source}


# -------------------------------------------------------------------------------------------------------- memory


def memory(context: Context, shapes: dict[str, PyTree]) -> dict[str, float]:
    """Estimated bytes on a device, by part, at the fullest moment of the scheduled stages.

    An update counts what the backward pass keeps: the products of each layer that learns, the attention scores of one
    layer and a chunk of logits. Sampling counts the cache of keys and values.
    """
    config, model, shape = context.config, context.model.config, _shape(context)
    weights, adapted = sharding.bytes_per_device(shapes["policy"]), config.policy.tune == "lora"
    parts = {"weights": weights, "encoder": float(sum(x.nbytes for x in jax.tree.leaves(shapes["encoder"])))}
    stages = {}
    if "sft" in config.schedule:
        layers = (config.policy.layers if adapted else 0) or model.layers
        learning = _sft_shape(context)
        learning = learning._replace(P=config.sft.batch // config.sft.accumulate)
        state = sharding.bytes_per_device(shapes["sft"]) + sharding.bytes_per_device(shapes["trained"])
        stages["sft"] = {"sft: policy, optimiser, gradients": state}
        stages["sft"]["sft: sampling or update"] = max(
            cache_bytes(model, shape._replace(P=config.evals.batch, G=1)), activation_bytes(model, learning, layers)
        )
    if "irl" in config.schedule:
        c = config.irl
        learning = shape._replace(P=c.batch // c.accumulate, G=1 + len(irl.negative_weights(c)))
        layers = config.reward.layers or model.layers
        sampled = cache_bytes(model, shape._replace(P=max(1, config.evals.batch // c.samples), G=c.samples))
        state = sharding.bytes_per_device(shapes["irl"]) + sharding.bytes_per_device(shapes["rewards"])
        stages["irl"] = {"irl: rewards, optimiser, gradients": state}
        stages["irl"]["irl: sampling or update"] = max(sampled, activation_bytes(model, learning, layers))
    if "align" in config.schedule:
        c, objective = config.align, objectives.OBJECTIVES[config.align.objective]
        state = sharding.bytes_per_device(shapes["align"]) + sharding.bytes_per_device(shapes["trained"])
        reads_bank = config.reward.source == "irl" and objective.needs_samples
        bank = sharding.bytes_per_device(shapes["rewards"]) if reads_bank else 0.0
        members = shape.G if objective.needs_samples else 1
        learning = shape._replace(P=c.batch // c.minibatches // c.accumulate, G=members)
        layers = (config.policy.layers if adapted else 0) or model.layers
        stages["align"] = {"align: policy, optimiser, gradients": state, "align: rewards": bank}
        # To sample, adapters are merged into a copy of the model. A fully tuned policy needs no copy.
        stages["align"]["align: merged policy"] = weights if adapted and objective.needs_samples else 0.0
        stages["align"]["align: sampling or update"] = max(
            cache_bytes(model, shape) if objective.needs_samples else 0.0, activation_bytes(model, learning, layers)
        )
    return parts | max(stages.values(), key=lambda stage: sum(stage.values()), default={})


def cache_bytes(model: Config, shape: Shape) -> float:
    """Bytes a device of the keys and values of a sampler's batch."""
    P, S, G, T, R = shape
    row = 2 * model.layers * model.kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return row * (R + P * (S + G * T) / sharding.axis_size("prompts"))


def activation_bytes(model: Config, shape: Shape, layers: int) -> float:
    """Bytes a device that an update of this micro-batch keeps for its backward pass through these layers."""
    prompts, S, G, T, R = shape
    P = prompts / sharding.axis_size("prompts")
    width = model.heads * model.head_dim + 2 * model.kv_heads * model.head_dim + 3 * model.width + 2 * model.ffn
    item = jnp.dtype(model.dtype).itemsize
    products = layers * width * item * (R + P * (S + G * T))
    scores = 3 * 4 * model.heads * P * (S * (R + S) + G * T * (R + S + T))
    logits = 3 * 4 * 256 * model.vocab
    return products + scores + logits


def memory_limit() -> int | None:
    """Memory of a device in bytes; on a CPU that of the machine. None if it is unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats.get("bytes_limit")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------------------------------------------------- text


def _operations(number: float) -> str:
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number / 1e6:.3g} MFLOP"


def _millions(number: int) -> str:
    return f"{number / 1e6:.4g} M"


def text(plan: dict) -> str:
    """The plan of `make_plan` as text."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    sizes = {name: _millions(n) for name, n in plan["parameters"].items()}
    lines = [
        f"plan of {plan['workdir']}; nothing is started or written",
        f"devices: {plan['devices']}, mesh {mesh}",
        f"policy: {plan['policy']}, {sizes['policy']} parameters, {sizes['trained']} trained; "
        f"rewards {sizes['rewards']}; encoder {sizes['encoder']}",
        f"{'records':32}" + "".join(f"{split:>8}" for split in plan["records"]),
    ]
    for name in next(iter(plan["records"].values())):
        lines.append(f"  {name:30}" + "".join(f"{counts[name]:8}" for counts in plan["records"].values()))
    if plan["repeated_prompts"]:
        lines.append(f"repeated prompts: {plan['repeated_prompts']}")
    for stage in plan["stages"]:
        done = "done" if stage["finished"] else f"{stage['done']} done" if stage["done"] else "not begun"
        lines.append(f"{stage['stage']}: {stage['steps']} steps, {done}; {stage['shape']}")
        by_phase = ", ".join(f"{name} {_operations(n)}" for name, n in stage["phases"].items() if n)
        lines.append(f"  a step {_operations(stage['operations'])}: {by_phase}")
    if plan["benchmarks"]:
        benchmark_list = ", ".join(f"{name} ({n} items)" for name, n in plan["benchmarks"].items())
        lines.append(f"benchmarks, whose cost is not counted: {benchmark_list}")
    needed, limit = sum(plan["memory"].values()), plan["memory_limit"]
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan["memory"].items() if size)
    lines.append(f"memory: about {needed / 2**30:.2f} GiB a device" + (f" of {limit / 2**30:.0f}" if limit else ""))
    lines.append(f"  {parts}")
    if limit and needed > limit:
        lines.append(
            "  more than there is: raise align.accumulate, irl.accumulate or config.mesh.fsdp, or lower the batches"
        )
    return "\n".join([*lines, *_time(plan)])


def _time(plan: dict) -> list[str]:
    """Lines on the time left, each with its source."""
    explanations = {"measured": "by the steps timed in the workdir", "least": ""}
    if plan["rate"]:
        rate = f"{plan['rate'] / 1e9:.0f} GFLOP/s"
        explanations["least"] = f"at least, with all work at the {rate} of a matrix product measured here just now"
    lines = []
    for source, words in explanations.items():
        stages = [s for s in plan["stages"] if s["seconds_from"] == source and not s["finished"]]
        if stages:
            names = ", ".join(stage["stage"] for stage in stages)
            time_left = status.duration(sum(stage["seconds"] for stage in stages))
            lines.append(f"time left of {names}: {time_left}, {words}")
    return lines or [
        "time left: unknown, because emulated devices share the cores" if not plan["rate"] else "all is done"
    ]
