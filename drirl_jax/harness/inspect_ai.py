"""A policy of this project as a model provider of inspect_ai (UK AI Security Institute).

inspect eval TASK.py --model drirl_jax/runs/quickstart

inspect_ai asks for one answer at a time, many at once: those that wait while the policy answers are asked together.
"""

from __future__ import annotations

from typing import NamedTuple

import anyio
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from drirl_jax.harness import Policy, cut
from drirl_jax.types import InputError

MAX_NEW = 256  # where neither the task nor the command says


class Asked(NamedTuple):
    """A chat that waits, and what it is asked with: max_new, temperature and seed."""

    chat: tuple[dict[str, str], ...]
    options: tuple[int, float, int]
    answer: list  # empty until there is one


@modelapi(name="drirl_jax")
class DrirlJax(ModelAPI):
    """See `Policy`; `-M batch=N` is its batch."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        **model_args,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        self.policy = Policy(model_name, int(model_args.get("batch", 32)))
        self.waiting: list[Asked] = []
        self.calls = 0
        self.busy = anyio.Lock()

    def max_connections(self) -> int:
        """As many at once as two batches, so that one fills up while the other is answered."""
        return 2 * self.policy.batch

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise InputError("drirl_jax has policies without tools: choose a task that needs none.")
        unknown = {"top_p": config.top_p not in (None, 1.0), "top_k": bool(config.top_k)}
        unknown["num_choices"] = (config.num_choices or 1) > 1
        if any(unknown.values()):
            given = ", ".join(name for name, wanted in unknown.items() if wanted)
            raise InputError(f"drirl_jax samples one answer from the whole softmax: leave {given} out.")
        options = (config.max_tokens or MAX_NEW, config.temperature or 0.0, config.seed or 0)
        mine = Asked(tuple({"role": turn.role, "content": turn.text} for turn in input), options, [])
        self.policy.need_room(mine.chat, options[0])  # before it can spoil the answers of its batch
        self.waiting.append(mine)
        await anyio.sleep(0)  # the others that ask now take their place in the line
        async with self.busy:
            if not mine.answer:
                batch = [asked for asked in self.waiting if asked.options == options]
                self.waiting = [asked for asked in self.waiting if asked.options != options]
                # No prefix: each batch would have another one, and another program.
                self.calls += 1
                chats = [of.chat for of in batch]
                found = await anyio.to_thread.run_sync(self.policy.respond, chats, *options, (), self.calls)
                for asked, answer in zip(batch, found, strict=True):
                    asked.answer.append(answer)
        (answer,) = mine.answer
        output = ModelOutput.from_content(
            self.model_name,
            cut(answer.text, config.stop_seqs or []),
            "stop" if answer.finish == "stop" else "max_tokens",
        )
        output.usage = ModelUsage(output_tokens=answer.tokens, total_tokens=answer.tokens)
        return output
