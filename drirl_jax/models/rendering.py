"""Renders a chat template in a process of its own with bounded time, memory and output; `templates.py` starts it.

It reads {"template", "tokens"} as JSON from standard input. It ends with 0, or with TOO_MUCH if the template needs too
much memory or output; the limit on processor time kills it. A template that refuses a chat is no error here. The file
imports nothing of the project, so it starts in a tenth of a second.
"""

import itertools
import json
import resource
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 2  # of processor time
BYTES = 1 << 30  # of memory
CHARACTERS = 2_000_000  # of output
TOO_MUCH = 3
LONG = "Is a long question as good as a short one?\n" * 200


class Generation(jinja2.ext.Extension):
    """The tag {% generation %}: some templates put it around an assistant's turn for training."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def refuse(message: str):
    raise jinja2.TemplateError(message)


def chats():
    """Chats with one turn and with many, with and without a system turn, short and long."""
    user, answer = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}
    system, long = {"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}
    return [user], [system, user], [user, answer], [long], [system, *[user, answer] * 20, user]


def render(template: str, tokens: dict[str, str]) -> None:
    """Renders every chat. Raises MemoryError beyond CHARACTERS."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.globals |= {"raise_exception": refuse, "strftime_now": str}
    parsed = env.from_string(template)
    for chat, add_prompt, thinking in itertools.product(chats(), (True, False), (True, False)):
        variables = tokens | {"add_generation_prompt": add_prompt, "enable_thinking": thinking, "thinking": thinking}
        length = 0
        try:
            for piece in parsed.generate(messages=chat, tools=None, documents=None, **variables):
                length += len(piece)
                if length > CHARACTERS:
                    raise MemoryError
        except MemoryError:
            raise
        except Exception:  # the template refuses this chat
            continue


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        render(**json.load(sys.stdin))
    except MemoryError:
        return TOO_MUCH
    except Exception:  # the template is no valid Jinja
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
