"""What a run would do, and what it would take, before it is started: `python -m drirl_jax.main ... --dry_run`.

Operations are those of `floor.py`: matrix products by their shapes, responses of their full length, nothing padded.
Seconds are these at the rate of a matrix product on this machine, so a run takes longer; where the workdir has timed
steps of its own, their median counts.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from drirl_jax import loading
from drirl_jax.costs.roofline import Machine, Shape, floor, forward_flops, irl_floor, measure_machine
from drirl_jax.data import fingerprints, overlap
from drirl_jax.data.examples import require_both_kinds
from drirl_jax.evals import runner
from drirl_jax.models.architecture import Config
from drirl_jax.reports import status
from drirl_jax.runtime import bucket, lock, sharding, workdirs
from drirl_jax.stages import align, irl, objectives, optimizer
from drirl_jax.stages.base import POLICIES, Context
from drirl_jax.types import PyTree

COUNTED = Machine(flops=1.0, bandwidth=math.inf)  # of which the floor's seconds are operations


def plan_run(config: ConfigDict, workdir: pathlib.Path) -> dict:
    """`planned` from a config; checks what `train.run` checks, starts nothing and writes nothing.

    Raises:
        InputError: something that the user gave is wrong.
    """
    return planned(loading.load_context(config, load=False), workdir)


def planned(context: Context, workdir: pathlib.Path) -> dict:
    """The plan of a run from its context, whose model may be shapes alone.

    Returns:
        {"workdir", "devices", "mesh", "policy", "parameters": {"policy", "trained", "rewards", "encoder"}, "records":
         {split: {category: n}}, "repeated_prompts": see `data.overlap.summary`, "stages": [{"stage", "steps", "done",
         "finished", "shape": words, "operations": of a step, "seconds": of what is left, "seconds_from": "measured" |
         "least" | None}], "memory": {part: bytes a device}, "memory_limit": bytes or None, "rate": operations a second,
         or None where it was not measured}

    Raises:
        InputError: something that the user gave is wrong.
    """
    config = context.config
    harmless = [config.data.categories.index(name) for name in config.data.harmless]
    contrasted = {"irl": config.irl.contrast > 0, "align": objectives.ROLES[config.grpo.contrast].counts}
    for stage, splits in {"irl": ("train", "valid"), "align": ("train",)}.items():
        for split in splits if contrasted[stage] and stage in config.schedule else ():
            require_both_kinds(context.examples[split], harmless, split)
    asked = runner.load_benchmarks(context)
    lock.require_free(workdir)
    if config.reward.init:
        loading.require_same_policy(context, bucket.parse_path(config.reward.init))
    begun = status.run_status(workdir) if _goes_on(context, workdir, asked) else None
    shapes = placed(context)
    mesh = jax.sharding.get_mesh()
    # Emulated devices share the cores on which the rate is measured.
    alone = mesh.size == 1 or jax.default_backend() != "cpu"
    rate = measure_machine(context.model.config).flops * mesh.size if alone else None
    before = {stage["stage"]: stage for stage in begun["stages"]} if begun else {}
    return {
        "workdir": str(workdir),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "policy": config.policy.init,
        "parameters": {name: count(shapes[name]) for name in ("policy", "trained", "rewards", "encoder")},
        "records": _records(context),
        "repeated_prompts": overlap.summary(context.examples, harmless),
        "stages": [_stage(name, context, shapes, before.get(name), rate) for name in config.schedule],
        "benchmarks": {questions.name: len(questions.items) for questions in asked},
        "memory": memory(context, shapes),
        "memory_limit": memory_limit(),
        "rate": rate,
    }


def _goes_on(context: Context, workdir: pathlib.Path, asked: list) -> bool:
    """Whether the run was begun there. Raises InputError where the workdir holds another one."""
    begun = workdirs.check_config(context.config, workdir)  # a few options, before many files are hashed
    return begun and workdirs.check_config(
        context.config, workdir, fingerprints.run_contents(context.config, context.text, asked)
    )


def count(tree: PyTree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _records(context: Context) -> dict[str, dict[str, int]]:
    names = context.config.data.categories
    counted = {split: collections.Counter(of.category.tolist()) for split, of in context.examples.items()}
    return {split: {name: count[i] for i, name in enumerate(names)} for split, count in counted.items()}


def placed(context: Context) -> dict[str, PyTree]:
    """What lies on the devices, as shapes with their places: the policy, what is trained of it, rewards, states."""
    config, key = context.config, jax.random.key(0)
    policy, objective = POLICIES[config.policy.tune], objectives.OBJECTIVES[config.align.objective]
    model = sharding.sharded_shapes(context.model)

    def trained(model):
        return objectives.init_params(objective, policy.init(config.policy, model, key), model)

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
    }


# --------------------------------------------------------------------------------------------------- operations


def _shape(context: Context) -> Shape:
    config, examples = context.config, next(iter(context.examples.values()))
    S, R = examples.prompt.shape[1], len(examples.prefix)
    return Shape(config.align.batch, S, config.align.group, config.sampler.max_new, R)


def reward_passes(config: ConfigDict) -> int:
    """How many times a group passes through the network for its rewards."""
    many = config.reward.kind == "full" or config.reward.route != "category"
    return len(config.data.categories) if many and not config.reward.one_for_all else 1


def align_operations(context: Context, size: int, tuned: int) -> dict[str, float]:
    """Operations of each phase of an alignment step, by the floor of the bench."""
    config, shape = context.config, _shape(context)
    c, objective = config.align, objectives.OBJECTIVES[config.align.objective]
    roles = [objectives.ROLES[config.grpo[name]] for name in ("demonstration", "contrast")]
    # DPO learns from its pairs, the demonstration or the best sample among them.
    pairs = {"demonstration": 1, "self": 2 - c.group}
    trained = pairs[config.dpo.pairs] if c.objective == "dpo" else sum(role.trained for role in roles)
    if not objective.samples:
        shape = shape._replace(G=1)
    options = {"size": size, "tuned": tuned, "shared": context.shared, "scored": 1 + roles[1].counts}
    found = floor(context.model.config, shape, COUNTED, trained=trained, **options)
    found["update"] *= c.epochs
    if not objective.samples:
        return {"update": found["update"]}
    if c.objective == "dpo":
        found["reference"] *= (shape.G + trained) / shape.G
    elif config.grpo.beta_kl == 0:
        del found["reference"]
    if config.reward.source == "irl":
        found["rewards"] *= reward_passes(config)
    else:
        del found["rewards"]
    if objective.value:
        found["values"] = forward_flops(context.model.config, shape, logits=False)
    return found


def irl_operations(context: Context) -> dict[str, float]:
    """Operations of an update of the rewards, and its share of a round's samples."""
    config, c, model, shape = context.config, context.config.irl, context.model.config, _shape(context)
    pairs = shape._replace(P=c.batch, G=1 + len(irl.negative_weights(c)))
    adapted = {"lora": config.reward.layers or model.layers, "head": 0, "full": 2 * model.layers}[config.reward.kind]
    update = irl_floor(model, pairs, COUNTED, 1) - irl_floor(model, pairs, COUNTED, 0)  # of a layer, backward
    update = irl_floor(model, pairs, COUNTED, 0) + adapted * update
    steps = c.steps // c.rounds
    prompts = min(len(context.examples["train"].id), steps * c.batch) + len(context.examples["valid"].id)
    sampled = forward_flops(model, shape._replace(P=prompts, G=c.samples))
    return {"samples": sampled / steps, "update": update * (reward_passes(config) if adapted > model.layers else 1)}


