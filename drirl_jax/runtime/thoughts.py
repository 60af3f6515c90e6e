"""Removes thoughts from texts. A reasoning model writes a thought between two marks, before its answer.

The marks are only in the table MARKS.
"""

from __future__ import annotations

import re

# Mark that opens a thought -> mark that closes it.
MARKS = {
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, QwQ, GLM, Hunyuan, Nemotron
    "<thinking>": "</thinking>",  # Reflection-Llama; system prompts often ask for this one or the next five
    "<thought>": "</thought>",  # EXAONE Deep
    "<thoughts>": "</thoughts>",
    "<reasoning>": "</reasoning>",
    "<reflection>": "</reflection>",
    "<scratchpad>": "</scratchpad>",
    "<inner_thoughts>": "</inner_thoughts>",
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi-VL
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1, OpenThinker
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A Reasoning
    "<unused94>thought": "<unused95>",  # MedGemma
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|channel|>analysis": "<|channel|>final",  # gpt-oss
}
_TAG = re.compile(r"</?([\w:]+)>")
_QUOTES = "`'\"‘’“”"
# gpt-oss's channels in a text whose tokenizer dropped the special tokens: only the names of the channels remain.
_BARE_CHANNELS = re.compile(r"\s*analysis(?=.*assistantfinal).*?assistantfinal", re.DOTALL)


def _pattern(mark: str) -> str:
    """The regular expression of a mark. A tag may have capitals and attributes; a channel may have a <|message|>."""
    if tag := _TAG.fullmatch(mark):
        slash = "/" if mark.startswith("</") else ""
        return rf"<\s?{slash}(?i:{re.escape(tag[1])})(?:\s[^<>]{{0,200}})?>"
    return re.escape(mark) + (r"(?:[^<>]{0,40}<\|message\|>)?" if mark.startswith("<|channel|>") else "")


_MARK = re.compile(
    f"(?P<open>{'|'.join(map(_pattern, MARKS))})|(?P<close>{'|'.join(map(_pattern, MARKS.values()))})"
    rf"|(?P<empty><(?i:think|thinking|thought|reasoning)\s{{0,8}}/>)"
)


def _marks(text: str) -> list[re.Match]:
    """The marks in a text, without marks in quotation marks or backticks, which are only mentioned."""
    marks = []
    for mark in _MARK.finditer(text):
        before, after = text[mark.start() - 1 : mark.start()], text[mark.end() : mark.end() + 1]
        if not (before and after and before in _QUOTES and after in _QUOTES):
            marks.append(mark)
    return marks


def without_thought(text: str) -> str:
    """`text` without its thoughts: only the answer.

    - A text without marks comes back exactly unchanged.
    - A closed thought is removed anywhere in the text; the text before and after it stays.
    - A thought without a closing mark reaches to the end. The text before it stays, which is mostly empty. So ""
      means silence: the model never answered.
    - If a mark closes a thought that no mark opened (the prompt opened it, as in DeepSeek's template), everything
      before the mark is thought. If there are several such marks, the last one counts.
    - Any closing mark ends a thought, because models mix them up: "<think>...</thinking>Paris" is "Paris".
    - An empty thought, "<think/>" or "<think>\\n\\n</think>", is removed.
    - A mark between quotation marks or backticks is only mentioned and does not count.
    - If the text had a mark, surrounding blanks are stripped from the result.

    A text that begins inside a thought and never closes it has no mark. For such a response `ChatTokens.decode` puts
    the mark at the end of the prompt before the text, so it is silence here.

    Args:
        text: a response, or a judge's reply.

    Returns:
        The answer; "" if there is none.
    """
    if channels := _BARE_CHANNELS.match(text):
        return text[channels.end() :].strip()
    answer_parts, position, in_thought = [], 0, False
    marks = _marks(text)
    for mark in marks:
        if not in_thought:
            answer_parts.append(text[position : mark.start()])
        if mark.lastgroup == "close" and not in_thought:
            answer_parts.clear()
        if mark.lastgroup != "empty":
            in_thought = mark.lastgroup == "open"
        position = mark.end()
    if not marks:
        return text
    return "".join(answer_parts if in_thought else [*answer_parts, text[position:]]).strip()


def open_mark(text: str) -> str:
    """The mark that opens the thought at the end of `text`, a prompt; "" if the prompt does not end in a thought."""
    marks = [mark for mark in _marks(text) if mark.lastgroup != "empty"]
    return marks[-1][0] if marks and marks[-1].lastgroup == "open" else ""


def begins_mark(token: str) -> bool:
    """Whether a mark of the table begins with this token. Such a token does not only end a text."""
    return any(mark.startswith(token) for pair in MARKS.items() for mark in pair)


def closing(mark: str) -> str:
    """The mark that closes a thought opened by `mark`, a result of `open_mark`."""
    return next(close for opening, close in MARKS.items() if re.fullmatch(_pattern(opening), mark))
