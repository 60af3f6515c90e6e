"""Runs the harnesses lm_eval and inspect_ai on a policy of this project (`pip install -e ".[harness]"`)."""

from __future__ import annotations

import json
import sys
from typing import Sequence

import jax

from drirl_jax import loading
from drirl_jax.evals import answers
from drirl_jax.evals.answers import Answer, Scores
from drirl_jax.evals.items import user_chat
from drirl_jax.models.architecture import need_positions
from drirl_jax.runtime import workdirs
from drirl_jax.runtime.endpoint import Chat
from drirl_jax.runtime.thoughts import without_thought


class Policy:
    """A policy for harnesses, which send chats.

    Args:
        model: the workdir of a run, or any value that config.policy.init may have.
        batch: prompts in a batch.

    Raises:
        InputError: there is no such model.
    """

    def __init__(self, model: str, batch: int = 32):
        self.model, self.tokens = loading.load_policy(workdirs.policy_config(model))
        self.name, self.batch = model, batch

    def respond(
        self,
        chats: Sequence[Chat],
        max_new: int,
        temperature: float,
        seed: int = 0,
        prefix: tuple[int, ...] | None = None,
        call: int = 0,
    ) -> list[Answer]:
        """One answer to each chat, as from `answers.respond`, but without the thought before it.

        The random numbers depend on the seed, the number of the call and the chat's position in it.
        """
        ids = [answers.prompt_ids(self.tokens, chat) for chat in chats]
        key = jax.random.fold_in(jax.random.key(seed), call)
        responses = answers.respond(
            self.model, self.tokens, ids,
            batch=self.batch, max_new=max_new, temperature=temperature, key=key, prefix=prefix,
        )  # fmt: skip
        return [answer._replace(text=without_thought(answer.text)) for answer in responses]

    def need_room(self, chat: Chat, max_new: int) -> None:
        """Raises InputError where the chat together with an answer is too long for the model."""
        need_positions(self.model.config, len(answers.prompt_ids(self.tokens, chat)), max_new)

    def score(self, chats: Sequence[Chat], continuations: Sequence[str]) -> list[Scores]:
        """For each chat the scores of its one continuation, as from `answers.score_options`."""
        ids = [answers.prompt_ids(self.tokens, chat) for chat in chats]
        options = [[self.tokens.response_ids(text, sys.maxsize)[:-1]] for text in continuations]
        return answers.score_options(self.model, ids, options, batch=self.batch)


def cut(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first of these strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


CHAT = "chat:"  # begins a string that holds a chat as JSON, because harnesses pass strings


def chat_to_string(chat: Chat) -> str:
    """A chat as a string for `chat_from_string`. No template is filled here: the policy's own tokenizer does that."""
    return CHAT + json.dumps(list(chat), ensure_ascii=False)


def chat_from_string(context: str) -> Chat:
    """The chat in a string from `chat_to_string`. Any other string becomes a user's message."""
    return json.loads(context.removeprefix(CHAT)) if context.startswith(CHAT) else user_chat(context)
