"""The client of an OpenAI-compatible endpoint, against a local server that misbehaves as real ones do."""

import http.server
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from ml_collections import ConfigDict

from drirl_jax import endpoint
from drirl_jax.types import InputError

KEY = "sk-very-secret"


class Server(http.server.ThreadingHTTPServer):
    """Answers each chat with its last turn reversed; `script` holds what to do first instead: a status, or text."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.now, self.most = [], [], 0, 0
        self.lock = threading.Lock()
        self.delay = 0.0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            server.now += 1
            server.most = max(server.most, server.now)
            todo = server.script.pop(0) if server.script else None
        time.sleep(server.delay)
        text = body["messages"][-1]["content"][::-1]
        reply = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 3},
        }
        status, payload = (todo, "no, " + KEY) if isinstance(todo, int) else (200, todo or json.dumps(reply))
        with server.lock:
            server.now -= 1
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(payload.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def section(server, **changes):
    options = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "key_env": "TEST_KEY"}
    return ConfigDict(options | {"concurrency": 3, "timeout": 5.0, "retries": 2, "backoff": 0.01} | changes)


def ask(server, words, memory=None, **changes):
    chats = [[{"role": "user", "content": word}] for word in words]
    model = endpoint.Endpoint(section(server, **changes), memory)
    return [reply.text for reply in model(chats, max_tokens=5, temperature=0.5, seed=7)]


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


ONE_OF_TWO = """
import pathlib, sys
import jax
from ml_collections import ConfigDict
from drirl_jax import endpoint
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
