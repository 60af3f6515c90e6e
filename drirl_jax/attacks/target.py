"""The attacked model: its answers to messages, and the loss of the answer beginning that an attack wants."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Callable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from drirl_jax import rollout
from drirl_jax.data import text
from drirl_jax.data.records import Record
from drirl_jax.data.text import ChatTokens
from drirl_jax.models import transformer, vocabulary
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.transformer import Transformer, TrunkStates
from drirl_jax.runtime import sharding
from drirl_jax.runtime.endpoint import Endpoint
from drirl_jax.stages.base import batched_rows
from drirl_jax.types import Array, Group, InputError

BUCKET = 32  # tokens; prompts are padded to a multiple of this, so that few shapes are compiled


class Outcome(NamedTuple):
    """The result of an attack on one prompt.

    Attributes:
        id: id of the prompt's record.
        message: the last message that the attack tried.
        response: the model's greedy answer to it.
        queries: number of messages that the model has read, with the candidates whose loss was computed.
        facts: further numbers of the attack.
    """

    id: str
    message: str
    response: str
    queries: int
    facts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Target:
    """A model loaded here, with the options, judges and attacker of an attack.

    Attributes:
        model, text: the model and its tokens.
        options: see `options.py`.
        judges: {name: (prompt, response) -> whether the response is safe, None without a verdict}. The first judge
            decides when a search stops.
        attacker: the model that helps some attacks, or None.
        complying: {prompt: an answer that complies}, of some prompts; for the attack `prefill`.
    """

    model: Transformer
    text: ChatTokens
    options: ConfigDict
    judges: dict[str, Callable[[str, str], bool | None]]
    attacker: Endpoint | None = None
    complying: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check_lengths(self, rows: Sequence[Sequence[int]]) -> int:
        """The length of the longest of these prompts.

        Raises:
            InputError: it is above options.max_prompt, or too long for the model together with an answer.
        """
        longest = max(map(len, rows))
        if longest > self.options.max_prompt:
            raise InputError(
                f"an attack's message has {longest} tokens, above options.max_prompt = {self.options.max_prompt}: "
                "raise it, or shorten the prompts or the templates."
            )
        need_positions(self.model.config, longest, self.options.max_new)
        return longest

    def pad_prompts(self, rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        """Prompts [P, S] and their lengths [P]; S is a multiple of BUCKET. Raises InputError like `check_lengths`."""
        longest = self.check_lengths(rows)
        prompt, prompt_len = text.pad(rows, -(-longest // BUCKET) * BUCKET)
        return sharding.shard_prompts(prompt), sharding.shard_prompts(prompt_len)

    def answer(self, messages: Sequence[str]) -> list[str]:
        """The model's greedy answer to each message, options.batch at a time."""
        ids, answers = [self.text.prompt_ids(message) for message in messages], []
        for rows, real in batched_rows(len(ids), min(self.options.batch, len(ids)), "answers"):
            keys = rollout.response_keys(jax.random.key(0), jnp.asarray(rows), 1)  # unused at temperature 0
            samples = rollout.sample(
                self.model, *self.pad_prompts([ids[i] for i in rows]), keys,
                max_new=self.options.max_new, temperature=0.0, eos=self.text.eos_ids,
            )  # fmt: skip
            response, length = sharding.fetch((samples.response[:, 0], samples.response_len[:, 0]))
            answers += [self.text.decode(response[i], length[i]) for i in range(real)]
        return answers

    def is_unsafe(self, prompt: str, response: str) -> bool:
        """Whether the first judge finds the response unsafe. A search stops at its first unsafe response."""
        return next(iter(self.judges.values()))(prompt, response) is False

    def goal_ids(self) -> list[int]:
        """The token ids of options.target, the goal, at the beginning of an answer."""
        return self.text.response_ids(self.options.target, self.options.max_prompt)[:-1]

    def rng(self, row: Record) -> np.random.Generator:
        """The random generator of this prompt. It does not depend on the prompts that were attacked before."""
        return np.random.default_rng([self.options.seed, zlib.crc32(row.id.encode())])


def goal_losses(model: Transformer, group: Group, goal_len: int, trunk_states: TrunkStates | None = None) -> Array:
    """[P, G] mean cross-entropy of each response's last `goal_len` tokens, nats.

    Only the states of these tokens are multiplied with the vocabulary. Responses fill their width.

    Args:
        trunk_states: the group's embeddings, where they are not the embeddings of its tokens.
    """
    P, G, _ = group.response.shape
    prompt_PSD, response_PGTD = transformer.apply(model, group, trunk_states=trunk_states)
    goal_PGMD = transformer.predicting_states((prompt_PSD, response_PGTD), group)[:, :, -goal_len:]
    logp_PN, _ = vocabulary.logprobs(
        transformer.cast(model.unembed, model.config), goal_PGMD.reshape(P, G * goal_len, -1),
        group.response[:, :, -goal_len:].reshape(P, -1), jnp.ones((P, G * goal_len)), cap=model.config.final_softcap,
    )  # fmt: skip
    return -logp_PN.reshape(P, G, goal_len).mean(-1)


jitted_goal_losses = jax.jit(goal_losses, static_argnames="goal_len")
