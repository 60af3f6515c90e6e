"""A local server that speaks as an OpenAI-compatible endpoint, and requests to it."""

import http.server
import json
import threading
import time

from ml_collections import ConfigDict

from drirl_jax.runtime import endpoint

KEY = "sk-very-secret"


class Server(http.server.ThreadingHTTPServer):
    """Answers each chat with its last turn reversed; `script` holds what to do first instead: a status, or text."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.now, self.most = [], [], 0, 0
        self.lock = threading.Lock()
        self.delay, self.retry_after = 0.0, "0"


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
        if callable(todo):
            todo = todo(body)
        status, payload = (todo, "no, " + KEY) if isinstance(todo, int) else (200, todo or json.dumps(reply))
        status, payload = todo if isinstance(todo, tuple) else (status, payload)
        with server.lock:
            server.now -= 1
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", server.retry_after)
        self.end_headers()
        self.wfile.write(payload.encode())

    def log_message(self, *args):
        pass


def section(server, **changes):
    options = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "key_env": "TEST_KEY"}
    return ConfigDict(options | {"concurrency": 3, "timeout": 5.0, "retries": 2, "backoff": 0.01} | changes)


def ask(server, words, memory=None, **changes):
    chats = [[{"role": "user", "content": word}] for word in words]
    model = endpoint.Endpoint(section(server, **changes), memory)
    return [reply.text for reply in model(chats, max_tokens=5, temperature=0.5, seed=7)]
