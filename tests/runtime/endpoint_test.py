"""The client of an OpenAI-compatible endpoint, against a local server that misbehaves as real ones do."""

import base64
import datetime
import email.utils
import html
import json
import socket
import subprocess
import sys
import urllib.parse

import pytest
from helpers.endpoint_server import KEY, ask, section

from drirl_jax.runtime import endpoint, secrets
from drirl_jax.types import InputError


def test_replies_keep_the_order_and_no_more_than_so_many_are_asked_at_once(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    server.delay = 0.05
    words = [f"word{i}" for i in range(10)]
    assert ask(server, words) == [word[::-1] for word in words]
    assert server.most == 3
    path, authorization, body = server.asked[0]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "m", "max_tokens": 5, "temperature": 0.5, "seed": 7
    }  # fmt: skip


def test_what_may_pass_is_asked_again(server):
    server.script = [503, 429]
    assert ask(server, ["abc"]) == ["cba"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("script, sentence", [
    ([500] * 3, "did not answer in 3 tries"),
    ([401], "refuses the request .status 401: no, ...."),
    (["{}"], "answers what is no chat completion"),
    (["<html>"], "answers what is no chat completion"),
])  # fmt: skip
def test_errors_are_one_sentence_without_the_key(server, monkeypatch, tmp_path, script, sentence):
    monkeypatch.setenv("TEST_KEY", KEY)
    server.script = script
    with pytest.raises(InputError, match=sentence) as caught:
        ask(server, ["abc", "def"], tmp_path / "replies.jsonl", concurrency=1)
    assert KEY not in str(caught.value)


def test_a_server_that_is_not_there(server):
    server.server_close()
    with pytest.raises(InputError, match="did not answer in 3 tries .at last ConnectError"):
        ask(server, ["abc"])


def test_replies_are_kept_and_not_asked_for_again(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    memory = tmp_path / "run" / "replies.jsonl"
    ask(server, ["one", "two", "one"], memory)
    assert len(server.asked) == 2
    with memory.open("a") as file:
        file.write('{"request": "torn')
    assert ask(server, ["two", "three"], memory) == ["owt", "eerht"]
    assert len(server.asked) == 3 and KEY not in memory.read_text()
    assert [json.loads(line)["text"] for line in memory.read_text().splitlines()][-1] == "eerht"
    # Another temperature, seed or length is another request.
    model = endpoint.Endpoint(section(server), memory)
    model([[{"role": "user", "content": "one"}]], max_tokens=5, temperature=0.5, seed=8)
    assert len(server.asked) == 4


def test_a_reply_with_other_line_ends_is_read_again(server, tmp_path):
    memory, words = tmp_path / "replies.jsonl", ["one\u2028two", "a\x85b\rc"]
    assert ask(server, words, memory) == ask(server, words, memory) == [word[::-1] for word in words]
    assert len(server.asked) == 2


def test_a_key_of_a_file_with_a_line_end_works_and_an_odd_one_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY + "\r\n")
    ask(server, ["abc"])
    assert server.asked[0][1] == f"Bearer {KEY}"
    monkeypatch.setenv("TEST_KEY", KEY + "\n" + KEY)
    with pytest.raises(InputError, match="TEST_KEY has blanks") as caught:
        ask(server, ["abc"])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("changes", [{"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}])
def test_numbers_that_cannot_work(server, changes):
    with pytest.raises(InputError, match="must be 1 or more"):
        endpoint.Endpoint(section(server, **changes))


@pytest.mark.parametrize("changes", [{"url": "localhost"}, {"url": "http://"}, {"url": "http://a:b:c"}, {"model": ""}])
def test_an_endpoint_that_says_not_enough(server, changes):
    with pytest.raises(InputError, match="needs a url that begins with http"):
        endpoint.Endpoint(section(server, **changes))


def refusing(*names):
    """A server that refuses these parameters, in the words of OpenAI's newer models or of a strict parser."""
    words = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0.5 with this model. "
        "Only the default (1) value is supported.",
        "seed": '{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}',
    }

    def answer(body):
        wrong = next((name for name in names if name in body), None)
        return (400 if wrong != "seed" else 422, json.dumps({"error": {"message": words[wrong]}})) if wrong else None

    return answer


@pytest.mark.parametrize("names", [("max_tokens",), ("temperature",), ("seed",), ("max_tokens", "temperature", "seed")])
def test_a_parameter_that_the_server_refuses_is_not_sent_again(server, names, caplog):
    server.script = [refusing(*names)] * 20
    model = endpoint.Endpoint(section(server, concurrency=1))
    chats = [[{"role": "user", "content": word}] for word in ("abc", "def")]
    replies = model(chats, max_tokens=5, temperature=0.5, seed=7)
    assert [reply.text for reply in replies] == ["cba", "fed"]
    assert len(server.asked) == len(names) + 2  # each is learnt once
    last = server.asked[-1][2]
    assert not set(names) & set(last)
    assert last.get("max_completion_tokens" if "max_tokens" in names else "max_tokens") == 5
    warned = [record.getMessage() for record in caplog.records]
    assert all(f"m takes no {name}: " in text for name, text in zip(names, warned, strict=True))


def test_a_request_that_is_refused_for_another_reason_is_one_sentence(server):
    message = "This model's maximum context length is 8 tokens: reduce max_tokens."
    server.script = [(400, json.dumps({"error": {"message": message}}))]
    with pytest.raises(InputError, match="refuses the request .status 400"):
        ask(server, ["abc"])
    assert len(server.asked) == 1


SECRET = "sk-a/b+c=D&e-1234"
FORMS = {
    "as it is": SECRET,
    "capitals": SECRET.upper(),
    "JSON's escapes": "".join(f"\\u{ord(c):04X}" for c in SECRET),
    "escaped slashes": SECRET.replace("/", "\\/"),
    "in a url": urllib.parse.quote(SECRET, safe=""),
    "in a url twice": urllib.parse.quote(urllib.parse.quote(SECRET, safe="")),
    "HTML": html.escape(SECRET),
    "HTML's numbers": "".join(f"&#{ord(c)};" for c in SECRET),
    "base64": base64.b64encode(SECRET.encode()).decode(),
    "base64 behind a user": base64.b64encode(b"user:" + SECRET.encode()).decode(),
    "base64 for urls": base64.urlsafe_b64encode(b"x" + SECRET.encode() + b"y").decode(),
    "hexadecimal": SECRET.encode().hex(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_hidden_in_every_form(form):
    core = FORMS[form][4:-4]  # the ends of base64 hang on what stands beside
    hidden = secrets.make_hider(SECRET)(f"before <{FORMS[form]}> after")
    assert core not in hidden and hidden.startswith("before <") and hidden.endswith("> after") and "***" in hidden


def test_a_key_that_the_server_repeats_escaped_is_in_no_reply_and_no_file(server, monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_KEY", SECRET)
    memory, escaped = tmp_path / "memory.jsonl", FORMS["JSON's escapes"]
    replies = [json.dumps({"choices": [{"message": {"content": f"<{text}>"}}]}) for text in (escaped, SECRET.upper())]
    server.script = [replies[0].replace("\\\\u", "\\u"), *replies, (401, f"wrong key {escaped}!")]
    assert ask(server, ["abc", "def", "ghi"], memory, concurrency=1) == ["<***>"] * 3
    assert SECRET.lower() not in memory.read_text().lower()
    with pytest.raises(InputError, match="wrong key [*]{3}!"):
        ask(server, ["jkl"])


def test_a_short_key_hides_no_words_that_look_like_it(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "EMPTY")
    assert ask(server, ["ytpme na"]) == ["an empty"]


@pytest.mark.parametrize("header, seconds", [
    ("0", 0.0), (" 7 ", 7.0), ("1.5", 1.5), ("9" * 400, float("inf")), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ("", 3.0), ("²", 3.0), ("-1", 3.0), ("soon", 3.0), ("1e3", 3.0), ("٣", 3.0), ("Wed, 99 Oct 2015 07:28:00", 3.0),
])  # fmt: skip
def test_how_long_to_wait(header, seconds):
    assert endpoint._retry_seconds(header, 3.0) == seconds


def test_a_date_to_wait_for():
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=30)
    assert 25 < endpoint._retry_seconds(email.utils.format_datetime(soon, usegmt=True), 3.0) <= 30


def test_an_odd_time_to_wait_is_no_error(server):
    server.script, server.retry_after = [429], "\u00b2"
    assert ask(server, ["abc"]) == ["cba"]


CONTENTS = {
    '"a"': "a", "null": "", "8": "8", "0": "0", "7.5": "7.5", '"x \\ud83d"': "x \ufffd",
    '"\\ud83d\\ude00"': "\U0001f600", '[{"type": "thinking"}, {"type": "text", "text": "b"}]': "b",
    '"<think>no</think>\\n\\nyes"': "yes", '"<think>no"': "",
}  # fmt: skip


def test_contents_of_other_forms(server, tmp_path):
    server.script = [
        '{"choices": [{"message": {"content": ' + content + '}}], "usage": {"completion_tokens": null}}'
        for content in CONTENTS
    ]
    for _ in range(2):  # of the server, and of the memory
        found = ask(server, list(CONTENTS), tmp_path / "memory.jsonl", concurrency=1)
        assert found == list(CONTENTS.values()) and len(server.asked) == len(CONTENTS)


@pytest.mark.parametrize("content", [True, ["8"], {}, [{"text": "8"}]])
def test_contents_that_are_none(content):
    with pytest.raises((TypeError, KeyError)):
        endpoint._text_of(content)


def test_half_a_surrogate_pair_in_a_request(server):
    assert ask(server, ["a \ud83d"]) == ["\ufffd a"]


def test_only_what_can_be_read_is_kept(server, tmp_path):
    memory, chats = tmp_path / "memory.jsonl", [[{"role": "user", "content": word}] for word in ("ab", "cd")]
    tries = [{"max_tokens": 5, "temperature": 0.0, "seed": seed} for seed in range(2)]

    def read():
        model = endpoint.Endpoint(section(server, concurrency=1), memory)
        return [reply.text for reply in model.ask_until_readable(chats, tries, lambda text: text in ("ba", "dc"))]

    junk = json.dumps({"choices": [{"message": {"content": "junk"}}]})
    server.script = [None, junk, junk]
    assert read() == ["ba", "junk"] and len(server.asked) == 3  # the first could be read
    assert len(memory.read_text().splitlines()) == 1
    server.script = [junk]
    assert read() == ["ba", "dc"] and len(server.asked) == 5  # junk is asked for again, at first with the first seed
    assert read() == ["ba", "dc"] and len(server.asked) == 5  # nothing is asked


def test_junk_that_an_older_version_kept_is_asked_for_again(server, tmp_path):
    memory, chat = tmp_path / "memory.jsonl", [{"role": "user", "content": "ab"}]
    options = {"max_tokens": 5, "temperature": 0.0}
    server.script = [json.dumps({"choices": [{"message": {"content": "junk"}}]})]
    endpoint.Endpoint(section(server), memory)([chat], **options)
    model = endpoint.Endpoint(section(server), memory)
    (reply,) = model([chat], **options, readable=lambda text: text != "junk")
    assert reply.text == "ba" and len(server.asked) == 2


@pytest.mark.parametrize("line", [
    "", "{", "3", "null", "[]", "{}", '{"request": 1, "text": "a", "tokens": 1, "finish": "", "seconds": 1}',
    '{"request": "a", "text": 5, "tokens": 1, "finish": "", "seconds": 1}', "\udcff",
    '{"request": "a", "text": "", "tokens": "1", "finish": "", "seconds": 1}', "[" * 9999, "\x00",
    '{"request": "a", "text": [], "tokens": 1, "finish": "", "seconds": 1}',
])  # fmt: skip
def test_a_damaged_line_of_the_memory_costs_that_reply_alone(tmp_path, line, caplog):
    memory, whole = (
        tmp_path / "memory.jsonl",
        '{"request": "%s", "text": "a", "tokens": -1, "finish": "", "seconds": 1}',
    )
    first, second = ((whole % name).encode() for name in ("one", "two"))
    memory.write_bytes(b"\n".join([first, line.encode("utf-8", "surrogateescape"), second, b'{"torn']))
    reply = endpoint.Reply("a", -1, "", 1)
    assert endpoint._load_replies(memory) == {"one": reply, "two": reply}
    assert "1 lines are no replies, the first is line 2" in caplog.text
    assert memory.read_bytes().endswith(second + b"\n")


ONE_OF_TWO = """
import pathlib, sys
import jax
from ml_collections import ConfigDict
from drirl_jax.runtime import endpoint
from drirl_jax.runtime import secrets
from drirl_jax.types import InputError

port, number, url, memory = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
section = {"url": url, "model": "m", "key_env": "", "concurrency": 3, "timeout": 60.0, "retries": 0, "backoff": 0.0}
model = endpoint.Endpoint(ConfigDict(section), pathlib.Path(memory))
for words in (["ab", "cd"], ["cd", "é" * 500], ["refused"]):
    try:
        replies = model([[{"role": "user", "content": word}] for word in words], max_tokens=5, temperature=0.5)
        print([reply.text for reply in replies])
    except InputError as error:
        print(error)
"""


def test_of_two_processes_one_asks_and_both_are_told(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server.script = [None] * 3 + [401]
    url, memory = f"http://127.0.0.1:{server.server_port}/v1", tmp_path / "replies.jsonl"
    command = [sys.executable, "-c", ONE_OF_TWO, str(port)]
    processes = [
        subprocess.Popen([*command, str(number), url, str(memory)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    told = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    one, other = ([line for line in lines if not line.startswith("[Gloo]")] for lines in told)
    assert one == other and one[:2] == [str(["ba", "dc"]), str(["dc", "é" * 500])]
    assert len(one) == 3 and "refuses the request (status 401" in one[2]
    assert len(server.asked) == 4 and len(memory.read_text().splitlines()) == 3
