"""GCG (Zou et al., arXiv 2307.15043): a search for a token suffix that makes the beginning of an answer likely.

A step runs two jitted programs with fixed shapes. `propose` computes the gradient and samples candidates. The host then
checks the candidates as text. `target.jitted_goal_losses` computes their losses. All candidates are one group of one
prompt, so the chat up to the suffix passes through the network once for all of them.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax.attacks.target import Outcome, Target, goal_losses, jitted_goal_losses
from drirl_jax.data.examples import common_prefix
from drirl_jax.data.records import Record
from drirl_jax.data.text import ChatTokens
from drirl_jax.models.attention import einsum_f32
from drirl_jax.models.transformer import Transformer, cast, run_trunk
from drirl_jax.runtime import sharding
from drirl_jax.types import Array, Group, InputError

FILLER = " !"  # the first suffix repeats this
SPARE = 2  # candidates sampled for each one that is read: some change when they are written as text


class Frame(NamedTuple):
    """The chat of a prompt, in parts around the suffix.

    Attributes:
        prompt: the text of the user's turn.
        before: token ids before the suffix.
        suffix: token ids of the first suffix.
        after: token ids after the suffix, up to the beginning of the answer.
    """

    prompt: str
    before: list[int]
    suffix: list[int]
    after: list[int]


def make_frame(text: ChatTokens, prompt: str, length: int) -> Frame:
    """The chat of the prompt, followed by a suffix of `length` fillers.

    Raises:
        InputError: the tokenizer merges the end of the prompt with the suffix.
    """
    prompt = prompt.rstrip()
    ids, plain_ids, other_ids = (text.prompt_ids(prompt + ending) for ending in (FILLER * length, "", " ?"))
    after_len = len(common_prefix([ids[::-1], other_ids[::-1]]))
    before, suffix_end = plain_ids[: len(plain_ids) - after_len], len(ids) - after_len
    frame = Frame(prompt, before, ids[len(before) : suffix_end], ids[suffix_end:])
    if not survives_tokenizer(text, frame, frame.suffix):
        raise InputError(
            f"the tokenizer splits {prompt[:40]!r} in another way before a suffix: leave out the prompt or GCG."
        )
    return frame


def message(text: ChatTokens, frame: Frame, suffix: Sequence[int]) -> str:
    """The text of the user's turn with the suffix."""
    # Decodes the suffix together with the ids before it: some tokenizers drop the first space of a text.
    decode = partial(text.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return frame.prompt + decode([*frame.before, *suffix])[len(decode(frame.before)) :]


def survives_tokenizer(text: ChatTokens, frame: Frame, suffix: Sequence[int]) -> bool:
    """Whether the suffix gives the same tokens after it was decoded to text and encoded again in the chat."""
    return text.prompt_ids(message(text, frame, suffix)) == [*frame.before, *suffix, *frame.after]


def allowed_tokens(text: ChatTokens, vocab: int) -> np.ndarray:
    """[V] bool: the tokens that a suffix may contain. They are printable ASCII and no control tokens."""
    control_ids = {*text.tokenizer.all_special_ids, *text.tokenizer.added_tokens_decoder}
    ids = [i for i in range(min(vocab, len(text.tokenizer))) if i not in control_ids]
    allowed = np.zeros(vocab, bool)
    for i, token in zip(ids, text.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)):
        allowed[i] = token.isascii() and token.isprintable() and token != ""
    return allowed


def make_group(target: Target, frame: Frame, suffix_GL: np.ndarray, copies: int = 1) -> Group:
    """One group of the suffixes, each followed by the rest of the chat and the target.

    The suffixes are spread over `copies` of the prompt, so that each device can have its own copy.
    """
    tail = np.array([*frame.after, *target.goal_ids()], np.int32)
    response_GT = np.concatenate([suffix_GL, np.broadcast_to(tail, (len(suffix_GL), len(tail)))], axis=1)
    response = response_GT.reshape(copies, -1, response_GT.shape[1]).astype(np.int32)
    arrays = (response, np.full(response.shape[:2], response.shape[2], np.int32), np.zeros(copies, np.int32))
    return Group(*target.pad_prompts([frame.before] * copies), *map(sharding.shard_prompts, arrays))


