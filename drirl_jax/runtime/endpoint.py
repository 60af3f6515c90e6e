"""Asks a language model behind an OpenAI-compatible endpoint: many requests at once, retries, replies kept in a file.

The key comes from the environment and appears in no file, log or message (`runtime/secrets.py`). A reply that its
reader cannot use is not kept, so the same request goes to the server again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import httpx
from ml_collections import ConfigDict

from drirl_jax.runtime import processes, ranges, secrets
from drirl_jax.runtime.progress import Progress
from drirl_jax.runtime.surrogates import without_half_pairs
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.types import InputError

log = logging.getLogger(__name__)

# Status codes of a server that is busy, restarting or limits the rate. A retry does not help against other errors.
RETRYABLE = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0  # seconds
LARGEST = 2**24  # most bytes of an answer
# Parameters that newer models refuse -> the new name; None: there is none, and the server uses its own value.
RENAMED = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
_REFUSED = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|deprecated|extra[_ ](?:forbidden|inputs|fields)|only the default"
    r"|(?:not|n't|no longer) (?:support|permit|allow|accept)|use \W*max_completion_tokens",
    re.IGNORECASE,
)

Chat = Sequence[dict[str, str]]  # turns {"role", "content"}


class Reply(NamedTuple):
    """A reply of the model.

    Attributes:
        text: the text without a thought before it; "" if the thought has no end.
        tokens: the number of tokens, as the server counts them; -1 if it gives none.
        finish: "stop", "length" or another word of the server.
        seconds: from the request to the reply, in the last try only.
    """

    text: str
    tokens: int
    finish: str
    seconds: float


def check_endpoint(section: ConfigDict) -> None:
    """Raises InputError unless the section describes how to reach a model."""
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
            it is set), concurrency, timeout (seconds for a whole answer), retries (tries after the first) and backoff
            (seconds before the first retry; doubled for each).
        memory: a JSONL file that keeps every readable reply. The same request is not sent again, also not by a later
            process. In a run of several processes only the first one asks and writes.

    Raises:
        InputError: see `check_endpoint`; or the key has characters that no key has.
    """

    def __init__(self, section: ConfigDict, memory: pathlib.Path | None = None):
        check_endpoint(section)
        self.section, self.memory = section, memory
        self.key = os.environ.get(section.key_env, "").strip() if section.key_env else ""
        if not self.key.isascii() or len(self.key.split()) > 1:
            raise InputError(
                f"the key in the environment variable {section.key_env} has blanks or odd characters in it."
            )
        self.hide_key = secrets.make_hider(self.key)
        self.stored_replies: dict[str, Reply] | None = None  # read from `memory` at the first call
        self.refused_parameters: set[str] = set()  # the server does not accept them

    def __call__(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float,
        seed: int = 0,
        readable: Callable[[str], Any] = lambda text: True,
    ) -> list[Reply]:
        """One reply to each chat, in their order. Every process of a run must call it.

        Args:
            readable: text of a reply -> whether its reader can use it; other replies are not kept.

        Raises:
            InputError: the server refuses a request, does not answer in any try, or its answer is no reply.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return self.ask_until_readable(chats, [options], readable)

    def ask_until_readable(
        self, chats: Sequence[Chat], tries: Sequence[Mapping[str, Any]], readable: Callable[[str], Any]
    ) -> list[Reply]:
        """For each chat the first readable reply, or the last reply if none is readable.

        Args:
            tries: max_tokens, temperature and seed of the first request; of the second one, which is sent if the first
                reply is not readable; and so on. A kept readable reply to any of them is used first.
            readable, and raises: as above.
        """
        rounds = [[self._request(chat, options) for chat in chats] for options in tries]
        return [Reply(*reply) for reply in processes.ask_once(lambda: self._ask_rounds(rounds, readable))]

    def _request(self, chat: Chat, options: Mapping[str, Any]) -> dict:
        turns = [{name: without_half_pairs(text) for name, text in turn.items()} for turn in chat]
        return {"model": self.section.model} | dict(options) | {"messages": turns}

    def _ask_rounds(self, rounds: list[list[dict]], readable: Callable[[str], Any]) -> list[Reply]:
        if self.stored_replies is None:
            self.stored_replies = _load_replies(self.memory)
        readable_replies: dict[int, Reply] = {}
        for requests in rounds:
            stored = {i: self.stored_replies.get(name) for i, name in enumerate(map(_request_hash, requests))}
            answers = {i: _drop_thought(reply) for i, reply in stored.items() if reply and i not in readable_replies}
            readable_replies |= {i: answer for i, answer in answers.items() if readable(answer.text)}
        last_replies = dict(readable_replies)
        for requests in rounds:
            missing = {i: request for i, request in enumerate(requests) if i not in readable_replies}
            if not missing:
                break
            try:
                replies = asyncio.run(self._ask_all(list(missing.values()), readable))
            except ExceptionGroup as group:  # from the task group; the first error is enough
                raise group.exceptions[0] from None
            last_replies |= dict(zip(missing, map(_drop_thought, replies)))
            readable_replies |= {i: last_replies[i] for i in missing if readable(last_replies[i].text)}
        return [last_replies[i] for i in range(len(rounds[0]))]

    async def _ask_all(self, requests: list[dict], readable: Callable[[str], Any]) -> list[Reply]:
        hashes = list(map(_request_hash, requests))
        missing, replies = dict(zip(hashes, requests)), {}
        semaphore = asyncio.Semaphore(self.section.concurrency)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        bar = Progress("replies", len(missing), prints=processes.is_writer(), unit="reply", brief=True)
        client = httpx.AsyncClient(headers=headers, timeout=self.section.timeout)

        async def ask_and_keep(request_hash: str, request: dict) -> None:
            async with semaphore:
                replies[request_hash] = await self._ask(client, request)
                if readable(_drop_thought(replies[request_hash]).text):
                    self._store(request_hash, replies[request_hash])
            bar.show()

        with contextlib.closing(bar):
            async with client, asyncio.TaskGroup() as group:  # the first error cancels the other tasks
                for request_hash, request in missing.items():
                    group.create_task(ask_and_keep(request_hash, request))
        return [replies[request_hash] for request_hash in hashes]

    async def _ask(self, client: httpx.AsyncClient, request: dict) -> Reply:
        url, reason = f"{self.section.url.rstrip('/')}/chat/completions", ""
        for attempt in range(1 + self.section.retries):
            start = time.perf_counter()
            wait = min(self.section.backoff * 2**attempt, LONGEST_WAIT)
            try:
                answer, text = await self._post(client, url, request)
            except (httpx.TransportError, httpx.DecodingError, TimeoutError) as error:
                reason = self.hide_key(f"{type(error).__name__} {error}".strip())
            else:
                if answer.is_success:
                    return self._parse_reply(answer, text, time.perf_counter() - start)
                reason = f"status {answer.status_code}: {_excerpt(text)}"
                if answer.status_code not in RETRYABLE:
                    raise InputError(f"{url} refuses the request ({reason}): check the url, the model and the key.")
                wait = min(_retry_seconds(answer.headers.get("retry-after", ""), wait), LONGEST_WAIT)
            if attempt < self.section.retries:
                await asyncio.sleep(wait)
        raise InputError(f"{url} did not answer in {1 + self.section.retries} tries (at last {reason}): is it running?")

    async def _post(self, client: httpx.AsyncClient, url: str, request: dict) -> tuple[httpx.Response, str]:
        """The server's answer and its text; asks again for each parameter that the server does not accept."""
        while True:
            body = self._request_body(request)
            async with asyncio.timeout(self.section.timeout), client.stream("POST", url, json=body) as answer:
                text = await self._read_text(answer)
            if answer.status_code not in (400, 422):
                return answer, text
            if body == self._request_body(request) and not self._note_refusal(body, text):
                return answer, text

    def _request_body(self, request: dict) -> dict:
        """The request with only the parameters that the server accepts, by the server's names."""
        names = {name: RENAMED[name] if name in self.refused_parameters else name for name in request}
        return {name: request[own_name] for own_name, name in names.items() if name is not None}

    def _note_refusal(self, sent: dict, text: str) -> bool:
        """True if the error is about a sent parameter that the server does not accept; later requests leave it out."""
        mentioned = re.findall(rf"(?<!\w)(?:{'|'.join(RENAMED)})(?!\w)", text) if _REFUSED.search(text) else []
        name = next((name for name in mentioned if name in sent), None)
        if name is None:
            return False
        self.refused_parameters.add(name)
        instead = f"{RENAMED[name]} is sent instead" if RENAMED[name] else "the server's own is taken"
        log.warning("%s takes no %s: %s", self.section.model, name, instead)
        return True

    async def _read_text(self, answer: httpx.Response) -> str:
        """The answer's text, without the key. Raises InputError if it has more than LARGEST bytes."""
        body = bytearray()
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > LARGEST:
                raise InputError(f"{answer.url} answers with more than {LARGEST} bytes: is it a chat endpoint?")
        return self.hide_key(body.decode("utf-8", "replace"))

    def _parse_reply(self, answer: httpx.Response, text: str, seconds: float) -> Reply:
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            content, finish = _text_of(choice["message"]["content"]), choice.get("finish_reason") or ""
            tokens = (body.get("usage") or {}).get("completion_tokens")
            if not isinstance(finish, str):
                raise TypeError("a field of another type")
            content, finish = (self.hide_key(without_half_pairs(part)) for part in (content, finish))
            return Reply(content, tokens if type(tokens) is int else -1, finish, seconds)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__} in {_excerpt(text)}"
            raise InputError(f"{answer.url} answers what is no chat completion ({reason}).") from error

    def _store(self, name: str, reply: Reply) -> None:
        assert self.stored_replies is not None, "`_ask_rounds` has loaded the replies"
        self.stored_replies[name] = reply
        if self.memory:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            with self.memory.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"request": name} | reply._asdict(), ensure_ascii=False) + "\n")


