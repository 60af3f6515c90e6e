"""Chat templates: chooses the one for chats and renders it, with the same date every day and within bounds.

A template is a program that comes with a model. It runs in Jinja's sandbox. Before it runs here, it runs once in a
process of its own with bounded time and memory.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import string
import subprocess
import sys
from typing import Sequence

from transformers import PreTrainedTokenizerBase

from drirl_jax.models import rendering
from drirl_jax.runtime import thoughts
from drirl_jax.types import InputError

log = logging.getLogger(__name__)

# Some templates write today's date. A fixed date keeps a prompt's ids the same on every day of a run.
DAY = datetime.datetime(2024, 7, 26)
DATE = DAY.strftime("%d %b %Y")
LARGEST = 1_000_000  # characters of a template
USER, ANSWER = "0MARK0", "0MARK1"  # marks in the place of the user's and the assistant's words
ADVICE = "take the model's own chat template, or correct this one"

Chat = Sequence[dict[str, str]]


class TemplateRefusal(InputError):
    """The chat template cannot render this chat."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        unchanged: the chat template as the tokenizer holds it.
        opened: the mark that opens the thought in which every prompt ends; "" if prompts do not end in a thought.
        before_answer: the text between a prompt and an answer without a thought; "" if there is none.

    Args:
        tokenizer: a fast transformers tokenizer.
        enable_thinking: whether a reasoning model thinks before it answers. The template takes the value under the
            names `enable_thinking` and `thinking`. If a prompt still ends in an open thought, as with DeepSeek-R1 and
            QwQ, False closes that thought in the prompt, and True closes it before a demonstration.

    Raises:
        InputError: there is no template, it takes too much time or memory, it leaves out the user's words, its output
            changes from call to call, or thoughts are enabled and it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool = False):
        self.tokenizer, self.enable_thinking = tokenizer, enable_thinking
        self.unchanged = getattr(tokenizer, "chat_template", None)
        self.source = _with_fixed_date(choose_template(tokenizer))
        thought_names = ("enable_thinking", "thinking", *thoughts.MARKS)
        if enable_thinking and not any(name in self.source for name in thought_names):
            raise InputError(
                "config.policy.enable_thinking is True, but the chat template knows no thoughts: set it to False, or "
                "take a reasoning model."
            )
        need_bounded(self.source, tuple(sorted(_special_tokens(tokenizer).items())))
        self.opened, self.before_answer = self._thought()
        if self.before_answer and not enable_thinking:
            log.warning(
                "the chat template leaves thoughts open: with config.policy.enable_thinking = False every prompt ends "
                "with %r after it; serve the aligned model with the same prompts", self.before_answer,
            )  # fmt: skip
            # Jinja drops one newline at the end of a template. With more text after it the newline would stay.
            suffix = "{% if add_generation_prompt %}{{ " + json.dumps(self.before_answer, ensure_ascii=False)
            self.source = self.source.removesuffix("\n") + suffix + " }}{% endif %}"
            self.opened = self.before_answer = ""

    def text(self, chat: Chat, prompt: bool = True) -> str:
        """The chat as the template renders it; with `prompt` it ends where the assistant's turn begins.

        Raises:
            TemplateRefusal: the template raises an error.
        """
        return self._apply(chat, prompt, tokenize=False)

    def ids(self, chat: Chat) -> list[int]:
        """The ids of the chat up to the place where the assistant's turn begins.

        Control tokens that users or assistants write stay plain text.

        Raises:
            TemplateRefusal: the template raises an error, or leaves out or changes the words of a turn. It may leave
                out the blanks around them, and an assistant's thoughts.
        """
        text = self.text(chat)
        for turn in chat:
            turn_text = turn["content"]
            turn_text = (thoughts.without_thought(turn_text) if turn["role"] == "assistant" else turn_text).strip()
            if turn_text not in text:
                raise TemplateRefusal(
                    f"the chat template leaves out or changes what the {turn['role']} says "
                    f"({turn_text[:40]!r}): {ADVICE}."
                )
        return self._apply(chat, prompt=True, tokenize=True)

    def turn_end(self) -> int | None:
        """The id of the token that the template writes right after an assistant's turn; None unless it is special."""
        _, mark, ending = self.text(_MARKED_CHAT, prompt=False).rpartition(ANSWER)
        ids = self.tokenizer.encode(ending, add_special_tokens=False) if mark else []
        token = self.tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return ids[0] if token is not None and token.special else None

    def _apply(self, chat: Chat, prompt: bool, tokenize: bool):
        try:
            # Before version 5.22 transformers may ignore sanitize_control_tokens silently: setup.py asks for 5.22.
            return self.tokenizer.apply_chat_template(
                list(chat), chat_template=self.source, add_generation_prompt=prompt, tokenize=tokenize,
                sanitize_control_tokens=tokenize, return_dict=False, date_string=DATE,
                enable_thinking=self.enable_thinking, thinking=self.enable_thinking,
            )  # fmt: skip
        except Exception as error:  # a template is a foreign program and may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            question = next((turn["content"] for turn in reversed(chat) if turn["role"] == "user"), "")[:40]
            question_hint = "" if question == USER else f", whose last question begins {question!r}"
            raise TemplateRefusal(f"the chat template refuses this chat ({reason}){question_hint}: {ADVICE}") from error

    def _thought(self) -> tuple[str, str]:
        """`opened` and `before_answer`, from what the template writes around the marks."""
        prompts = {self.text(_MARKED_CHAT[:1]) for _ in range(8)}
        if len(prompts) > 1:
            raise InputError(f"the chat template writes a different text each time: {ADVICE}.")
        prompt = prompts.pop()
        if USER not in prompt:
            raise InputError(f"the chat template leaves out what the user says: {ADVICE}.")
        opened = thoughts.open_mark(prompt.rpartition(USER)[2])
        chat = self.text(_MARKED_CHAT, prompt=False)
        between = chat.removeprefix(prompt).partition(ANSWER)[0] if chat.startswith(prompt) else ""
        is_closed = not thoughts.without_thought(opened + between) and not thoughts.open_mark(opened + between)
        if between and is_closed:
            return opened, between
        return opened, f"\n{thoughts.closing(opened)}\n\n" if opened else ""


