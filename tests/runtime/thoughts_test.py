"""Thoughts are no part of an answer, whatever marks them."""

import time

import pytest

from drirl_jax.runtime.thoughts import MARKS, closing, open_mark, without_thought


@pytest.mark.parametrize("opening", MARKS)
def test_every_mark(opening):
    close = MARKS[opening]
    assert without_thought(f"{opening}\nIt may be Paris.\n{close}\n\nLyon.") == "Lyon."
    assert without_thought(f"{opening}\n\n{close}\n\nLyon.") == "Lyon."
    assert without_thought(f"{opening}It may be Paris.") == ""
    assert without_thought(f"It may be Paris.{close}Lyon.") == "Lyon."
    assert without_thought(f"{opening}a{opening}b{close}c{close}Lyon.") == "Lyon."
    assert open_mark(f"user: hi {opening}") == opening and closing(opening) == close
    assert open_mark(f"{opening}a{close}") == ""


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Lyon, and a < b > c.\n", "Lyon, and a < b > c.\n"),
        (" [think] about <thoughtful> <think-tank> people", " [think] about <thoughtful> <think-tank> people"),
        ("The tag `<think>` opens a thought, '</think>' closes it.",) * 2,
        ("Lyon. <think>Or Paris?", "Lyon."),
        ("Well <think>Paris?</think>it is Lyon", "Well it is Lyon"),
        ("<think>Paris</thinking>Lyon", "Lyon"),
        ("<THINK>Paris</Think> Lyon", "Lyon"),
        ('<thinking budget="9">Paris</thinking>\nLyon', "Lyon"),
        ("<think/>Lyon", "Lyon"),
        ("<think>Paris</think>", ""),
        ("Paris</think>", ""),
        ("a</think>b</think>Lyon", "Lyon"),
        ("<think>one</think><think>two</think>Lyon", "Lyon"),
        ("<|channel|>analysis<|message|>Paris?<|end|><|start|>assistant<|channel|>final<|message|>Lyon", "Lyon"),
        ("analysisParis?assistantfinalLyon", "Lyon"),
        ("analysis of Paris", "analysis of Paris"),
        ("", ""),
    ],
)
def test_the_answer_alone(text, answer):
    assert without_thought(text) == answer


def test_long_texts_take_no_long_time():
    start = time.process_time()
    for text in ("<think " * 50_000, "<think>" * 50_000, "analysis" * 50_000, "</think>" * 50_000):
        without_thought(text)
    assert time.process_time() - start < 3
