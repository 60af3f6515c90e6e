"""Evaluation of a policy in a run: the share of held-out prompts that it refuses, its rewards, and the benchmarks."""

from __future__ import annotations

import logging
import pathlib
from typing import Mapping, Sequence

import jax
import numpy as np

from drirl_jax import judges
from drirl_jax.data.examples import Examples
from drirl_jax.evals import benchmarks
from drirl_jax.evals.benchmarks import Questions
from drirl_jax.judges import rewards
from drirl_jax.models import hf, reward
from drirl_jax.models.transformer import Transformer
from drirl_jax.reports import pages
from drirl_jax.runtime import json_files, sharding
from drirl_jax.stages.base import Context, batched_rows, make_group, sample_all
from drirl_jax.types import InputError

log = logging.getLogger(__name__)
score = jax.jit(reward.score)


def judge_setting(context: Context, bank: reward.Bank | None) -> judges.Setting:
    """The `Setting` of a run: what its judges are made from."""
    memory = context.workdir.local / "judgements.jsonl" if context.workdir else None
    rewards = (context.model, context.text, bank) if bank else None
    return judges.Setting(context.config, memory, lambda: hf.resolve(context.config.encoder.init), rewards)


def load_benchmarks(context: Context) -> list[Questions]:
    """The questions of each benchmark in config.evals.benchmarks. Raises InputError where data is absent."""
    config = context.config
    return [benchmarks.load(name, config, context.text, context.model.config) for name in config.evals.benchmarks]


def run_benchmarks(
    context: Context, model: Transformer, benchmark_questions: list[Questions], judge_by_name: dict[str, judges.Judge]
) -> dict[str, dict]:
    """{benchmark: result of `benchmarks.run`} for the policy `model`."""
    key = context.key("benchmarks")
    return {
        questions.name: benchmarks.run(questions, model, context.text, context.config.evals, judge_by_name, key)
        for questions in benchmark_questions
    }


def make_judges(context: Context, bank: reward.Bank | None) -> dict[str, judges.Judge]:
    """{name: judge} of the judges in config.evals.judges."""
    setting = judge_setting(context, bank)
    return {name: judges.JUDGES[name].make(setting) for name in context.config.evals.judges}


def refusal_judge(context: Context, bank: reward.Bank | None) -> judges.Judge:
    """The judge that counts refusals: the first of config.evals.judges that gives this verdict."""
    name = judges.first_of_kind(context.config.evals.judges, "refusal")
    return judges.JUDGES[name].make(judge_setting(context, bank))


def settings(
    context: Context, bank: reward.Bank | None, judge_by_name: Mapping[str, judges.Judge], contents: Mapping[str, str]
) -> dict:
    """What an evaluation depends on, beside the policy's training. Other settings need a new evaluation.

    Args:
        judge_by_name: the judges of the benchmarks.
        contents: the hashes that the run's workdir stores.
    """
    section = context.config.evals
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
    # A version or a hash already stands for the choice of these options, or they do not change the result.
    ignored = ("judges", "classifier", "endpoint", "data", "batch", "every", "best")
    return {
        "options": {key: value for key, value in options.items() if key not in ignored},
        "contents": {key: digest for key, digest in contents.items() if key not in ("rewards", "classifier")},
        "rewards": bank and rewards.version(bank),
        "judge": refusal_judge(context, bank).version,
        "judges": {name: benchmark_judge.version for name, benchmark_judge in judge_by_name.items()},
    }


def is_done(path: pathlib.Path, settings: Mapping) -> bool:
    """Whether the file holds an evaluation with these settings. False: it has other settings, is damaged or absent."""
    if not path.exists():
        return False
    try:
        stored_settings = json_files.load(path, pages.RESULT).get("settings")
    except InputError as error:
        log.warning("%s The evaluation runs again.", error)
        return False
    if stored_settings != settings:
        log.warning("%s has another judge, other options or other contents: the evaluation runs again.", path)
    return stored_settings == settings