_MARKED_CHAT = ({"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER})


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for chats: the only one, or the one named "default" if there are several.

    Raises:
        InputError: there is none, it is no text, or it is too long.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict) and template and "default" not in template:
        raise InputError(
            f"the tokenizer has chat templates named {', '.join(map(repr, sorted(template)))}, and none named "
            "'default': put the one for chats into chat_template.jinja."
        )
    template = template.get("default") if isinstance(template, dict) else template
    if not template or (isinstance(template, str) and not template.strip()):
        raise InputError(
            "the tokenizer has no chat template: choose an instruction-tuned model, or put its "
            "chat_template into tokenizer_config.json"
        )
    if not isinstance(template, str):
        raise InputError(f"the tokenizer's chat template is {type(template).__name__}, not text: {ADVICE}.")
    if len(template) > LARGEST:
        raise InputError(f"the chat template has {len(template)} characters, more than {LARGEST}: {ADVICE}.")
    return template


def _with_fixed_date(template: str) -> str:
    """The template with its own `strftime_now`, which always writes DAY."""
    if "strftime_now" not in template:
        return template
    formats = [f"%{flag}{letter}" for letter in string.ascii_letters for flag in ("", "-")]
    replacements = "".join(
        f"|replace({date_format!r}, {DAY.strftime(date_format)!r})"
        for date_format in formats
        if date_format in template
    )
    # Jinja drops the newline after the tag.
    return (
        "{% macro strftime_now(format) %}{{ format" + replacements + "|replace('%%', '%') }}{% endmacro %}\n" + template
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


@functools.lru_cache(maxsize=256)
def need_bounded(template: str, tokens: tuple[tuple[str, str], ...]) -> None:
    """Raises InputError if the template takes too much time, memory or output for chats of usual length."""
    request = json.dumps({"template": template, "tokens": dict(tokens)})
    # With -P the folder of the file is not on the path: a module there may have the name of a library.
    command = [sys.executable, "-P", rendering.__file__]
    if subprocess.run(command, input=request, capture_output=True, text=True).returncode:
        raise InputError(
            f"the chat template takes more than {rendering.SECONDS} s, {rendering.BYTES >> 30} GiB or "
            f"{rendering.CHARACTERS:,} characters for one chat: {ADVICE}."
        )
