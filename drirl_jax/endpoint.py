"""Replies of a language model behind an OpenAI-compatible endpoint: many at once, tried again where it may help, kept.

The key is read from the environment and stands in no file, no log and no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import pathlib
import time
from typing import NamedTuple, Sequence

import httpx
from ml_collections import ConfigDict

from drirl_jax import ranges, sharding
from drirl_jax.metrics import Progress
from drirl_jax.types import InputError

# A server that is busy, restarting or limits the rate; other errors stay errors however often one asks.
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0  # seconds
LARGEST = 2**24  # bytes of an answer

Chat = Sequence[dict[str, str]]  # turns {"role", "content"}


class Reply(NamedTuple):
    """What the model said.

    Attributes:
        text: of the reply.
        tokens: of the reply, as the server counts them; -1 if it does not say.
        finish: "stop", "length" or another word of the server's.
        seconds: from the request to the reply, the last try alone.
    """

    text: str
    tokens: int
    finish: str
    seconds: float


def check(section: ConfigDict) -> None:
    """Raises InputError unless the section says how to reach a model."""
    try:
        url = httpx.URL(section.url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or not section.model:
        raise InputError(
            f"an endpoint needs a url that begins with http:// or https:// and a model, not {section.url!r} and "
            f"{section.model!r}: set them in the config."
        )
    if url.userinfo or url.query:
        raise InputError(
            "an endpoint's url holds a password or a query, which would be written into files: leave them out, and put "
            "the key into the environment variable of key_env."
        )
    if any(row.fault(section[key]) for key, row in ranges.ENDPOINT.items()):
        raise InputError(
            f"an endpoint has concurrency={section.concurrency}, retries={section.retries}, timeout={section.timeout}, "
            f"backoff={section.backoff}: the first must be 1 or more, timeout above 0, the others not negative."
        )


class Endpoint:
    """A model that answers chats at `url`/chat/completions.

    Args:
        section: url (such as http://localhost:8000/v1), model, key_env (an environment variable with the key, sent if
            it is set), concurrency, timeout (seconds, of a whole answer), retries (tries after the first) and backoff
            (seconds before the first of them; doubled for each).
        memory: a JSONL file in which every reply is kept: the same request is not sent again, also by a later process.
            Of several processes that make a run only the first one asks and keeps.

    Raises:
        InputError: see `check`; or the key is none.
    """

    def __init__(self, section: ConfigDict, memory: pathlib.Path | None = None):
        check(section)
        self.section, self.memory = section, memory
        self.key = os.environ.get(section.key_env, "").strip() if section.key_env else ""
        if not self.key.isascii() or len(self.key.split()) > 1:
            raise InputError(
                f"the key in the environment variable {section.key_env} has blanks or odd characters in it."
            )
        self.known: dict[str, Reply] = None  # until it is asked

    def __call__(self, chats: Sequence[Chat], *, max_tokens: int, temperature: float, seed: int = 0) -> list[Reply]:
        """One reply to each chat, in their order; all processes of a run call it alike.

        Raises:
            InputError: the server refuses a request, does not answer in the tries that it has, or answers something
                else.
        """
        common = {"model": self.section.model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        requests = [common | {"messages": list(chat)} for chat in chats]
        return [Reply(*reply) for reply in sharding.told(lambda: self._asked(requests))]

    def _asked(self, requests: list[dict]) -> list[Reply]:
        if self.known is None:
            self.known = _remembered(self.memory)
        try:
            return asyncio.run(self._all(requests))
        except ExceptionGroup as several:  # of a task group; the first is as good as all
            raise several.exceptions[0] from None

    async def _all(self, requests: list[dict]) -> list[Reply]:
        names = [hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest() for request in requests]
        missing = {name: request for name, request in zip(names, requests) if name not in self.known}
        at_once = asyncio.Semaphore(self.section.concurrency)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        bar = Progress("replies", len(missing), shown=sharding.writes(), unit="reply", brief=True)
        client = httpx.AsyncClient(headers=headers, timeout=self.section.timeout)

        async def one(name: str, request: dict) -> None:
            async with at_once:
                self._keep(name, await self._ask(client, request))
            bar.show()

        with contextlib.closing(bar):
            async with client, asyncio.TaskGroup() as group:  # the first error ends the others
                for name, request in missing.items():
                    group.create_task(one(name, request))
        return [self.known[name] for name in names]

    async def _ask(self, client: httpx.AsyncClient, request: dict) -> Reply:
        url, why = f"{self.section.url.rstrip('/')}/chat/completions", ""
        for attempt in range(1 + self.section.retries):
            start = time.perf_counter()
            wait = min(self.section.backoff * 2**attempt, LONGEST_WAIT)
            try:
                async with asyncio.timeout(self.section.timeout), client.stream("POST", url, json=request) as answer:
                    text = await self._read(answer)
            except (httpx.TransportError, httpx.DecodingError, TimeoutError) as error:
                why = self._hidden(f"{type(error).__name__} {error}".strip())
            else:
                if answer.is_success:
                    return self._parsed(answer, text, time.perf_counter() - start)
                why = f"status {answer.status_code}: {_shown(text)}"
                if answer.status_code not in PASSING:
                    raise InputError(f"{url} refuses the request ({why}): check the url, the model and the key.")
                if answer.headers.get("retry-after", "").isdigit():
                    wait = min(float(answer.headers["retry-after"]), LONGEST_WAIT)
            if attempt < self.section.retries:
                await asyncio.sleep(wait)
        raise InputError(f"{url} did not answer in {1 + self.section.retries} tries (at last {why}): is it running?")

    async def _read(self, answer: httpx.Response) -> str:
        """The answer's text, without the key. Raises InputError where it is larger than any reply."""
        body = bytearray()
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > LARGEST:
                raise InputError(f"{answer.url} answers with more than {LARGEST} bytes: is it a chat endpoint?")
        return self._hidden(body.decode("utf-8", "replace"))

    def _parsed(self, answer: httpx.Response, text: str, seconds: float) -> Reply:
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            content, finish = choice["message"]["content"] or "", choice.get("finish_reason") or ""
            tokens = (body.get("usage") or {}).get("completion_tokens", -1)
            if not (isinstance(content, str) and isinstance(finish, str) and isinstance(tokens, int)):
                raise TypeError("a field of another type")
            # Half a surrogate pair can be written into no file.
            content, finish = (self._hidden(said.encode("utf-8", "replace").decode()) for said in (content, finish))
            return Reply(content, tokens, finish, seconds)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__} in {_shown(text)}"
            raise InputError(f"{answer.url} answers what is no chat completion ({why}).") from error

    def _hidden(self, text: str) -> str:
        """The text without the key, which some servers repeat."""
        return text.replace(self.key, "***") if self.key else text

    def _keep(self, name: str, reply: Reply) -> None:
        self.known[name] = reply
        if self.memory:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            with self.memory.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"request": name} | reply._asdict(), ensure_ascii=False) + "\n")


def _shown(text: str) -> str:
    """The beginning of a text for a sentence, in one line and without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def _remembered(memory: pathlib.Path | None) -> dict[str, Reply]:
    """The replies in the file; a last line that a killed process left unfinished is cut off."""
    if memory is None or not memory.exists():
        return {}
    whole = memory.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        os.truncate(memory, len(kept))
    rows = [json.loads(line) for line in kept.decode("utf-8").split("\n")[:-1]]  # a reply may hold other line ends
    return {row.pop("request"): Reply(**row) for row in rows}
