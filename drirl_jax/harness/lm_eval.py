"""A policy of this project as a model of lm_eval (EleutherAI's Language Model Evaluation Harness).

python -m drirl_jax.harness.lm_eval --model drirl_jax --model_args model=runs/quickstart --tasks gsm8k \
    --apply_chat_template --fewshot_as_multiturn

Policies are chat models. A context without a chat template counts as a user's message.
"""

from __future__ import annotations

import collections

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from drirl_jax.commands.cli import exit_with
from drirl_jax.harness import Policy, chat_from_string, chat_to_string, cut
from drirl_jax.runtime.endpoint import Chat
from drirl_jax.types import InputError

MAX_NEW = 256  # tokens, where the task sets no limit


@register_model("drirl_jax")
class DrirlJax(LM):
    """See `Policy`; `batch_size` is its batch; "auto" means 32."""

    def __init__(self, model: str, batch_size: int | str = 32, **others):
        super().__init__()
        self.policy = Policy(model, int(batch_size) if str(batch_size).isdigit() else 32)

    @property
    def tokenizer_name(self) -> str:
        return self.policy.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The policy's own template. The name that selects one of several templates is ignored."""
        return self.policy.tokens.tokenizer.chat_template

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise InputError("drirl_jax cannot begin an answer for a policy: leave out the task's gen_prefix.")
        return chat_to_string(chat_history)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        text_of_request: dict[int, str] = {}
        rows_of_options = collections.defaultdict(list)
        for i, request in enumerate(requests):
            _, options = request.args
            is_sampled = options.get("do_sample", False)
            if unsupported := [name for name in ("top_p", "top_k") if is_sampled and options.get(name)]:
                raise InputError(f"drirl_jax samples from the whole softmax: leave {unsupported} out of the task.")
            request_temperature = float(options.get("temperature", 0.0)) if is_sampled else 0.0
            rows_of_options[int(options.get("max_gen_toks", MAX_NEW)), request_temperature].append(i)
        for (max_new, temperature), rows in rows_of_options.items():
            chats = [chat_from_string(requests[i].args[0]) for i in rows]
            for i, answer in zip(rows, self.policy.respond(chats, max_new, temperature), strict=True):
                text_of_request[i] = cut(answer.text, requests[i].args[1].get("until", []))
        return [text_of_request[i] for i in range(len(requests))]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        contexts, continuations = zip(*(request.args for request in requests))
        scores = self.policy.score([chat_from_string(context) for context in contexts], continuations)
        return [(float(score.total[0]), bool(score.greedy[0])) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise InputError("drirl_jax has chat policies, which have no log-likelihood of a text without a prompt.")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        exit_with(str(error))
