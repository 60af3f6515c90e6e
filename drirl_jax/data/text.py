"""Turns strings into ids and back, and splits sentences. Only this file handles text and ids together."""

from __future__ import annotations

import re
from typing import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from drirl_jax.models import templates, tokenizers
from drirl_jax.models.templates import DATE as DATE
from drirl_jax.models.templates import ChatTemplate, TemplateRefusal
from drirl_jax.runtime import thoughts
from drirl_jax.types import Array, InputError


class ChatTokens:
    """A chat model's tokenizer and template. Text that people write never becomes a control token.

    Attributes:
        eos_ids: the ids that end a response. The first is the one that the template writes after an assistant's turn;
            then come all others that the tokenizer and the model's files name (`tokenizers.end_ids`).
        pad_id: the padding id. It may equal an end-of-sequence id, so mask by length.
        system: the system turn's words; None if the template has its own, or if it has no system turn and "" was given.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        system: the system prompt. None keeps the template's own default, if it has one; "" removes that default.
        enable_thinking: see `templates.ChatTemplate`.

    Raises:
        InputError: the tokenizer has no chat template or no end-of-sequence token, or its template cannot be used or
            refuses the system prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None, enable_thinking: bool = False):
        self.tokenizer, self.system = tokenizer, system
        self._template = ChatTemplate(tokenizer, enable_thinking)
        self._need_system_turn()
        self.eos_ids = tokenizers.end_ids(tokenizer, self.template)
        if not self.eos_ids:
            raise InputError("the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json")
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._hidden = {i for i, token in special.items() if not thoughts.begins_mark(token)}
        self._all_hidden = len(self._hidden) == len(special)

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template; made anew if somebody has put another template into the tokenizer."""
        if self._template.unchanged is not self.tokenizer.chat_template:
            self._template = ChatTemplate(self.tokenizer, self._template.enable_thinking)
        return self._template

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of one user message in the chat template, up to the begin of the assistant's turn.

        Equals `apply_chat_template` for ordinary text; control tokens written inside `prompt` stay text.

        Raises:
            TemplateRefusal: the template refuses the message, or drops its words.
        """
        return self.chat_ids(self.with_system([{"role": "user", "content": prompt}]))

    def chat_ids(self, chat: Sequence[dict[str, str]]) -> list[int]:
        """`prompt_ids` of a chat of turns {"role", "content"}; it adds no system turn."""
        return self.template.ids(chat)

    def with_system(self, chat: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The chat, with the system turn before it if it has none of its own."""
        unchanged = self.system is None or (chat and chat[0]["role"] == "system")
        return [*chat] if unchanged else [{"role": "system", "content": self.system or ""}, *chat]

    def response_ids(self, text: str, max_len: int) -> list[int]:
        """The ids of an assistant's answer and `eos_ids[0]`, cut to `max_len` (a cut answer has no end).

        If thinking is enabled, the prompt opens a thought. An answer without a thought first closes it; an answer with
        one (a text of `decode`) continues it.
        """
        opened, before = self.template.opened, self.template.before_answer
        begins_in_thought = bool(opened) and text.startswith(opened)
        ids = self.tokenizer.encode(before, add_special_tokens=False) if before and not begins_in_thought else []
        text = text.removeprefix(opened) if begins_in_thought else text
        ids += self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.eos_ids[0]][:max_len]

    def decode(self, ids: Sequence[int] | np.ndarray | Array, length: int) -> str:
        """The text of the first `length` of a response's `ids` [T], without special tokens.

        Marks of thoughts stay, even if they are special tokens. The mark at the end of the prompt comes first.
        `thoughts.without_thought` finds the answer by these marks.
        """
        ids = np.asarray(ids)[: int(length)].tolist()
        ids = ids if self._all_hidden else [i for i in ids if i not in self._hidden]
        decoded = self.tokenizer.decode(ids, skip_special_tokens=self._all_hidden, clean_up_tokenization_spaces=False)
        return self.template.opened + decoded

    def _need_system_turn(self) -> None:
        """Raises InputError if the template does not write the system turn; an empty one becomes None instead."""
        if self.system is None:
            return
        try:
            self.template.ids(self.with_system([{"role": "user", "content": templates.USER}]))
        except TemplateRefusal as error:
            if self.system:
                raise InputError(f"{error}; leave the system prompt empty") from error
            self.system = None


