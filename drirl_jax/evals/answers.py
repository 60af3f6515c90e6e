"""A policy's answers: responses from the sampler, log-probabilities of given options, and KL on given responses."""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple, Sequence

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

MIN_BUCKET = 64  # tokens of the smallest bucket; each doubling is another compiled shape
USUAL_TOKENS = 512  # tokens of a usual prompt with its answer; a batch takes fewer of the longer ones


class Answer(NamedTuple):
    """A response.

    Attributes:
        text: the text of all its tokens.
        tokens: its number of tokens.
        finish: the entry of `rollout.FINISH` that says why it ended.
        ids: its token ids, with those of a prefill before the sampled ones.
    """

    text: str
    tokens: int
    finish: str
    ids: list[int]


class Scores(NamedTuple):
    """Scores of M options to one prompt.

    Attributes:
        total: [M] log-probability of the option, nats.
        greedy: [M] whether each token of the option is the policy's most likely token.
        tokens: [M] length of the option, tokens.
    """

    total: np.ndarray
    greedy: np.ndarray
    tokens: np.ndarray


def bucket(length: int) -> int:
    """The padded width of a text with `length` tokens."""
    width = MIN_BUCKET
    while width < length:
        width *= 2
    return width


def prompt_ids(tokens: ChatTokens, chat: Chat) -> list[int]:
    """The token ids of a prompt. A chat without a system turn gets the policy's system turn.

    Where the model's template has no system turn (Gemma 2), its text stands at the beginning of the user's turn.
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
    """Yields batches of rows with the same key: (key, row numbers, number of real rows). Repeats fill up a last batch.

    A row of a key has tokens(*key) tokens. A batch has at most batch · USUAL_TOKENS tokens, and at most as many rows
    as the smallest power of two that holds all rows of its key.
    """
    for key in sorted(set(keys)):
        key_rows = np.array([i for i, row_key in enumerate(keys) if row_key == key])
        size = min(batch, max(batch * USUAL_TOKENS // tokens(*key), 1), 1 << (len(key_rows) - 1).bit_length())
        for rows, real in batched_rows(len(key_rows), size, f"prompts of {key}"):
            yield key, key_rows[rows], real


def respond(
    model: Transformer,
    tokens: ChatTokens,
    ids: list[list[int]],
    *,
    batch: int,
    max_new: int,
    temperature: float,
    key: Array,
    prefix: tuple[int, ...] | None = None,
    prefills: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """One response to each prompt. Row i's random numbers come from (key, i), so that batches do not change them.

    Args:
        ids: token ids of the prompts: see `prompt_ids`.
        batch: prompts in a batch; fewer if they are long, or a few more so that all devices have equally many.
        max_new, temperature: see `rollout.sample`.
        prefix: see `types.Group`; each prefix compiles a program. None: the common beginning of these prompts.
        prefills: for each prompt the ids with which its response begins; the policy continues them with `max_new`
            tokens at most. None: the policy writes the whole response.

    Raises:
        InputError: a prompt, with its prefill, is too long for the model.
    """
    prefix = common_prefix(ids) if prefix is None else prefix
    prefills = [()] * len(ids) if prefills is None else prefills
    given = [[*row, *prefill] for row, prefill in zip(ids, prefills, strict=True)]
    need_positions(model.config, max(map(len, given), default=0), max_new)
    rest = [row[len(prefix) :] for row in given]
    answer_of_row: dict[int, Answer] = {}
    for (width,), rows, real in _by_bucket([(bucket(len(row)),) for row in rest], batch, lambda width: width + max_new):
        prompt, length = map(sharding.shard_prompts, pad([rest[i] for i in rows], width))
        samples = rollout.sample(
            model, prompt, length, rollout.response_keys(key, jnp.asarray(rows), 1),
            max_new=max_new, temperature=temperature, eos=tokens.eos_ids, prefix=prefix,
        )  # fmt: skip
        responses, lengths, finish = sharding.fetch(
            (samples.response[:, 0], samples.response_len[:, 0], samples.finish[:, 0])
        )
        for n, i in enumerate(rows[:real]):
            whole = [*prefills[i], *responses[n, : lengths[n]].tolist()]
            answer_of_row[int(i)] = Answer(
                tokens.decode(whole, len(whole)), len(whole), rollout.FINISH[finish[n]], whole
            )
    return [answer_of_row[i] for i in range(len(ids))]


@jax.jit
def option_logprobs(model: Transformer, group: Group) -> tuple[Array, Array]:
    """[P, G] log-probability of each whole response, nats, and [P, G] whether each token is the most likely one."""
    hidden = transformer.apply(model, group, remat=False)
    logp_PGT, _ = vocabulary.token_logprobs(model, hidden, group, 1.0)
    mask_PGT = length_mask(group.response_len, group.response.shape[-1])
    unembed_VD = transformer.cast(model.unembed, model.config)

    def most_likely_token(hidden_PGD):
        return jnp.argmax(einsum_f32("pgd,vd->pgv", hidden_PGD, unembed_VD), axis=-1)

    best_TPG = jax.lax.map(most_likely_token, jnp.moveaxis(transformer.predicting_states(hidden, group), 2, 0))
    greedy_PG = jnp.all(jnp.moveaxis(best_TPG, 0, 2) == group.response, axis=-1, where=mask_PGT)
    return logp_PGT.sum(axis=-1, where=mask_PGT), greedy_PG


def _groups(
    model: Transformer, ids: list[list[int]], responses: Sequence[Sequence[list[int]]], batch: int
) -> Iterator[tuple[Group, np.ndarray, int]]:
    """Yields (group, row numbers, number of real rows): batches of prompts with their responses, padded alike.

    Args:
        ids: token ids of the prompts.
        responses: for each prompt the token ids of its responses, at least one id in each.
        batch: prompts in a batch: see `_by_bucket`.

    Raises:
        InputError: a prompt with its response is too long for the model.
    """
    for row, row_responses in zip(ids, responses):
        need_positions(model.config, len(row), max(map(len, row_responses)))
    prefix = common_prefix(ids)
    rest = [row[len(prefix) :] for row in ids]
    shapes = [
        (len(row_responses), bucket(len(row)), bucket(max(map(len, row_responses))))
        for row, row_responses in zip(rest, responses)
    ]
    for (members, width, response_width), rows, real in _by_bucket(shapes, batch, lambda M, S, T: S + M * T):
        prompt, prompt_len = pad([rest[i] for i in rows], width)
        response, length = pad([response for i in rows for response in responses[i]], response_width)
        response, length = response.reshape(len(rows), members, response_width), length.reshape(len(rows), members)
        arrays = map(sharding.shard_prompts, (prompt, prompt_len, response, length, np.zeros(len(rows), np.int32)))
        yield Group(*arrays, prefix=prefix), rows, real


def score_options(
    model: Transformer, ids: list[list[int]], options: Sequence[Sequence[list[int]]], *, batch: int
) -> list[Scores]:
    """log π(option | prompt) of each prompt's options. The options are one group: the prompt passes the network once.

    Args:
        ids: token ids of the prompts.
        options: for each prompt the token ids of its options, at least one id in each.
        batch: prompts in a batch; fewer if they are long, or a few more so that all devices have equally many.

    Raises:
        InputError: a prompt with its option is too long for the model.
    """
    scores_of_row: dict[int, Scores] = {}
    for group, rows, real in _groups(model, ids, options, batch):
        total, greedy, length = sharding.fetch((*option_logprobs(model, group), group.response_len))
        scores_of_row |= {int(i): Scores(total[n], greedy[n], length[n]) for n, i in enumerate(rows[:real])}
    return [scores_of_row[i] for i in range(len(ids))]


@jax.jit
def response_kl(model: Transformer, reference: Transformer, group: Group) -> Array:
    """[P, G, T] `vocabulary.token_kl` of two policies on the responses of a group, nats."""
    hidden, reference_hidden = (transformer.apply(policy, group, remat=False) for policy in (model, reference))
    return vocabulary.token_kl(model, hidden, reference, reference_hidden, group)


def kl_by_token(
    model: Transformer, reference: Transformer, ids: list[list[int]], responses: Sequence[list[int]], *, batch: int
) -> list[np.ndarray]:
    """KL(π ‖ π_ref) at each token of each prompt's response: for each prompt an array [length], nats.

    Args:
        model, reference: π and π_ref, which have the same vocabulary.
        ids: token ids of the prompts.
        responses: for each prompt the token ids of one response, at least one.
        batch: prompts in a batch; fewer if they are long, or a few more so that all devices have equally many.

    Raises:
        InputError: a prompt with its response is too long for the model.
    """
    kl_of_row: dict[int, np.ndarray] = {}
    for group, rows, real in _groups(model, ids, [[response] for response in responses], batch):
        kl_PGT = sharding.fetch(response_kl(model, reference, group))
        kl_of_row |= {int(i): kl_PGT[n, 0, : len(responses[i])] for n, i in enumerate(rows[:real])}
    return [kl_of_row[i] for i in range(len(ids))]