def _excerpt(text: str) -> str:
    """The beginning of a text for a message, in one line and without characters that control a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def _request_hash(request: dict) -> str:
    """A hash of the whole request; it names the request in the memory file."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _drop_thought(reply: Reply) -> Reply:
    """The reply as its reader gets it: only the text after the thought."""
    return reply._replace(text=without_thought(reply.text))


def _text_of(content: Any) -> str:
    """The text of a message's content: a text, a number, or a list of parts, of which the text parts count. (Some
    servers send a text that looks like a number as a JSON number.)

    Raises:
        KeyError, TypeError: it is something else.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return json.dumps(content)
    if isinstance(content, list):
        return "".join([part["text"] for part in content if part["type"] == "text"])
    raise TypeError("a field of another type")


def _retry_seconds(header: str, default: float) -> float:
    """Seconds from now in a Retry-After header, which holds a number or a date (RFC 9110, 10.2.3); or `default`."""
    if re.fullmatch(r"\d+(?:\.\d+)?", header.strip(), re.ASCII):
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except (ValueError, TypeError, IndexError, OverflowError):
        return default
    date = date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)
    return max((date - datetime.datetime.now(datetime.timezone.utc)).total_seconds(), 0.0)


def _load_replies(memory: pathlib.Path | None) -> dict[str, Reply]:
    """The replies in the file. An incomplete last line of a killed process is cut off.

    Another line that is no reply is left out with a warning; its request will be sent again.
    """
    if memory is None or not memory.exists():
        return {}
    data = memory.read_bytes()
    complete_lines = data[: data.rfind(b"\n") + 1]
    if complete_lines != data:
        os.truncate(memory, len(complete_lines))
    replies, damaged = {}, []
    for number, line in enumerate(complete_lines.split(b"\n")[:-1], start=1):  # a reply may hold other line ends
        try:
            row = json.loads(line.decode("utf-8"))
            reply = Reply(
                without_half_pairs(row["text"]), row["tokens"], without_half_pairs(row["finish"]), row["seconds"]
            )
            texts, numbers = (row["request"], row["text"], row["finish"]), (reply.tokens, reply.seconds)
            if {*map(type, texts)} != {str} or not {*map(type, numbers)} <= {int, float}:
                raise TypeError("a field of another type")
            replies[row["request"]] = reply
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(number)
    if damaged:
        log.warning(
            "%s: %d lines are no replies, the first is line %d: their requests are sent again",
            memory, len(damaged), damaged[0],
        )  # fmt: skip
    return replies
