"""GSM8K (arXiv 2110.14168): 1,319 problems of school mathematics. The answer is the last number of the response.

lm_eval's filters of its task gsm8k read answers in the same way. `exact_match` takes the last number (its flexible
filter), `strict_match` the number after "####" (its strict filter). Both read up to the first stop string of the task.
config.evals.shots puts solved problems of train.jsonl before the question, each as a turn of user and assistant.
"""

from __future__ import annotations

import re
from typing import Sequence

from ml_collections import ConfigDict

from drirl_jax.evals.items import Benchmark, Item, Published, commonest_answer_chance, rows, text_field, user_chat

URL = "https://github.com/openai/grade-school-math (grade_school_math/data)"
TEST = Published(("gsm8k/test.jsonl", "gsm8k_test.jsonl", "test.jsonl"), "openai/gsm8k", URL, subset="main")
TRAIN = Published(
    ("gsm8k/train.jsonl", "gsm8k_train.jsonl", "train.jsonl"), "openai/gsm8k", URL, subset="main", split="train"
)
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
STOPS = re.compile(r"Question:|</s>|<\|im_end\|>")  # lm_eval's: they end an answer that runs on into a new problem


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the fields question and answer. The last line of an answer is "#### NUMBER"."""
    shots: list[dict[str, str]] = []
    for where, row in rows(config.evals.data, TRAIN)[: config.evals.shots] if config.evals.shots else []:
        shots += [{"role": "user", "content": text_field(where, row, "question")}]
        shots += [{"role": "assistant", "content": text_field(where, row, "answer")}]
    return [
        Item(
            f"gsm8k-{i}",
            (*shots, *user_chat(text_field(where, row, "question"))),
            target=text_field(where, row, "answer"),
        )
        for i, (where, row) in enumerate(rows(config.evals.data, TEST))
    ]


def number(text: str) -> str:
    """The number in a form to compare: without commas, dollar signs, text up to "#### ", and a final full stop."""
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def measure(item: Item, response: str, verdict: None) -> dict[str, float]:
    answer = STOPS.split(response, maxsplit=1)[0]
    target, strict_match = number(item.target), STRICT.search(answer)
    numbers = NUMBER.findall(answer)
    return {
        "exact_match": float(bool(numbers) and number(numbers[-1].strip()) == target),
        "strict_match": float(strict_match is not None and number(strict_match[1].strip()) == target),
    }


def chance(items: Sequence[Item]) -> float:
    return commonest_answer_chance([number(item.target) for item in items])


GSM8K = Benchmark(
    load_items,
    measure,
    metrics={"exact_match": True, "strict_match": True},
    verdict="",
    max_new=400,
    tax={"exact_match": chance, "strict_match": chance},
)
