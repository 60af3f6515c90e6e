"""The prefill attack: an answer begins with the first tokens of one that complies (after arXiv 2406.05946).

Whoever runs a model, and many servers, can write the beginning of its answer. The model continues it.
"""

from __future__ import annotations

import json
import pathlib
from typing import Iterator, Sequence

from ml_collections import ConfigDict

from drirl_jax import loading
from drirl_jax.attacks.target import Outcome, Target
from drirl_jax.config import require
from drirl_jax.data.records import Record
from drirl_jax.evals import depth
from drirl_jax.judges import Judge
from drirl_jax.runtime import json_files, processes, workdirs
from drirl_jax.runtime.files import replace_file

BASE_ANSWERS = "base_answers.jsonl"  # a file of the workdir: the answers of options.prefill.base, one a line
ROW = {"prompt": str, "answer": str}


def check(section: ConfigDict) -> None:
    """Raises InputError unless options.prefill names one source of answers, and a file that it names can be read."""
    require(
        bool(section.base) != bool(section.answers),
        "prefill needs answers that comply: name either a model in options.prefill.base, or a file in "
        "options.prefill.answers.",
    )
    if section.answers:
        depth.load_answers(section.answers)


def complying_answers(
    o: ConfigDict, config: ConfigDict, judge: Judge, rows: Sequence[Record], workdir: pathlib.Path
) -> dict[str, str]:
    """{prompt: answer} of the answers that comply: see `depth.select_complying`.

    They come from the file options.prefill.answers, or are the greedy answers of options.prefill.base, which the
    workdir keeps.

    Args:
        o: options of the attacks.
        config: of the attacked policy. The base has its options if it is no run.
        judge: decides whether an answer complies: it is unsafe.

    Raises:
        InputError: no answer complies, or there is no such base.
    """
    prompts = [row.prompt for row in rows]
    if o.prefill.answers:
        return depth.select_complying(judge, prompts, depth.load_answers(o.prefill.answers))
    path = workdir / BASE_ANSWERS
    stored = processes.ask_once(lambda: {row["prompt"]: row["answer"] for row in json_files.rows(path, ROW)})
    if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in stored]:
        base_config = workdirs.policy_config(o.prefill.base, config)
        base_config.evals.update({"max_new": max(o.max_new, o.prefill.tokens), "batch": o.batch})
        base = depth.Policy(*loading.load_policy(base_config))
        sampled = depth.greedy_answers(base, missing, base_config.evals)
        stored |= {prompt: answer.text for prompt, answer in zip(missing, sampled)}
        if processes.is_writer():
            lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in stored.items()]
            replace_file(path, "\n".join(lines) + "\n")
    return depth.select_complying(judge, prompts, stored)


def attack(target: Target, rows: Sequence[Record]) -> Iterator[Outcome]:
    """Begins the answer to each prompt with options.prefill.tokens of its complying answer: one query.

    A prompt without a complying answer is asked as it is. The response is the whole answer, with its prefill.
    """
    o, policy = target.options, depth.Policy(target.model, target.text)
    prefills = [
        depth.first_tokens(target.text, target.complying[row.prompt], o.prefill.tokens)
        if row.prompt in target.complying
        else []
        for row in rows
    ]
    target.check_lengths([target.text.prompt_ids(row.prompt) + prefill for row, prefill in zip(rows, prefills)])
    for start in range(0, len(rows), o.batch):
        batch = slice(start, start + o.batch)
        responses = depth.greedy_answers(policy, [row.prompt for row in rows[batch]], o, prefills[batch])
        for row, prefill, response in zip(rows[batch], prefills[batch], responses):
            yield Outcome(row.id, row.prompt, response.text, 1, {"prefilled": len(prefill)})