def evaluate(context: Context, model: Transformer, bank: reward.Bank | None) -> dict:
    """Samples one response to each prompt of config.evals.split, judges it and computes its reward.

    The reward is read at the end of the first config.sampler.max_new tokens, because it was trained there. Rewards are
    null without a bank.

    Returns:
        {"overall": {"harmful_refused", "harmless_refused", "mean_reward", "mean_length"},
         "by_category": {name: {"n": responses with a verdict, "refused", "reward"}},
         "responses": [{"id", "category", "prompt", "response", "refused", "reward"}]}. Shares are in [0, 1]. A share is
        null where no such prompt has a verdict; "refused" of a response is null where the judge gives no verdict.
    """
    config, c = context.config, context.config.evals
    examples, key = context.examples[c.split], context.key("evals")
    samples = sample_all(
        context, model, examples, key, c.batch, group=1, max_new=c.max_new, temperature=c.temperature
    )  # fmt: skip
    texts = [context.text.decode(*row) for row in zip(samples.response[:, 0], samples.response_len[:, 0])]
    refusal_N = refusal_judge(context, bank).refusal(examples.prompt_text, texts).astype(float)
    reward_N = response_rewards(context, bank, examples, samples.response, samples.response_len)[:, 0] if bank else None
    names = config.data.categories
    return {
        "overall": {
            "harmful_refused": _share_refused(refusal_N[~examples.harmless]),
            "harmless_refused": _share_refused(refusal_N[examples.harmless]),
            "mean_reward": None if reward_N is None else float(reward_N.mean()),
            "mean_length": float(samples.response_len.mean()),
        },
        "by_category": _category_results(examples, names, refusal_N, reward_N),
        "responses": _response_rows(examples, names, texts, refusal_N, reward_N),
    }


def _share_refused(refusal_N: np.ndarray) -> float | None:
    """The share of partial or full refusals among the responses with a verdict; None where there are none."""
    judged = refusal_N[~np.isnan(refusal_N)]
    return float((judged > 0).mean()) if judged.size else None


def _category_results(
    examples: Examples, names: Sequence[str], refusal_N: np.ndarray, reward_N: np.ndarray | None
) -> dict[str, dict]:
    """{category: {"n", "refused", "reward"}} of the categories that have prompts: see `evaluate`."""
    results = {}
    for i, name in enumerate(names):
        rows = examples.category == i
        if rows.any():
            results[name] = {
                "n": int((~np.isnan(refusal_N[rows])).sum()),
                "refused": _share_refused(refusal_N[rows]),
                "reward": None if reward_N is None else float(reward_N[rows].mean()),
            }
    return results


def _response_rows(
    examples: Examples, names: Sequence[str], texts: Sequence[str], refusal_N: np.ndarray, reward_N: np.ndarray | None
) -> list[dict]:
    """The "responses" of `evaluate`: one row for each prompt."""
    return [
        {
            "id": examples.id[i],
            "category": names[int(examples.category[i])],
            "prompt": examples.prompt_text[i],
            "response": text,
            "refused": None if np.isnan(refusal_N[i]) else bool(refusal_N[i] > 0),
            "reward": None if reward_N is None else float(reward_N[i]),
        }
        for i, text in enumerate(texts)
    ]


def response_rewards(context: Context, bank: reward.Bank, examples: Examples, response, response_len) -> np.ndarray:
    """[N, G] rewards of responses [N, G, T] to the examples, read after config.sampler.max_new tokens at most."""
    config, reward_batches = context.config, []
    response, scored_len = response[..., : config.sampler.max_new], np.minimum(response_len, config.sampler.max_new)
    for rows, real in batched_rows(len(examples.id), config.evals.batch, "rewards"):
        group = make_group(examples.take(rows), response[rows], scored_len[rows])
        reward_batches.append(sharding.fetch(score(context.model, bank, group))[:real])
    return np.concatenate(reward_batches)
