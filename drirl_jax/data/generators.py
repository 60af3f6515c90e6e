"""The generators of demonstrations: the policy itself, or a model behind an endpoint (table GENERATORS)."""

from __future__ import annotations

import pathlib
import time
from typing import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from drirl_jax import rollout
from drirl_jax.data import text
from drirl_jax.data.records import SEPARATOR
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime.endpoint import Chat, Endpoint, Reply
from drirl_jax.runtime.progress import with_progress

Generate = Callable[[list[Chat], int], list[Reply]]  # (chats, seed) -> replies
BUCKET = 64  # prompts are padded to a multiple of so many tokens, so that few shapes are compiled


def by_policy(
    section: ConfigDict, load: Callable[[], tuple[Transformer, text.ChatTokens]], memory: pathlib.Path
) -> Generate:
    """Generates with the policy of config.policy, which `load` loads. Of a chat only the last message is used."""
    model, tokens = load()

    def generate(chats, seed):
        replies = []
        ids = [tokens.prompt_ids(chat[-1]["content"]) for chat in chats]
        longest = max(map(len, ids))
        need_positions(model.config, longest, section.max_new)
        size = -(-longest // BUCKET) * BUCKET
        key = jax.random.fold_in(jax.random.key(seed), 0)
        for start in with_progress(range(0, len(ids), section.batch), "replies", "batch"):
            rows = [
                (start + i) % len(ids) for i in range(section.batch)
            ]  # the last batch is filled with the first prompts
            batch_size = min(section.batch, len(ids) - start)
            prompt, length = text.pad([ids[i] for i in rows], size)
            start_time = time.perf_counter()
            out = rollout.sample(
                model, jnp.asarray(prompt), jnp.asarray(length), rollout.response_keys(key, jnp.asarray(rows), 1),
                max_new=section.max_new, temperature=section.temperature, eos=tokens.eos_ids,
            )  # fmt: skip
            response_ids, lengths, finish = jax.device_get(
                (out.response[:, 0], out.response_len[:, 0], out.finish[:, 0])
            )
            seconds = (time.perf_counter() - start_time) / batch_size
            replies += [
                Reply(tokens.decode(response_ids[i], lengths[i]), int(lengths[i]), rollout.FINISH[finish[i]], seconds)
                for i in range(batch_size)
            ]
        return replies

    return generate


def by_endpoint(section: ConfigDict, load: Callable, memory: pathlib.Path) -> Generate:
    """Generates with the model of config.demos.endpoint. It keeps replies that have an answer in `memory`, so that an
    interrupted run can continue."""
    ask = Endpoint(section.endpoint, memory)
    options = {"max_tokens": section.max_new, "temperature": section.temperature}

    def has_answer(text: str) -> bool:
        return bool(text.partition(SEPARATOR)[2].strip())

    return lambda chats, seed: ask(chats, **options, seed=seed, readable=has_answer)


# (config.demos, loads the policy, file for the replies) -> Generate
GENERATORS = {"policy": by_policy, "endpoint": by_endpoint}
