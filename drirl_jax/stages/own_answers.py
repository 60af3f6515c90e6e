"""Answers of the policy itself to training prompts. They are sampled once and kept in the workdir.

The stage `sft` learns to answer harmless prompts from them (config.sft.harmless), so that the policy loses less of what
it could do. It also takes from them the openings from which an answer must recover (config.sft.recovery).
"""

from __future__ import annotations

import json
import logging
import re
from typing import Callable

from drirl_jax.data.examples import Examples
from drirl_jax.data.text import split_sentences
from drirl_jax.rollout import FINISH
from drirl_jax.runtime import json_files, processes
from drirl_jax.runtime.files import replace_file
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.stages.base import Context, sample_all

log = logging.getLogger(__name__)

FOLDER = "own_answers"
OWN_ANSWER = {"id": str, "answer": str}  # what is read of a row of its files
HINT = "remove it and start the run again, which samples the answers anew"
LAST_MARK = re.compile(r"\n\s*(?:\d+[.)]|[-*•])\s*$")  # of a list item without text
Choose = Callable[[str, str, bool], str]  # (prompt, answer, whether it ended) -> the text to keep; "": none


def whole_sentences(answer: str, ended: bool) -> str:
    """The answer; if it was cut off, the answer up to its last whole sentence. "" if it has no whole sentence."""
    if ended:
        return answer.strip()
    *whole, last = split_sentences(answer) or [""]
    kept = answer[: answer.rfind(last)] if whole else ""
    return LAST_MARK.sub("", kept.rstrip()).strip()


def own_answers(
    context: Context, name: str, examples: Examples, choose: Choose, *, max_new: int, temperature: float
) -> dict[str, str]:
    """One answer of the trunk to each prompt, as text by the record's id; a record without a usable answer is absent.

    Args:
        name: of the file in workdir/own_answers, which a later start reads instead of sampling again.
        examples: the prompts.
        choose: which part of an answer to keep.
        max_new: most tokens of an answer.
        temperature: 0 for the most likely tokens.
    """
    path = context.workdir and context.workdir.local / FOLDER / f"{name}.jsonl"
    stored = processes.ask_once(lambda: json_files.rows(path, OWN_ANSWER, HINT) if path and path.exists() else None)
    if stored is None:
        stored = _sample(context, examples, choose, max_new, temperature)
        if path and processes.is_writer():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in stored))
    log.info("%d of %d prompts have an own answer of kind %s", len(stored), len(examples.id), name)
    return {row["id"]: row["answer"] for row in stored}


def _sample(
    context: Context, examples: Examples, choose: Choose, max_new: int, temperature: float
) -> list[dict[str, str]]:
    """The rows of the file: {"id", "prompt", "answer"}."""
    c = context.config
    rollout = sample_all(
        context, context.model, examples, context.key("own_answers"), c.evals.batch,
        group=1, max_new=max_new, temperature=temperature,
    )  # fmt: skip
    rows = []
    for i, (id_, prompt) in enumerate(zip(examples.id, examples.prompt_text)):
        ids, length = rollout.response[i, 0], int(rollout.response_len[i, 0])
        ended = bool(rollout.finish[i, 0] == FINISH.index("stop"))
        answer = choose(prompt, without_thought(context.text.decode(ids, length)), ended)
        if answer:
            rows.append({"id": id_, "prompt": prompt, "answer": answer})
    return rows