def evals_operations(context: Context) -> dict[str, float]:
    """Operations of one policy's evaluation; the benchmarks' are not counted."""
    config, model = context.config, context.model.config
    shape = _shape(context)._replace(P=len(context.examples[config.evals.split].id), G=1, T=config.evals.max_new)
    found = {"samples": forward_flops(model, shape)}
    if "irl" in config.schedule or config.reward.init:
        read = shape._replace(T=config.sampler.max_new)
        found["rewards"] = forward_flops(model, read, logits=False) * reward_passes(config)
    return found


def _stage(name: str, context: Context, shapes: dict, before: dict | None, rate: float | None) -> dict:
    """One row of the plan; `before` is what `status.of` says of the stage."""
    config, shape = context.config, _shape(context)
    tokens = f"{shape.R} + {shape.S}" if shape.R else f"{shape.S}"
    if name == "irl":
        c, steps, by_phase = config.irl, config.irl.steps, irl_operations(context)
        negatives = len(irl.negative_weights(c))
        words = f"{c.batch} prompts of {tokens} tokens x (1 demonstration + {negatives} negatives) of {shape.T}"
    elif name == "align":
        c, steps = config.align, config.align.steps
        by_phase = align_operations(context, count(shapes["policy"]), count(shapes["trained"]))
        samples = objectives.OBJECTIVES[c.objective].samples
        group = f"{shape.G} responses" if samples else "their demonstration"
        updates = c.epochs * c.minibatches
        words = f"{c.objective}: {c.batch} prompts of {tokens} tokens x {group} of {shape.T}, {updates} updates"
    else:
        steps, by_phase = 2, evals_operations(context)
        prompts = len(context.examples[config.evals.split].id)
        words = f"{prompts} prompts of {tokens} tokens x 1 response of {config.evals.max_new}, before and after"
    done, finished = (before["done"], before["finished"]) if before else (0, False)
    operations, left = sum(by_phase.values()), 0 if finished else steps - done
    seconds, source = (left * operations / rate, "least") if rate else (None, None)
    if before and before["seconds_left"] is not None:
        seconds, source = before["seconds_left"], "measured"
    told = {"stage": name, "steps": steps, "done": done, "finished": finished, "shape": words}
    return told | {"operations": operations, "phases": by_phase, "seconds": seconds, "seconds_from": source}


# -------------------------------------------------------------------------------------------------------- memory


