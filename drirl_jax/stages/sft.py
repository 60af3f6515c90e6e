"""Stage 0, the warm start: supervised training on whole answers, to the end of turn (ours).

Its product is merged into the trunk. So it is the reference, the sampler of IRL and the start of the alignment.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import losses
from drirl_jax.data import pipeline
from drirl_jax.data.examples import Examples
from drirl_jax.data.overlap import UNANSWERED
from drirl_jax.data.text import pad
from drirl_jax.judges.phrases import refused_by_phrases
from drirl_jax.stages import optimizer
from drirl_jax.stages.base import POLICIES, Context, Stage, State
from drirl_jax.stages.lesson_batches import Lessons, make_batches
from drirl_jax.stages.objectives import sft as supervised
from drirl_jax.stages.objectives.base import Params
from drirl_jax.stages.own_answers import own_answers, whole_sentences
from drirl_jax.types import PyTree

HARMLESS = ("own", "demonstrations", "both")


def make_lessons(context: Context) -> Lessons:
    """The demonstrations of harmful prompts, and for harmless ones what config.sft.harmless says.

    With "own", a harmless prompt that the policy itself refuses has its demonstration, if there is one.
    """
    c, train = context.config.sft, context.examples["train"]
    examples, prompts = train, _prompts_of_own_answers(context)
    if prompts is not None:
        answered = _with_own_answers(context, prompts)
        refused = set(prompts.id) - set(answered.id)
        keep_N = ~train.harmless | (c.harmless == "both") | np.isin(train.id, list(refused))
        examples = join(train.take(np.flatnonzero(keep_N)), answered)
    openings = _openings(context, examples) if c.recovery else [()] * len(examples.id)
    return Lessons(examples, openings)


def prompts_to_answer(context: Context) -> tuple[Sequence[str], Sequence[str]]:
    """The ids of the prompts that the policy answers itself: the harmless ones, and the harmful ones for openings."""
    prompts, train = _prompts_of_own_answers(context), context.examples["train"]
    harmful = [id_ for id_, is_harmless in zip(train.id, train.harmless) if not is_harmless]
    return prompts.id if prompts is not None else (), harmful if context.config.sft.recovery else ()


def _prompts_of_own_answers(context: Context) -> Examples | None:
    """The harmless training prompts, also those without a demonstration; at most config.sft.own_answers of them."""
    c, train = context.config.sft, context.examples["train"]
    if c.harmless == "demonstrations":
        return None
    prompts = train.take(np.flatnonzero(train.harmless))
    if UNANSWERED in context.examples:
        prompts = join(prompts, context.examples[UNANSWERED])
    if c.own_answers:
        order = np.random.default_rng(context.config.seed).permutation(len(prompts.id))
        prompts = prompts.take(np.sort(order[: c.own_answers]))
    return prompts


def join(first: Examples, second: Examples) -> Examples:
    """The examples of both, in this order."""
    joined: dict[str, Any] = {
        name: np.concatenate(pair) if isinstance(pair[0], np.ndarray) else [*pair[0], *pair[1]]
        for name, pair in zip(Examples._fields, zip(first, second))
    }
    return Examples(**joined | {"prefix": first.prefix})


def _with_own_answers(context: Context, examples: Examples) -> Examples:
    """The examples that the policy answers itself, with that answer in place of the demonstration."""

    def choose(prompt: str, answer: str, ended: bool) -> str:
        return "" if refused_by_phrases(prompt, answer) else whole_sentences(answer, ended)

    longest = context.config.sampler.max_new
    answers = own_answers(context, "harmless", examples, choose, max_new=longest, temperature=0.0)
    rows = [i for i, id_ in enumerate(examples.id) if id_ in answers]
    answered = examples.take(rows)
    texts = [answers[id_] for id_ in answered.id]
    width = examples.demo.shape[1]
    demo, demo_len = pad([context.text.response_ids(text, width) for text in texts], width)
    return answered._replace(demo=demo, demo_len=demo_len, demo_text=texts)


def _openings(context: Context, examples: Examples) -> list[Sequence[int]]:
    """For a harmful prompt the policy's own complying answer, for a harmless one the demonstration of a harmful one."""

    def choose(prompt: str, answer: str, ended: bool) -> str:
        return "" if refused_by_phrases(prompt, answer) else answer.strip()

    harmful = examples.take(np.flatnonzero(~examples.harmless))
    longest, temperature = context.config.sft.recovery_tokens, context.config.sampler.temperature
    complying = own_answers(context, "complying", harmful, choose, max_new=longest, temperature=temperature)
    rng = np.random.default_rng([context.config.seed, len(examples.id)])
    refusals = rng.integers(len(harmful.id), size=len(examples.id))
    openings: list[Sequence[int]] = []
    for id_, is_harmless, refusal in zip(examples.id, examples.harmless, refusals):
        if is_harmless:
            openings.append(harmful.demo[refusal, : harmful.demo_len[refusal]][:longest].tolist())
        else:
            openings.append(context.text.response_ids(complying[id_], longest) if id_ in complying else ())
    return [tuple(i for i in opening if i not in context.text.eos_ids) for opening in openings]


def init_params(context: Context) -> PyTree:
    """The policy's parameters before the first step (see `base.POLICIES`)."""
    config = context.config
    return POLICIES[config.policy.tune].init(config.policy, context.model, context.key("sft_adapter"))


def make_update(config: ConfigDict, transformation) -> jax.stages.Wrapped:
    """A jitted function (TrainState, trunk, batch) -> (TrainState, scalars): one update."""
    policy, c = POLICIES[config.policy.tune], config.sft

    @partial(jax.jit, donate_argnums=0)
    def updated(train_state, trunk, batch):
        stage_loss = partial(supervised.loss, trunk, policy, config)
        return optimizer.step(transformation, stage_loss, train_state, batch, c.accumulate)

    return updated


def make(context: Context) -> Stage:
    """The stage. Its product is the policy's parameters (see `base.POLICIES`)."""
    config, c = context.config, context.config.sft
    lessons = make_lessons(context)
    rows_C = lessons.examples.rows_by_category(len(config.data.categories))
    batches = pipeline.batches(config.data, rows_C, c.batch, config.seed, lessons.examples.harmless)
    lesson_batch = make_batches(lessons, batches, c, config.seed)
    transformation = optimizer.make(c.optimizer, c.steps)
    updated = make_update(config, transformation)

    def init() -> State:
        return State(optimizer.init(transformation, Params(init_params(context))), ())

    def collect(state: State, step: int):
        lesson = lesson_batch(step)
        weight = losses.REDUCE[config.policy_loss.reduce](lesson.answer_P1T)
        batch = supervised.Demonstrations(lesson.group, weight, losses.weight_by_token(lesson.answer_P1T))
        length = float((lesson.answer_len_P + lesson.opening_len_P).mean())
        return batch, (), {"length": length, "recovering": float((lesson.opening_len_P > 0).mean())}

    return Stage(
        steps=c.steps,
        init=init,
        collect=collect,
        update=lambda train_state, batch: updated(train_state, context.model, batch),
        evaluate=lambda state, step: {},
        finish=lambda state: optimizer.product(state.train).policy,
        bar_scalars=("loss", "entropy"),
    )
