"""Evaluation of a policy in a run: what share of held-out prompts it refuses, its rewards, and the benchmarks."""

from __future__ import annotations

import logging
import pathlib
from typing import Mapping

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
    """What judges of a run are made from."""
    memory = context.workdir and context.workdir.local / "judgements.jsonl"
    rewards = (context.model, context.text, bank) if bank else None
    return judges.Setting(context.config, memory, lambda: hf.resolve(context.config.encoder.init), rewards)


def load_benchmarks(context: Context) -> list[Questions]:
    """Of each of config.evals.benchmarks. Raises InputError where the data of one is absent."""
    c = context.config.evals
    return [benchmarks.load(name, c, context.text, context.model.config) for name in c.benchmarks]


def run_benchmarks(
    context: Context, model: Transformer, asked: list[Questions], telling: dict[str, judges.Judge]
) -> dict[str, dict]:
    """{benchmark: `benchmarks.run`} of the policy, by these judges."""
    key = context.key("benchmarks")
    return {
        questions.name: benchmarks.run(questions, model, context.text, context.config.evals, telling, key)
        for questions in asked
    }


def make_judges(context: Context, bank: reward.Bank | None) -> dict[str, judges.Judge]:
    """Those that config.evals.judges names."""
    setting = judge_setting(context, bank)
    return {name: judges.JUDGES[name].make(setting) for name in context.config.evals.judges}


def settings(
    context: Context, bank: reward.Bank | None, telling: Mapping[str, judges.Judge], contents: Mapping[str, str]
) -> dict:
    """What an evaluation of a run depends on beside the policy's training: one of other settings is made anew.

    Args:
        telling: the judges of the benchmarks.
        contents: the hashes that the run's workdir keeps.
    """
    section = context.config.evals
    options = {key: list(of) if isinstance(of, tuple) else of for key, of in section.items()}
    # What these choose is known by its version or its hash, or changes nothing.
    apart = ("judge", "judges", "classifier", "endpoint", "data", "batch", "every", "best")
    judge = judges.JUDGES[section.judge].make(judge_setting(context, bank))
    return {
        "options": {key: of for key, of in options.items() if key not in apart},
        "contents": {key: of for key, of in contents.items() if key not in ("rewards", "classifier")},
        "rewards": bank and rewards.version(bank),
        "judge": judge.version,
        "judges": {name: of.version for name, of in telling.items()},
    }


def is_done(path: pathlib.Path, settings: Mapping) -> bool:
    """Whether an evaluation of these settings is in the file; one of others, or a damaged one, is to be made anew."""
    if not path.exists():
        return False
    try:
        before = json_files.load(path, pages.RESULT).get("settings")
    except InputError as error:
        log.warning("%s It is made anew.", error)
        return False
    if before != settings:
        log.warning("%s is of another judge, other options or other contents: it is made anew.", path)
    return before == settings


def evaluate(context: Context, model: Transformer, bank: reward.Bank | None) -> dict:
    """One response to each prompt of config.evals.split, judged and scored.

    Rewards are read where they were trained: at the end of the first config.sampler.max_new tokens; without a bank they
    are null.

    Returns:
        {"overall": {"harmful_refused", "harmless_refused", "mean_reward", "mean_length"},
         "by_category": {name: {"n": with a verdict, "refused", "reward"}},
         "responses": [{"id", "category", "prompt", "response", "refused", "reward"}]}; shares in [0, 1], an
        overall share is null where there are no such prompts, and "refused" where the judge gives no verdict.
    """
    config, c = context.config, context.config.evals
    names = config.data.categories
    examples = context.examples[c.split]
    out = sample_all(
        context,
        model,
        examples,
        context.key("evals"),
        c.batch,
        group=1,
        max_new=c.max_new,
        temperature=c.temperature,
    )
    rewards = response_rewards(context, bank, examples, out.response, out.response_len)[:, 0] if bank else None

    def mean_reward(rows=slice(None)):
        return None if rewards is None else float(rewards[rows].mean())

    texts = [context.text.decode(*row) for row in zip(out.response[:, 0], out.response_len[:, 0])]
    judge = judges.JUDGES[c.judge].make(judge_setting(context, bank))
    verdict = judge.refusal(examples.prompt_text, texts).astype(float)
    told, refused = ~np.isnan(verdict), verdict > 0
    harmless = np.isin(examples.category, [names.index(name) for name in config.data.harmless])

    def share(rows):
        return float(refused[rows & told].mean()) if (rows & told).any() else None

    of = {name: examples.category == i for i, name in enumerate(names) if (examples.category == i).any()}
    return {
        "overall": {
            "harmful_refused": share(~harmless),
            "harmless_refused": share(harmless),
            "mean_reward": mean_reward(),
            "mean_length": float(out.response_len.mean()),
        },
        "by_category": {
            name: {"n": int((rows & told).sum()), "refused": share(rows), "reward": mean_reward(rows)}
            for name, rows in of.items()
        },
        "responses": [
            {
                "id": examples.id[i],
                "category": names[examples.category[i]],
                "prompt": examples.prompt_text[i],
                "response": texts[i],
                "refused": bool(refused[i]) if told[i] else None,
                "reward": mean_reward(i),
            }
            for i in range(len(texts))
        ],
    }


def response_rewards(context: Context, bank: reward.Bank, examples: Examples, response, response_len) -> np.ndarray:
    """[N, G] rewards of responses [N, G, T] to the examples, read at most at config.sampler.max_new tokens."""
    config, pieces = context.config, []
    response, read = response[..., : config.sampler.max_new], np.minimum(response_len, config.sampler.max_new)
    for rows, real in batched_rows(len(examples.id), config.evals.batch, "rewards"):
        group = make_group(examples.take(rows), response[rows], read[rows])
        pieces.append(sharding.fetch(score(context.model, bank, group))[:real])
    return np.concatenate(pieces)