def memory(context: Context, shapes: dict[str, PyTree]) -> dict[str, float]:
    """Bytes on a device, by part, in the fullest moment of the stages that are scheduled; an estimate.

    Of an update counted are what the backward pass keeps, the products of each layer that learns, the scores of one
    layer's attention and a chunk of logits; of sampling the cache of keys and values.
    """
    config, model, shape = context.config, context.model.config, _shape(context)
    weights, adapted = sharding.bytes_per_device(shapes["policy"]), config.policy.tune == "lora"
    parts = {"weights": weights, "encoder": float(sum(x.nbytes for x in jax.tree.leaves(shapes["encoder"])))}
    stages = {}
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
        bank = (
            sharding.bytes_per_device(shapes["rewards"]) if config.reward.source == "irl" and objective.samples else 0.0
        )
        learning = shape._replace(P=c.batch // c.minibatches // c.accumulate, G=shape.G if objective.samples else 1)
        layers = (config.policy.layers if adapted else 0) or model.layers
        stages["align"] = {"align: policy, optimiser, gradients": state, "align: rewards": bank}
        # Adapters are merged into a model to sample from; one that is tuned whole is that model.
        stages["align"]["align: merged policy"] = weights if adapted and objective.samples else 0.0
        stages["align"]["align: sampling or update"] = max(
            cache_bytes(model, shape) if objective.samples else 0.0, activation_bytes(model, learning, layers)
        )
    return parts | max(stages.values(), key=lambda stage: sum(stage.values()), default={})


def cache_bytes(model: Config, shape: Shape) -> float:
    """Keys and values of a sampler's batch, a device."""
    P, S, G, T, R = shape
    row = 2 * model.layers * model.kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return row * (R + P * (S + G * T) / sharding.axis_size("prompts"))


def activation_bytes(model: Config, shape: Shape, layers: int) -> float:
    """What an update of this micro-batch keeps for its backward pass through these layers, a device."""
    P, S, G, T, R = shape
    P = P / sharding.axis_size("prompts")
    width = model.heads * model.head_dim + 2 * model.kv_heads * model.head_dim + 3 * model.width + 2 * model.ffn
    item = jnp.dtype(model.dtype).itemsize
    kept = layers * width * item * (R + P * (S + G * T))
    scores = 3 * 4 * model.heads * P * (S * (R + S) + G * T * (R + S + T))
    logits = 3 * 4 * 256 * model.vocab
    return kept + scores + logits


def memory_limit() -> int | None:
    """Bytes of a device; on a CPU of the machine. None where nobody tells."""
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


def text(found: dict) -> str:
    """What `of` returns, for people."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    has = {name: _millions(n) for name, n in found["parameters"].items()}
    lines = [
        f"plan of {found['workdir']}; nothing is started or written",
        f"devices: {found['devices']}, mesh {mesh}",
        f"policy: {found['policy']}, {has['policy']} parameters, {has['trained']} trained; rewards {has['rewards']}; "
        f"encoder {has['encoder']}",
        f"{'records':32}" + "".join(f"{split:>8}" for split in found["records"]),
    ]
    for name in next(iter(found["records"].values())):
        lines.append(f"  {name:30}" + "".join(f"{of[name]:8}" for of in found["records"].values()))
    if found["repeated_prompts"]:
        lines.append(f"repeated prompts: {found['repeated_prompts']}")
    for stage in found["stages"]:
        done = "done" if stage["finished"] else f"{stage['done']} done" if stage["done"] else "not begun"
        lines.append(f"{stage['stage']}: {stage['steps']} steps, {done}; {stage['shape']}")
        by_phase = ", ".join(f"{name} {_operations(n)}" for name, n in stage["phases"].items() if n)
        lines.append(f"  a step {_operations(stage['operations'])}: {by_phase}")
    if found["benchmarks"]:
        asked = ", ".join(f"{name} ({n} items)" for name, n in found["benchmarks"].items())
        lines.append(f"benchmarks, whose cost is not counted: {asked}")
    held, limit = sum(found["memory"].values()), found["memory_limit"]
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in found["memory"].items() if size)
    lines.append(f"memory: about {held / 2**30:.2f} GiB a device" + (f" of {limit / 2**30:.0f}" if limit else ""))
    lines.append(f"  {parts}")
    if limit and held > limit:
        lines.append(
            "  more than there is: raise align.accumulate, irl.accumulate or config.mesh.fsdp, or lower the batches"
        )
    return "\n".join([*lines, *_time(found)])


def _time(found: dict) -> list[str]:
    """How long what is left takes, and how that is known."""
    known = {"measured": "by the steps that the workdir has timed", "least": ""}
    if found["rate"]:
        rate = f"{found['rate'] / 1e9:.0f} GFLOP/s"
        known["least"] = f"at least, with all at the {rate} of a matrix product measured here just now"
    lines = []
    for source, words in known.items():
        of_source = [s for s in found["stages"] if s["seconds_from"] == source and not s["finished"]]
        if of_source:
            names = ", ".join(stage["stage"] for stage in of_source)
            taken = status.duration(sum(stage["seconds"] for stage in of_source))
            lines.append(f"time left of {names}: {taken}, {words}")
    return lines or ["time left: not told, as emulated devices share the cores" if not found["rate"] else "all is done"]
