"""Times the phases of an alignment step, and compares them with the least time that the machine needs.

python -m drirl_jax bench --config configs/bench.py [--shape S=64] [--grow G=1,2,4,8] [--steps 5] [--json bench.json]
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import json
import multiprocessing
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from drirl_jax import loading
from drirl_jax.commands import cli
from drirl_jax.costs.roofline import Shape, floor, irl_floor, measure_machine
from drirl_jax.data.examples import Examples
from drirl_jax.models import reward, transformer
from drirl_jax.runtime import console, processes, sharding
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.runtime.progress import Clock
from drirl_jax.stages import align, irl, objectives
from drirl_jax.stages.base import Context, Stage, State
from drirl_jax.types import InputError

STEPS = flags.DEFINE_integer("steps", 5, "Steps to time, after two warm-up steps.", lower_bound=1)
SHAPE = flags.DEFINE_list("shape", [], "Letters of the step's shape with new values, as S=64,G=4.")
GROW = flags.DEFINE_list("grow", [], "One letter with several values, as G=1,2,4: shows how the cost grows with it.")
JSON = flags.DEFINE_string("json", None, "Write the figures to this file too.")

SHAPES = {
    "P": "prompts a step",
    "S": "tokens of every prompt, which is repeated or cut to this length",
    "G": "responses a prompt",
    "T": "tokens of a response",
    "C": "categories, and so rewards in the bank; the records are dealt out to them in turn",
    "D": "width of the policy, which then gets random weights",
}
PHASES = ("rollout", "trunk", "reference", "rewards", "hardness", "update")
TIMED = (*PHASES, "step", "irl")  # "irl" is an update of the IRL stage, not part of an alignment step


def peak_memory() -> int:
    """Peak memory of the device in bytes; on a CPU that of the process."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def with_prompt_length(by_split: dict[str, Examples], length: int) -> dict[str, Examples]:
    """The examples with every prompt repeated or cut to `length` tokens, and without a shared prefix."""

    def resized(examples):
        rows = [
            np.resize([*examples.prefix, *row[:n]], length).astype(np.int32)
            for row, n in zip(examples.prompt, examples.prompt_len)
        ]
        return examples._replace(prompt=np.stack(rows), prompt_len=np.full(len(rows), length, np.int32), prefix=())

    return {split: resized(examples) for split, examples in by_split.items()}


def with_categories(context: Context, count: int) -> Context:
    """The context with its records dealt out in turn to `count` categories; the last category is harmless."""
    config = context.config.copy_and_resolve_references()
    config.data.categories = tuple(f"category_{i}" for i in range(count))
    config.data.harmless = config.data.categories[-1:]
    by_split = {}
    for split, examples in context.examples.items():
        category = np.arange(len(examples.id), dtype=np.int32) % count
        by_split[split] = examples._replace(category=category, harmless=category == count - 1)
    return dataclasses.replace(context, config=config, examples=by_split)


