"""A policy of this project as a model provider of inspect_ai (UK AI Security Institute).

inspect eval TASK.py --model drirl_jax/runs/quickstart

inspect_ai makes many requests in parallel, for one answer each. Requests that wait while the policy answers form the
next batch.
"""

from __future__ import annotations

from typing import NamedTuple

import anyio
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from drirl_jax.harness import Policy, cut
from drirl_jax.types import InputError

MAX_NEW = 256  # tokens, where neither the task nor the command sets a limit


class Request(NamedTuple):
    """A waiting chat, with its options max_new, temperature and seed."""

    chat: tuple[dict[str, str], ...]
    options: tuple[int, float, int]
    answer: list  # empty until the policy has answered


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
        self.waiting: list[Request] = []
        self.calls = 0
        self.busy = anyio.Lock()

    def max_connections(self) -> int:
        """Two batches, so that one fills while the policy answers the other."""
        return 2 * self.policy.batch

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise InputError("drirl_jax's policies use no tools: choose a task that needs none.")
        unsupported = {"top_p": config.top_p not in (None, 1.0), "top_k": bool(config.top_k)}
        unsupported["num_choices"] = (config.num_choices or 1) > 1
        if any(unsupported.values()):
            names = ", ".join(name for name, is_set in unsupported.items() if is_set)
            raise InputError(f"drirl_jax samples one answer from the whole softmax: leave {names} out.")
        options = (config.max_tokens or MAX_NEW, config.temperature or 0.0, config.seed or 0)
        request = Request(tuple({"role": turn.role, "content": turn.text} for turn in input), options, [])
        self.policy.need_room(request.chat, options[0])  # here, because later it would fail its whole batch
        self.waiting.append(request)
        await anyio.sleep(0)  # lets the other parallel requests join the queue
        async with self.busy:
            if not request.answer:
                batch = [queued for queued in self.waiting if queued.options == options]
                self.waiting = [queued for queued in self.waiting if queued.options != options]
                # No prefix: each batch would have another prefix, and so compile another program.
                self.calls += 1
                chats = [queued.chat for queued in batch]
                answers = await anyio.to_thread.run_sync(self.policy.respond, chats, *options, (), self.calls)
                for queued, answer in zip(batch, answers, strict=True):
                    queued.answer.append(answer)
        (answer,) = request.answer
        output = ModelOutput.from_content(
            self.model_name,
            cut(answer.text, config.stop_seqs or []),
            "stop" if answer.finish == "stop" else "max_tokens",
        )
        output.usage = ModelUsage(output_tokens=answer.tokens, total_tokens=answer.tokens)
        return output
