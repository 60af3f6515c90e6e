"""Minimal pairs: of two English sentences that differ in a word or in order, the right one should be more likely.

The pairs were written for this project, in minimal_pairs.jsonl beside this file, in the manner of BLiMP (arXiv
1912.00582): grammar, the use of words, and common knowledge. The sentences are not BLiMP's.

The sentences are scored as answers to one fixed request in the chat form, because policies are trained and used in this
form, and because not every model has a token that can stand before a bare sentence. The score of a sentence is the sum
of the log-probabilities of its tokens, as in BLiMP. Both sentences of a pair have the same number of words, but not
always of tokens, and a longer one tends to have the smaller sum. So `accuracy_same_length` gives the pairs whose
sentences have equally many tokens by themselves.
"""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from drirl_jax.data.files import read_table
from drirl_jax.evals.items import Benchmark, Item, option_chance, text_field, user_chat

FILE = pathlib.Path(__file__).with_name("minimal_pairs.jsonl")
REQUEST = "Write one sentence in correct English."


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the fields id, phenomenon, good and bad. The good sentence is option 0."""
    return [
        Item(
            text_field(where, row, "id"),
            user_chat(REQUEST),
            text_field(where, row, "phenomenon"),
            target="0",
            options=(text_field(where, row, "good"), text_field(where, row, "bad")),
        )
        for where, row in read_table(FILE)
    ]


def measure(item: Item, scores, verdict: None) -> dict[str, float]:
    right = {"accuracy": float(scores.total[0] > scores.total[1])}
    same_length = scores.tokens[0] == scores.tokens[1]
    return right | ({"accuracy_same_length": right["accuracy"]} if same_length else {})


MINIMAL_PAIRS = Benchmark(
    load_items,
    measure,
    metrics={"accuracy": True, "accuracy_same_length": True},
    verdict="",
    max_new=0,
    tax={"accuracy": option_chance, "accuracy_same_length": option_chance},
)
