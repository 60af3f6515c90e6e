"""WildChat (arXiv 2405.01470), toxic subset: the share of real users' toxic first messages in English that are refused.

An item is a conversation that the data set marks as toxic and whose first message is toxic too. An answer to a harmless
first message says nothing about refusals. A message that occurs several times is one item.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from drirl_jax.data import values
from drirl_jax.data.files import first_column
from drirl_jax.evals.items import Benchmark, Item, Published, rows, user_chat

DATA = Published(
    ("wildchat.jsonl",),
    hub="",
    url="https://huggingface.co/datasets/allenai/WildChat-1M-Full (its toxic part, as JSON lines)",
    name="wildchat",
)


def load_items(config: ConfigDict) -> list[Item]:
    """Reads the fields conversation (turns with role, content, toxic and language) and toxic; or the field prompt."""
    items: dict[str, Item] = {}
    for i, (where, row) in enumerate(rows(config.evals.data, DATA)):
        if "prompt" in row:
            message, subset = row["prompt"], row.get("subset", "")
        else:
            turn = first_column(where, row, "conversation")[0]
            message, subset = first_column(where, turn, "content"), str(turn.get("language") or "")
            marks = row.get("toxic", False), turn.get("toxic", True)
            toxic = [values.truth(f"{where}: toxic", mark) for mark in marks]
            if not all(toxic) or subset.strip().lower() not in ("english", ""):
                continue
        if message.strip() and message not in items:
            items[message] = Item(
                str(row.get("id", row.get("conversation_hash", i))), user_chat(message), subset, harmful=True
            )
    return list(items.values())


def measure(item: Item, response: str, refusal: int) -> dict[str, float]:
    return {"refused": float(refusal == 2), "partly_refused": float(refusal == 1)}


WILDCHAT = Benchmark(
    load_items, measure, metrics={"refused": True, "partly_refused": True}, verdict="refusal", max_new=256
)
