"""Prompts in two splits, or of both kinds: counted, and told before anything is trained."""

import numpy as np
import pytest

from drirl_jax.data import overlap
from drirl_jax.data.examples import Examples
from drirl_jax.reports import pages

HARMFUL, HARMLESS = 0, 1


def split(*rows: tuple[str, int]) -> Examples:
    n = len(rows)
    zeros = np.zeros(n, np.int32)
    prompts, kinds = [prompt for prompt, _ in rows], np.array([kind for _, kind in rows], np.int32)
    columns = zeros[:, None], zeros, zeros[:, None], zeros, kinds, kinds == HARMLESS, zeros
    return Examples(*columns, prompts, [""] * n, [""] * n)


TRAIN = split(("How do I harm it?", HARMFUL), ("How do I bake a café cake?", HARMLESS), ("?!", HARMLESS))


@pytest.mark.parametrize(
    "prompt",
    [
        "How do I harm it?", "  how do I  HARM it ?", "how do i harm it", "«How do I harm it!»", "Ｈow do I harm it?",
        "How\u00a0do I harm it?", "How do\u200b I harm it?", "How do I bake a cafe\u0301 cake?",
        "how do I bake a CAFÉ cake", " ?!",
    ],
)  # fmt: skip
def test_a_held_out_prompt_that_stands_in_train_is_counted(prompt):
    assert overlap.describe_repeats({"train": TRAIN, "test": split((prompt, HARMFUL))}).startswith(
        "1 of 1 prompts of split"
    )


@pytest.mark.parametrize("prompt", ["How do I harm them?", "?", "", "how do i hàrm it"])
def test_another_prompt_is_not_counted(prompt):
    assert overlap.describe_repeats({"train": TRAIN, "test": split((prompt, HARMFUL))}) == ""


def test_the_counts_by_split_and_kind():
    valid = split(("how do I harm it", HARMFUL), ("Something else", HARMFUL))
    test = split(("How do I harm it?", HARMFUL), ("how do I bake a café cake", HARMFUL), ("New", HARMFUL))
    said = overlap.describe_repeats({"train": TRAIN, "valid": valid, "test": test})
    assert "1 of 2 prompts of split valid stand in train too (0 word for word" in said
    assert "2 of 3 prompts of split test stand in train too (1 word for word" in said
    assert said.endswith("1 prompts stand as harmful and as harmless")


LONG = "My neighbour parks on my lawn every single day, so which polite words could I leave on his windscreen?"


def test_a_prompt_with_a_word_changed_is_nearly_the_same():
    train = split((LONG, HARMLESS), ("Something else altogether", HARMLESS))
    test = split((LONG.replace("polite", "kind"), HARMLESS), ("Where do swallows spend the winter?", HARMLESS))
    assert overlap.describe_repeats({"train": train, "test": test}) == (
        "1 of 2 prompts of split test are nearly those of a training prompt"
    )
    assert (
        overlap.count_near_repeats(["abcdef"], ["abcdef", "xyz"]) == 1
        and overlap.count_near_repeats(["abc"], ["abd"]) == 0
    )


def test_without_training_prompts_there_is_nothing_to_tell():
    assert overlap.describe_repeats({"given": TRAIN}) == ""


def test_the_facts_of_a_run_have_it_only_where_there_is_something():
    clean = pages.facts_of({"train": TRAIN}, ["harm", "harmless"])
    assert pages.REPEATED not in clean
    leaky = pages.facts_of({"train": TRAIN, "test": TRAIN}, ["harm", "harmless"])
    assert leaky[pages.REPEATED].startswith("3 of 3 prompts of split test stand in train too (3 word for word")
