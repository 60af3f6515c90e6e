"""What a policy answers: responses drawn by the sampler, and log-probabilities of given options."""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax import rollout
from drirl_jax.data.examples import common_prefix
from drirl_jax.data.text import ChatTokens, pad
from drirl_jax.models import transformer, vocabulary
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.attention import einsum_f32
from drirl_jax.models.templates import TemplateRefusal
from drirl_jax.models.transformer import Transformer
from drirl_jax.runtime import sharding
from drirl_jax.runtime.endpoint import Chat
from drirl_jax.stages.base import batched_rows
from drirl_jax.types import Array, Group, length_mask

SMALLEST = 64  # tokens; a shape is compiled for each doubling
USUAL = 512  # tokens of a prompt and what follows it: of longer ones fewer are taken at a time


class Answer(NamedTuple):
    """A response: its text, how many tokens it has, and the row of `rollout.FINISH` that it ended by."""

    text: str
    tokens: int
    finish: str


class Scores(NamedTuple):
    """Of M options to one prompt.

    Attributes:
        total: [M] log-probability in nats.
        greedy: [M] whether the policy would say just this, taking the most likely token each time.
        tokens: [M] their lengths.
    """

    total: np.ndarray
    greedy: np.ndarray
    tokens: np.ndarray


def bucket(length: int) -> int:
    """The width that so many tokens are padded to."""
    width = SMALLEST
    while width < length:
        width *= 2
    return width


def ids_of(tokens: ChatTokens, chat: Chat) -> list[int]:
    """The prompt's ids; without a system turn of its own it has that of the policy.

    Where the model's template knows no system turn (Gemma 2), what it says stands at the head of the user's.
    """
    chat = tokens.with_system(chat)
    try:
        return tokens.chat_ids(chat)
    except TemplateRefusal:
        if chat[0]["role"] != "system":
            raise
        head = f"{chat[0]['content']}\n\n" if chat[0]["content"] else ""
        return tokens.chat_ids([{"role": "user", "content": head + chat[1]["content"]}, *chat[2:]])


def _by_bucket(keys: Sequence, batch: int, tokens: Callable):
    """(key, row numbers filled up by repeats, how many are real) of all rows, those of one key together.

    A batch has no more than batch · USUAL tokens, of which a row of this key has tokens(*key), and no more rows than
    the power of two that all rows of the key fit in.
    """
    for key in sorted(set(keys)):
        of_key = np.array([i for i, k in enumerate(keys) if k == key])
        size = min(batch, max(batch * USUAL // tokens(*key), 1), 1 << (len(of_key) - 1).bit_length())
        for rows, real in batched_rows(len(of_key), size, f"prompts of {key}"):
            yield key, of_key[rows], real


def respond(
    model: Transformer,
    tokens: ChatTokens,
    ids: Sequence[list[int]],
    *,
    batch: int,
    max_new: int,
    temperature: float,
    key: Array,
    prefix: tuple[int, ...] | None = None,
) -> list[Answer]:
    """One response to each prompt; row i's random numbers come from (key, i), whatever the batches.

    Args:
        ids: of the prompts: see `ids_of`.
        batch: prompts at a time, fewer of long ones, or a few more to deal them out evenly.
        max_new, temperature: see `rollout.sample`.
        prefix: see `types.Group`; a program is compiled for each. None: what these prompts have in common.

    Raises:
        InputError: a prompt is too long for the model.
    """
    need_positions(model.config, max(map(len, ids), default=0), max_new)
    prefix = common_prefix(ids) if prefix is None else prefix
    rest = [row[len(prefix) :] for row in ids]
    found: dict[int, Answer] = {}
    for (width,), rows, real in _by_bucket([(bucket(len(row)),) for row in rest], batch, lambda width: width + max_new):
        prompt, length = map(sharding.shard_prompts, pad([rest[i] for i in rows], width))
        out = rollout.sample(
            model, prompt, length, rollout.response_keys(key, jnp.asarray(rows), 1),
            max_new=max_new, temperature=temperature, eos=tokens.eos_ids, prefix=prefix,
        )  # fmt: skip
        said, lengths, finish = sharding.fetch((out.response[:, 0], out.response_len[:, 0], out.finish[:, 0]))
        for n, i in enumerate(rows[:real]):
            text = tokens.decode(said[n], lengths[n])
            found[int(i)] = Answer(text, int(lengths[n]), rollout.FINISH[finish[n]])
    return [found[i] for i in range(len(ids))]


@jax.jit
def option_logprobs(model: Transformer, group: Group) -> tuple[Array, Array]:
    """[P, G] log-probability of each whole response, nats, and whether each of its tokens is the most likely one."""
    hidden = transformer.apply(model, group, remat=False)
    logp_PGT, _ = vocabulary.token_logprobs(model, hidden, group, 1.0)
    mask_PGT = length_mask(group.response_len, group.response.shape[-1])
    unembed_VD = transformer.cast(model.unembed, model.config)

    def likeliest(hidden_PGD):
        return jnp.argmax(einsum_f32("pgd,vd->pgv", hidden_PGD, unembed_VD), axis=-1)

    best_TPG = jax.lax.map(likeliest, jnp.moveaxis(transformer.predicting_states(hidden, group), 2, 0))
    greedy_PG = jnp.all(jnp.moveaxis(best_TPG, 0, 2) == group.response, axis=-1, where=mask_PGT)
    return logp_PGT.sum(axis=-1, where=mask_PGT), greedy_PG


def score_options(
    model: Transformer, ids: Sequence[list[int]], options: Sequence[Sequence[list[int]]], *, batch: int
) -> list[Scores]:
    """log π(option | prompt) of each prompt's options: they are its group, so that the prompt passes once for all.

    Args:
        ids: of the prompts.
        options: of each prompt the ids of its options, at least one id each.
        batch: prompts at a time, fewer of long ones, or a few more to deal them out evenly.

    Raises:
        InputError: a prompt with its option is too long for the model.
    """
    for row, of in zip(ids, options):
        need_positions(model.config, len(row), max(map(len, of)))
    prefix = common_prefix(ids)
    rest = [row[len(prefix) :] for row in ids]
    shapes = [(len(of), bucket(len(row)), bucket(max(map(len, of)))) for row, of in zip(rest, options)]
    found: dict[int, Scores] = {}
    for (members, width, longest), rows, real in _by_bucket(shapes, batch, lambda M, S, T: S + M * T):
        prompt, prompt_len = pad([rest[i] for i in rows], width)
        response, length = pad([option for i in rows for option in options[i]], longest)
        response, length = response.reshape(len(rows), members, longest), length.reshape(len(rows), members)
        arrays = map(sharding.shard_prompts, (prompt, prompt_len, response, length, np.zeros(len(rows), np.int32)))
        total, greedy = sharding.fetch(option_logprobs(model, Group(*arrays, prefix=prefix)))
        found |= {int(i): Scores(total[n], greedy[n], length[n]) for n, i in enumerate(rows[:real])}
    return [found[i] for i in range(len(ids))]