def time_irl(context: Context, steps: int) -> list[float]:
    """Seconds of each IRL update, with other demonstrations as negatives. Two warm-up updates before are left out."""
    c, stage, examples = context.config.irl, irl.make(context), context.examples["train"]
    batch = examples.take(np.arange(c.batch) % len(examples.id))
    demo_PKT, demo_len_PK = (
        np.stack([np.roll(x, k, axis=0) for k in range(1, 1 + len(irl.negative_weights(c)))], axis=1)
        for x in (batch.demo, batch.demo_len)
    )
    pairs = irl.make_pairs(batch, demo_PKT, demo_len_PK, c.cut, [0])
    state, seconds = sharding.place(stage.init().train), []
    for _ in range(2 + steps):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(stage.update(state, pairs))
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def with_width(model: transformer.Transformer, width: int) -> transformer.Transformer:
    """A random model of this width. Key heads and MLP grow in proportion; head width, query heads per key head, layers
    and vocabulary stay."""
    c = model.config
    kv_heads = max(c.kv_heads * width // c.width, 1)
    heads = kv_heads * c.heads // c.kv_heads
    wide = c._replace(width=width, heads=heads, kv_heads=kv_heads, ffn=c.ffn * width // c.width)
    return transformer.Transformer(wide, jax.random.key(0))


def load_bench_context(config: ConfigDict, shape: dict[str, int], clock: Clock) -> Context:
    """The context of a run whose step has this shape, and whose responses all have their full length.

    Args:
        config: of the run.
        shape: letters of SHAPES and their values; they replace the config's.
        clock: it gets the seconds of the phases.
    """
    keys = {"P": "align.batch", "G": "align.group_size", "T": "sampler.max_new"}
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({keys[letter]: value for letter, value in shape.items() if letter in keys})
    context = loading.load_context(config)
    endless = copy.copy(context.text)
    endless.eos_ids = (-1,)  # no token has this id, so every response has T tokens, as the floor assumes
    context = dataclasses.replace(context, clock=clock, text=endless)
    if "S" in shape:
        context = dataclasses.replace(context, examples=with_prompt_length(context.examples, shape["S"]))
    if "D" in shape:
        context = dataclasses.replace(context, model=sharding.place(with_width(context.model, shape["D"])))
    return with_categories(context, shape["C"]) if "C" in shape else context


def time_align(clock: Clock, stage: Stage, state: State, steps: int) -> dict[str, list[float]]:
    """Seconds of each phase in steps that wait after each phase, then of whole steps ("step").

    Two steps before them, which compile, are left out.

    Args:
        clock: of the stage's context.
        stage: the align stage.
        state: its first state.
        steps: number of steps to time of each kind.
    """
    times: dict[str, list[float]] = {name: [] for name in (*PHASES, "step")}
    for number in range(2 + 2 * steps):
        clock.restart(wait=number < 2 + steps)
        start = time.perf_counter()
        batch, carry, _ = stage.collect(state, number)
        new_train, _ = stage.update(state.train, batch)
        clock.mark("update", jax.block_until_ready(new_train))
        state = state._replace(train=new_train, carry=carry)
        if number >= 2 + steps:
            times["step"].append(time.perf_counter() - start)
        elif number >= 2:
            for phase in PHASES:
                times[phase].append(clock.seconds.get(phase, 0.0))
    return times


def measure_floors(context: Context, trained_size: int) -> dict:
    """The least seconds of the phases on this machine, and what they follow from.

    Args:
        context: of the run.
        trained_size: number of trained parameters.

    Returns:
        {"floor": phase -> seconds, "step_floor": their sum without the IRL stage, "machine", "shape"}
    """
    config, model, examples = context.config, context.model.config, context.examples["train"]
    S, R = examples.prompt.shape[1], len(examples.prefix)
    shape = Shape(config.align.batch, S, config.align.group_size, config.sampler.max_new, R)
    pairs_shape = shape._replace(P=config.irl.batch, G=1 + len(irl.negative_weights(config.irl)))
    roles, machine = objectives.grpo.group_roles(config), measure_machine(model)
    phases = floor(
        model, shape, machine,
        size=sum(x.size for x in jax.tree.leaves(context.model)), tuned=trained_size, shared=context.shared_layers,
        scored=1 + roles[1].counts, trained=sum(role.trained for role in roles),
    )  # fmt: skip
    irl_seconds = irl_floor(model, pairs_shape, machine, config.reward.layers or model.layers)
    return {
        "floor": phases | {"irl": irl_seconds},
        "step_floor": sum(phases.values()),
        "machine": machine._asdict(),
        "shape": shape._asdict(),
    }


def run(config: ConfigDict, steps: int, shape: dict[str, int] | None = None) -> dict:
    """Times collect and update of the align stage, and the update of the IRL stage.

    The functions are those of the train loop. The rewards are untrained. The IRL update takes demonstrations instead of
    samples. Every response has its full length.

    Args:
        config: of the run.
        steps: number of steps to time of each kind: steps that wait after each phase, and whole steps.
        shape: letters of SHAPES and their values; they replace the config's.

    Returns:
        {"seconds": name in TIMED -> median, "all": name in TIMED -> list, "floor": phase -> seconds, "step_floor",
         "tokens_per_second": of the rollout, "peak_bytes", "machine", "shape",
         "device", "jax"}. "step" is timed without waiting between phases, so it may be less than their sum.
    """
    clock = Clock()
    context = load_bench_context(config, shape or {}, clock)
    untrained = irl.init_rewards(context)
    stage = align.make(context, reward.Bank(untrained, mean=untrained.bias, std=jnp.ones_like(untrained.bias)))
    state = stage.init()
    trained_size = sum(x.size for x in jax.tree.leaves(state.train.params))
    times = time_align(clock, stage, state, steps) | {"irl": time_irl(context, steps)}
    floors, seconds = measure_floors(context, trained_size), {name: statistics.median(times[name]) for name in TIMED}
    c = context.config
    return {
        "seconds": seconds,
        "all": times,
        "tokens_per_second": c.align.batch * c.align.group_size * c.sampler.max_new / seconds["rollout"],
        "peak_bytes": peak_memory(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    } | floors


def run_apart(config: ConfigDict, steps: int, shape: dict[str, int]) -> dict:
    """`run` in a new process, because the peak memory of a process never falls."""
    spawn_context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn_context, initializer=processes.keep_freed_memory) as executor:
        return executor.submit(run, config, steps, shape).result()


def table(result: dict) -> str:
    """The figures as text: seconds of each phase, its floor, and the floor as a share of the time."""
    shape, machine, step = result["shape"], result["machine"], result["seconds"]["step"]
    lines = [
        f"{result['device']}, jax {result['jax']}: {machine['flops'] / 1e9:.0f} GFLOP/s, "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s; " + ", ".join(f"{k} = {v}" for k, v in shape.items()),
        f"{'phase':10} {'seconds':>9} {'of step':>8} {'floor':>9} {'floor/time':>10}",
    ]
    for phase, seconds in result["seconds"].items():
        floor_seconds = result["step_floor"] if phase == "step" else result["floor"].get(phase)
        floor_cells = f"{floor_seconds:9.3f} {floor_seconds / seconds:10.0%}" if floor_seconds else f"{'':9} {'':10}"
        lines.append(f"{phase:10} {seconds:9.3f} {seconds / step:8.1%} {floor_cells}".rstrip())
    lines.append(
        f"{result['tokens_per_second']:.0f} sampled tokens/s, {shape['P'] * shape['G'] / step:.2f} responses/s, "
        f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB"
    )
    return "\n".join(lines)


def exponent(values: list[int], seconds: list[float]) -> float:
    """The exponent k of the best power law seconds ~ value^k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def growth(letter: str, results: dict[int, dict]) -> str:
    """A table of the seconds of each phase at each value of a letter, and the exponent of each phase."""
    lines = ["".join(f"{name:>11}" for name in (letter, *TIMED, "peak GiB"))]
    for value, result in results.items():
        seconds = [result["seconds"][name] for name in TIMED]
        lines.append(f"{value:11}" + "".join(f"{x:11.3f}" for x in (*seconds, result["peak_bytes"] / 2**30)))
    fits = [exponent(list(results), [r["seconds"][phase] for r in results.values()]) for phase in TIMED]
    return "\n".join([*lines, f"{'exponent':>11}" + "".join(f"{k:11.2f}" for k in fits)])


def parse_letters(name: str, text: list[str]) -> tuple[list[str], list[int]]:
    """Letters and values of a flag such as S=64,G=4 or G=1,2,4. A value without a letter takes the letter before it.

    Raises:
        InputError: SHAPES lacks a letter, or a value is no positive whole number.
    """
    letters, values = [], []
    for item in text:
        letter, _, value = item.rpartition("=")
        letters.append(letter or (letters[-1] if letters else ""))
        if letters[-1] not in SHAPES or not value.isdigit() or int(value) < 1:
            letter_list = ", ".join(f"{k} ({v})" for k, v in SHAPES.items())
            raise InputError(
                f"--{name} has {item!r}: give a letter, = and a whole number above 0; letters: {letter_list}."
            )
        values.append(int(value))
    return letters, values


def main(argv: list[str]) -> None:
    """Measures the figures that the flags ask for. Raises InputError."""
    cli.require_flags(__doc__, cli.CONFIG)
    shape = dict(zip(*parse_letters("shape", SHAPE.value)))
    letters, values = parse_letters("grow", GROW.value)
    if len(set(letters)) > 1 or len(set(values)) != len(values) or len(values) == 1:
        raise InputError(f"--grow is {','.join(GROW.value)}: give one letter and two or more values, as G=1,2,4.")
    if values:
        grown = {v: run_apart(cli.CONFIG.value, STEPS.value, shape | {letters[0]: v}) for v in values}
        text, result = growth(letters[0], grown), {str(v): figures for v, figures in grown.items()}
    else:
        result = run(cli.CONFIG.value, STEPS.value, shape)
        text = table(result)
    console.print_result(text, **result)
    if JSON.value:
        replace_file(expand_path(JSON.value), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_command(main, resumes=False)
