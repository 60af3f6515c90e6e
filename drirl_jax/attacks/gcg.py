"""GCG (Zou et al., arXiv 2307.15043): a suffix of tokens that makes the beginning of an answer likely.

A step is two jitted programs in fixed shapes, with a look at the candidates' text between them: `propose` takes the
gradient and draws candidates, `target.read` computes their losses. All candidates are one group of one prompt, so that
the chat up to the suffix passes through the network once for them all.
"""

from __future__ import annotations

from functools import partial
from typing import Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from drirl_jax.attacks.target import Outcome, Target, losses, read
from drirl_jax.data.examples import common_prefix
from drirl_jax.data.records import Record
from drirl_jax.data.text import ChatTokens
from drirl_jax.models.attention import einsum_f32
from drirl_jax.models.transformer import Transformer, cast, run_trunk
from drirl_jax.runtime import sharding
from drirl_jax.types import Array, Group, InputError

FILLER = " !"  # what a suffix is made of at first
SPARE = 2  # times as many candidates are drawn as are read, as some do not survive as text


class Frame(NamedTuple):
    """A prompt's chat around its suffix.

    Attributes:
        prompt: the user's words.
        before: ids up to the suffix.
        suffix: ids of the suffix at first.
        after: ids from the suffix to where the answer begins.
    """

    prompt: str
    before: list[int]
    suffix: list[int]
    after: list[int]


def framed(text: ChatTokens, prompt: str, length: int) -> Frame:
    """The chat of the prompt with `length` fillers behind it.

    Raises:
        InputError: the tokenizer mixes prompt and suffix.
    """
    prompt = prompt.rstrip()
    ids, bare, other = (text.prompt_ids(prompt + end) for end in (FILLER * length, "", " ?"))
    after = len(common_prefix([ids[::-1], other[::-1]]))
    before, end = bare[: len(bare) - after], len(ids) - after
    frame = Frame(prompt, before, ids[len(before) : end], ids[end:])
    if not survives(text, frame, frame.suffix):
        raise InputError(f"the tokenizer reads {prompt[:40]!r} otherwise with a suffix: leave the prompt or GCG out.")
    return frame


def message(text: ChatTokens, frame: Frame, suffix: Sequence[int]) -> str:
    """The user's words with the suffix."""
    # Decoded behind what stands before it: some tokenizers drop the first space of a text.
    decode = partial(text.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return frame.prompt + decode([*frame.before, *suffix])[len(decode(frame.before)) :]


def survives(text: ChatTokens, frame: Frame, suffix: Sequence[int]) -> bool:
    """Whether the suffix, written as text and read again in the chat, is the same tokens."""
    return text.prompt_ids(message(text, frame, suffix)) == [*frame.before, *suffix, *frame.after]


def writable(text: ChatTokens, vocab: int) -> np.ndarray:
    """[V] bool: the tokens a suffix may hold, which are printable ASCII and no control tokens."""
    control = {*text.tokenizer.all_special_ids, *text.tokenizer.added_tokens_decoder}
    ids = [i for i in range(min(vocab, len(text.tokenizer))) if i not in control]
    allowed = np.zeros(vocab, bool)
    for i, said in zip(ids, text.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)):
        allowed[i] = said.isascii() and said.isprintable() and said != ""
    return allowed


def group_of(target: Target, frame: Frame, suffix_GL: np.ndarray, copies: int = 1) -> Group:
    """The suffixes, each with what follows it up to the target's end, as one group; dealt out over `copies` of the
    prompt, of which each device may have its own."""
    tail = np.array([*frame.after, *target.goal()], np.int32)
    response_GT = np.concatenate([suffix_GL, np.broadcast_to(tail, (len(suffix_GL), len(tail)))], axis=1)
    response = response_GT.reshape(copies, -1, response_GT.shape[1]).astype(np.int32)
    arrays = (response, np.full(response.shape[:2], response.shape[2], np.int32), np.zeros(copies, np.int32))
    return Group(*target.padded([frame.before] * copies), *map(sharding.shard_prompts, arrays))