def pad(rows: Sequence[Sequence[int]], size: int, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads `rows` to ids [N, size] int32 and lengths [N] int32.

    Raises:
        InputError: a row is longer than `size`.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    if (lengths > size).any():
        longest = int(lengths.argmax())
        raise InputError(f"row {longest} has {lengths[longest]} tokens, more than the width {size}: widen the bucket")
    ids = np.full((len(rows), size), pad_id, np.int32)
    for row, ids_row in zip(rows, ids):
        ids_row[: len(row)] = row
    return ids, lengths


# --------------------------------------------------------------------------------- sub-sentence splitting

_CLOSERS = "\"'”’»)\\]）】」』》*_"
_STOP = re.compile(rf"(?:(?P<cjk>[.!?…]*[。！？；][.!?…。！？；]*)|[.!?…]+)(?P<closer>[{_CLOSERS}]*)")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# The numbering or bullet before a list item: "- ", "* ", "1. ", "(2) ", "a) ", "1、", "一、", "（三）".
_BULLET = re.compile(
    r"(?:[-*–—]+\s+|[•·‣▪]\s*|\(?\d{1,3}[.)]\s+|\d{1,3}\.(?=[\u3400-\u9fff])|\(?[a-zA-Z]\)\s+"
    r"|[（(]?[\d一二三四五六七八九十]{1,3}[）、]\s*)"
)
_NUMBER = re.compile(r"\W*\d{1,3}")
_INITIALS = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]")
_NEVER_LAST = frozenset(
    "dr mr mrs ms mx prof st gen col sgt capt lt rev hon sen rep gov mt vs viz cf e.g i.e eg ie".split()
)
_BEFORE_NUMBER = frozenset("no nos fig figs eq sec ch vol p pp art para".split())
_MID_SENTENCE = frozenset("etc inc ltd co corp jr sr dept approx est min max a.k.a".split())
# After "U.S." or an initial, a capitalised word may be a name. These words always begin a sentence.
_STARTERS = frozenset(
    "I It The This That These Those He She We You They There Here If But And So In On At To For As When "
    "While Please Do Don Instead However No Yes My Your His Her Our Their What Why How Who Is Are Let".split()
)


def split_sentences(text: str) -> list[str]:
    """Splits an English or Chinese text into its sentences.

    A sentence ends at a run of . ! ? before a space, at 。！？； anywhere, at a line break, or at the draft separator
    "####". Closing quotes and brackets after the stop belong to the sentence. Abbreviations, initials, decimals and an
    ellipsis inside a sentence do not end it. List marks and pieces without a letter or digit are left out.

    Args:
        text: any text.

    Returns:
        The sentences, stripped: none for a blank text, at least one for any other. A text of punctuation alone is
        returned whole.
    """
    lines = [line.strip() for part in re.split(r"#{4,}", text) for line in part.splitlines()]
    pieces = [piece for line in lines for piece in _split_line(line)]
    sentences = [p for p in pieces if any(c.isalnum() for c in p)]
    return sentences or ([text.strip()] if text.strip() else [])


# A comma, semicolon or colon before a space (so 1,000 and 10:30 stay whole), a Chinese one anywhere, a spaced dash.
_CLAUSE_END = re.compile(r"[,;:]\s+|[，；：]|\s+[-–—]+\s+|—+")


def split_clauses(text: str) -> list[str]:
    """The sentences of `split_sentences`, each split again after commas, semicolons and colons, and at dashes.

    Pieces without a letter or digit are left out. A text that is not blank gives at least one piece.
    """
    sentences = split_sentences(text)
    pieces = [piece.strip() for sentence in sentences for piece in _CLAUSE_END.split(sentence)]
    return [piece for piece in pieces if any(c.isalnum() for c in piece)] or sentences


def whole_text(text: str) -> list[str]:
    """The whole text as one part; no part if the text is blank."""
    return [text.strip()] if text.strip() else []


SPLIT: dict[str, Callable[[str], list[str]]] = {"sentence": split_sentences, "clause": split_clauses}


def _split_line(line: str) -> list[str]:
    """The sentences of one line, in order, without list marks."""
    raw_pieces, begin = [], 0
    for stop in _STOP.finditer(line):
        if _ends_sentence(line, begin, stop):
            raw_pieces.append(line[begin : stop.end()])
            begin = stop.end()
    stripped = [piece.strip() for piece in [*raw_pieces, line[begin:]]]
    return [piece[mark.end() :] if (mark := _BULLET.match(piece)) else piece for piece in stripped]


def _ends_sentence(line: str, begin: int, stop: re.Match) -> bool:
    """Whether the sentence that starts at `begin` ends with `stop`."""
    after = line[stop.end() :]
    if not after.strip() or stop["cjk"]:
        return True
    marks = stop[0].removesuffix(stop["closer"])
    before = line[begin : stop.start()]
    if not after[0].isspace():
        return "…" not in marks and bool(_CJK.match(before[-1:]) and _CJK.match(after))
    first_word = re.search(r"\w+", after)
    next_word = first_word[0] if first_word else ""
    if stop["closer"] or "…" in marks or ".." in marks:  # "Stop!" he said; well... maybe
        return not next_word[:1].islower()
    if marks != ".":
        return True
    if _NUMBER.fullmatch(before):  # "2." before a list item inside a line
        return False
    word = re.split(r"\s", before)[-1].lstrip("\"'“‘«([（*_")
    if word.lower() in _NEVER_LAST:
        return False
    if word.lower() in _BEFORE_NUMBER:
        return not next_word[:1].isdigit()
    if word.lower() in _MID_SENTENCE:
        return not next_word[:1].islower()
    if _INITIALS.fullmatch(word) and word != "I":
        return next_word in _STARTERS
    return True