def gradient(model: Transformer, group: Group, suffix_len: int, goal_len: int) -> tuple[Array, Array]:
    """The goal's loss after the first suffix, and ∂loss/∂onehot [L, V] of the suffix's L = `suffix_len` tokens.

    An embedding is the one-hot row times the table: x = s·1ᵀE. So ∂loss/∂1 = s·(∂loss/∂x) Eᵀ.
    """
    group = group.members(slice(1))
    embeddings = run_trunk(model, group, 0)

    def loss_of_embeddings(x_PLD):
        response = embeddings.response.at[:, 0, :suffix_len].set(x_PLD)
        return goal_losses(model, group, goal_len, embeddings.replace(response=response)).mean()

    loss, grad_PLD = jax.value_and_grad(loss_of_embeddings)(embeddings.response[:, 0, :suffix_len])
    grad_LD = grad_PLD.sum(axis=0)  # over the P copies of one prompt
    return loss, model.config.embed_scale * einsum_f32("ld,vd->lv", grad_LD, cast(model.embed[...], model.config))


@partial(jax.jit, static_argnames=("suffix_len", "goal_len", "topk", "count"))
def propose(model: Transformer, group: Group, allowed_V: Array, key: Array, *, suffix_len, goal_len, topk, count):
    """The loss of the group's first suffix, and candidate suffixes [count, L].

    A candidate is the first suffix with one token replaced, at a random position. The new token is one of the `topk`
    allowed tokens with the most negative gradient at this position.
    """
    loss, grad_LV = gradient(model, group, suffix_len, goal_len)
    _, best_LK = jax.lax.top_k(jnp.where(allowed_V, -grad_LV, -jnp.inf), topk)
    position_key, choice_key = jax.random.split(key)
    position_N = jax.random.randint(position_key, (count,), 0, suffix_len)
    choice_N = jax.random.randint(choice_key, (count,), 0, topk)
    suffix_NL = jnp.tile(group.response[0, 0, :suffix_len], (count, 1))
    return loss, suffix_NL.at[jnp.arange(count), position_N].set(best_LK[position_N, choice_N])


def attack(target: Target, rows: Sequence[Record]) -> Iterator[Outcome]:
    """GCG on each prompt: at most steps · (width + 1) + steps / check + 1 queries."""
    allowed_V = allowed_tokens(target.text, target.model.config.vocab)
    frames = [make_frame(target.text, row.prompt, target.options.gcg.suffix) for row in rows]
    target.check_lengths([[*frame.before, *frame.suffix, *frame.after] for frame in frames])
    for row, frame in zip(rows, frames):
        yield search(target, row, frame, allowed_V)


def search(target: Target, row: Record, frame: Frame, allowed_V: np.ndarray) -> Outcome:
    """GCG on one prompt. A step starts from the last step's best candidate. The best suffix of all steps is tried."""
    o, goal_len, copies = target.options.gcg, len(target.goal_ids()), sharding.axis_size("prompts")
    suffix_len, topk = len(frame.suffix), min(o.topk, int(allowed_V.sum()))
    key = jax.random.key(target.rng(row).integers(2**31))
    suffix = best = frame.suffix
    queries, n_checked, n_lost = 0, 0, 0
    for step in range(o.steps):
        outputs = propose(
            target.model, make_group(target, frame, np.array([suffix] * copies), copies), allowed_V,
            jax.random.fold_in(key, step), suffix_len=suffix_len, goal_len=goal_len, topk=topk, count=SPARE * o.width,
        )  # fmt: skip
        loss, proposed = sharding.fetch(outputs)
        if step == 0:
            first_loss = lowest_loss = float(loss)
        candidates = []
        for candidate in dict.fromkeys(map(tuple, proposed.tolist())):
            if len(candidates) == o.width:
                break
            is_stable = survives_tokenizer(target.text, frame, candidate)
            candidates += [candidate] * is_stable
            n_checked, n_lost = n_checked + 1, n_lost + (not is_stable)
        queries += 1 + len(candidates)
        if candidates:
            padded = np.array([candidates[i % len(candidates)] for i in range(o.width)])
            loss_G = sharding.fetch(
                jitted_goal_losses(target.model, make_group(target, frame, padded, copies), goal_len=goal_len)
            ).reshape(-1)
            suffix = candidates[loss_G.argmin() % len(candidates)]
            if loss_G.min() < lowest_loss:
                lowest_loss, best = float(loss_G.min()), suffix
        if (step + 1) % o.check == 0 or step + 1 == o.steps:
            attempt = message(target.text, frame, best)
            response, queries = target.answer([attempt])[0], queries + 1
            if target.is_unsafe(row.prompt, response):
                break
    facts = {"loss": lowest_loss, "loss_at_first": first_loss, "steps": step + 1, "lost_as_text": n_lost / n_checked}
    return Outcome(row.id, attempt, response, queries, facts)