def gradient(model: Transformer, group: Group, length: int, goal: int) -> tuple[Array, Array]:
    """The target's loss under the first response, and ∂loss/∂onehot [L, V] of its first L = `length` tokens.

    Embeddings are the one-hot rows times the table: x = s·1ᵀE, so that ∂loss/∂1 = s·(∂loss/∂x) Eᵀ.
    """
    group = group.members(slice(1))
    begun = run_trunk(model, group, 0)

    def loss(x_PLD):
        return losses(model, group, goal, begun.replace(response=begun.response.at[:, 0, :length].set(x_PLD))).mean()

    now, slope_PLD = jax.value_and_grad(loss)(begun.response[:, 0, :length])
    slope_LD = slope_PLD.sum(axis=0)  # P copies of one prompt
    return now, model.config.embed_scale * einsum_f32("ld,vd->lv", slope_LD, cast(model.embed[...], model.config))


@partial(jax.jit, static_argnames=("length", "goal", "topk", "count"))
def propose(model: Transformer, group: Group, allowed_V: Array, key: Array, *, length, goal, topk, count):
    """The loss of the group's first suffix, and candidates [count, L]: each is that suffix with one token, of a random
    place, replaced by one of the `topk` of which the gradient promises most."""
    now, slope_LV = gradient(model, group, length, goal)
    _, best_LK = jax.lax.top_k(jnp.where(allowed_V, -slope_LV, -jnp.inf), topk)
    place_key, choice_key = jax.random.split(key)
    place_N = jax.random.randint(place_key, (count,), 0, length)
    choice_N = jax.random.randint(choice_key, (count,), 0, topk)
    suffix_NL = jnp.tile(group.response[0, 0, :length], (count, 1))
    return now, suffix_NL.at[jnp.arange(count), place_N].set(best_LK[place_N, choice_N])


def attack(target: Target, rows: Sequence[Record]) -> Iterator[Outcome]:
    """GCG on each prompt: at most steps · (width + 1) + steps / check + 1 queries."""
    allowed_V = writable(target.text, target.model.config.vocab)
    frames = [framed(target.text, row.prompt, target.options.gcg.suffix) for row in rows]
    target.check([[*frame.before, *frame.suffix, *frame.after] for frame in frames])
    for row, frame in zip(rows, frames):
        yield search(target, row, frame, allowed_V)


def search(target: Target, row: Record, frame: Frame, allowed_V: np.ndarray) -> Outcome:
    """GCG on one prompt. Each step goes on from the best of its candidates; the best of all steps is what is tried."""
    o, goal, copies = target.options.gcg, len(target.goal()), sharding.axis_size("prompts")
    length, topk = len(frame.suffix), min(o.topk, int(allowed_V.sum()))
    key = jax.random.key(target.rng(row).integers(2**31))
    suffix = best = frame.suffix
    queries, read_as_text, lost = 0, 0, 0
    for step in range(o.steps):
        out = propose(
            target.model, group_of(target, frame, np.array([suffix] * copies), copies), allowed_V,
            jax.random.fold_in(key, step), length=length, goal=goal, topk=topk, count=SPARE * o.width,
        )  # fmt: skip
        now, proposed = sharding.fetch(out)
        if step == 0:
            first = lowest = float(now)
        kept = []
        for candidate in dict.fromkeys(map(tuple, proposed.tolist())):
            if len(kept) == o.width:
                break
            whole = survives(target.text, frame, candidate)
            kept += [candidate] * whole
            read_as_text, lost = read_as_text + 1, lost + (not whole)
        queries += 1 + len(kept)
        if kept:
            filled = np.array([kept[i % len(kept)] for i in range(o.width)])
            loss_G = sharding.fetch(read(target.model, group_of(target, frame, filled, copies), goal=goal)).reshape(-1)
            suffix = kept[loss_G.argmin() % len(kept)]
            if loss_G.min() < lowest:
                lowest, best = float(loss_G.min()), suffix
        if (step + 1) % o.check == 0 or step + 1 == o.steps:
            said = message(target.text, frame, best)
            response, queries = target.answers([said])[0], queries + 1
            if target.unsafe(row.prompt, response):
                break
    found = {"loss": lowest, "loss_at_first": first, "steps": step + 1, "lost_as_text": lost / read_as_text}
    return Outcome(row.id, said, response, queries, found)
