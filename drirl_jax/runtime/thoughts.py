"""Thoughts: what a reasoning model writes before its answer, between two marks. No thought is part of the answer.

The table MARKS is the only place that names the marks.
"""

from __future__ import annotations

import re

# The mark that opens a thought and the mark that closes it.
MARKS = {
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, QwQ, GLM, Hunyuan, Nemotron
    "<thinking>": "</thinking>",  # Reflection-Llama and many system prompts, as are the next five
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
# gpt-oss's channels where a tokenizer left the marks out: its special tokens vanish, the channels' names stay.
_BARE_CHANNELS = re.compile(r"\s*analysis(?=.*assistantfinal).*?assistantfinal", re.DOTALL)


def _pattern(mark: str) -> str:
    """The regular expression of a mark: a tag may have capitals and attributes, a channel has a <|message|>."""
    if tag := _TAG.fullmatch(mark):
        slash = "/" if mark.startswith("</") else ""
        return rf"<\s?{slash}(?i:{re.escape(tag[1])})(?:\s[^<>]{{0,200}})?>"
    return re.escape(mark) + (r"(?:[^<>]{0,40}<\|message\|>)?" if mark.startswith("<|channel|>") else "")


_MARK = re.compile(
    f"(?P<open>{'|'.join(map(_pattern, MARKS))})|(?P<close>{'|'.join(map(_pattern, MARKS.values()))})"
    rf"|(?P<empty><(?i:think|thinking|thought|reasoning)\s{{0,8}}/>)"
)


def _marks(text: str) -> list[re.Match]:
    """The marks in a text, but for those in quotation marks or backticks, which only mention a mark."""
    marks = []
    for mark in _MARK.finditer(text):
        before, after = text[mark.start() - 1 : mark.start()], text[mark.end() : mark.end() + 1]
        if not (before and after and before in _QUOTES and after in _QUOTES):
            marks.append(mark)
    return marks


def without_thought(text: str) -> str:
    """The answer alone: `text` without its thoughts.

    - A text without marks of a thought comes back unchanged, to the character.
    - A closed thought, wherever it stands, is left out; what stands before and after it stays.
    - A thought that no mark closes reaches to the end: what stood before it stays, which mostly is nothing.
      "" therefore means silence: the model never answered.
    - A mark that closes a thought which no mark opened (the prompt opened it, as DeepSeek's template does) makes
      all before it thought. Where several such marks stand, the last one counts.
    - Any closing mark ends a thought, as models mix them up: "<think>...</thinking>Paris" is "Paris".
    - An empty thought, "<think/>" or "<think>\\n\\n</think>", is left out.
    - A mark between quotation marks or backticks is a mention, no mark.
    - What remains of a text that had a mark is stripped of surrounding blanks.

    A text that begins inside a thought and never closes it has no mark to tell by: `Text.decode` puts the mark
    that the prompt ends with before such a response, so that it is silence here.

    Args:
        text: a response, or a judge's reply.

    Returns:
        The answer; "" where there is none.
    """
    if bare := _BARE_CHANNELS.match(text):
        return text[bare.end() :].strip()
    kept, position, inside = [], 0, False
    marks = _marks(text)
    for mark in marks:
        if not inside:
            kept.append(text[position : mark.start()])
        if mark.lastgroup == "close" and not inside:
            kept.clear()
        if mark.lastgroup != "empty":
            inside = mark.lastgroup == "open"
        position = mark.end()
    if not marks:
        return text
    return "".join(kept if inside else [*kept, text[position:]]).strip()


def open_mark(text: str) -> str:
    """The mark that opens the thought in which `text`, a prompt, ends; "" where it ends in none."""
    marks = [mark for mark in _marks(text) if mark.lastgroup != "empty"]
    return marks[-1][0] if marks and marks[-1].lastgroup == "open" else ""


def closing(mark: str) -> str:
    """The mark that closes a thought which `mark`, of `open_mark`, opened."""
    return next(close for opening, close in MARKS.items() if re.fullmatch(_pattern(opening), mark))
