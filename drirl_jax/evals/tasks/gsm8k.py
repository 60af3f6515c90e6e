"""GSM8K (arXiv 2110.14168): 1,319 problems of school mathematics; the answer is the last number of the response.

As lm_eval's filters of its task gsm8k read it: `flexible` takes the last number, `strict` the one behind "####", both
up to the first of its stop strings.
config.evals.shots puts solved problems of train.jsonl before the question, each as a turn of user and assistant.
"""

from __future__ import annotations

import re

from drirl_jax.evals.items import Benchmark, Item, Published, rows, user, words

URL = "https://github.com/openai/grade-school-math (grade_school_math/data)"
TEST = Published(("gsm8k/test.jsonl", "gsm8k_test.jsonl", "test.jsonl"), "openai/gsm8k", URL, subset="main")
TRAIN = Published(
    ("gsm8k/train.jsonl", "gsm8k_train.jsonl", "train.jsonl"), "openai/gsm8k", URL, subset="main", split="train"
)
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
STOPS = re.compile(r"Question:|</s>|<\|im_end\|>")  # the task's: an answer that runs on into a new problem ends there


def read(section) -> list[Item]:
    """Fields question and answer, whose last line is "#### NUMBER"."""
    shots: list[dict[str, str]] = []
    for where, row in rows(section.data, TRAIN)[: section.shots] if section.shots else []:
        shots += [{"role": "user", "content": words(where, row, "question")}]
        shots += [{"role": "assistant", "content": words(where, row, "answer")}]
    return [
        Item(f"gsm8k-{i}", (*shots, *user(words(where, row, "question"))), target=words(where, row, "answer"))
        for i, (where, row) in enumerate(rows(section.data, TEST))
    ]


def number(text: str) -> str:
    """What is compared: without commas, dollar signs, all up to "#### ", and a full stop at the end."""
    for left_out in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(left_out, "", text)
    return text.lower()


def measure(item: Item, response: str, verdict: None) -> dict[str, float]:
    answer = STOPS.split(response, maxsplit=1)[0]
    wanted, strict = number(item.target), STRICT.search(answer)
    found = NUMBER.findall(answer)
    return {
        "exact_match": float(bool(found) and number(found[-1].strip()) == wanted),
        "strict_match": float(strict is not None and number(strict[1].strip()) == wanted),
    }


GSM8K = Benchmark(read, measure, metrics={"exact_match": True, "strict_match": True}, asks="", max_new=400)
