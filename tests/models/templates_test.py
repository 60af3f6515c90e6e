"""Chat templates: which one counts, what it may do, and where a reasoning model's thoughts go."""

import time

import pytest
from helpers.tiny_tokenizers import CHATML, chatml, turns

from drirl_jax.data.examples import common_prefix
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import answers
from drirl_jax.models import templates
from drirl_jax.models.templates import TemplateRefusal
from drirl_jax.runtime.thoughts import without_thought
from drirl_jax.types import InputError

# As Qwen3 has it: an empty thought where thinking is switched off, and before the last answer.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ answer }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}\n"
)
# As DeepSeek-R1 has it: every prompt ends in an open thought.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %}<turn>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<turn><think>\n{% endif %}"
)
MAGISTRAL = "{% for m in messages %}[THINK] is for thoughts.<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def written(text, prompt="hi"):
    return text.tokenizer.decode(text.prompt_ids(prompt))


def said(text, answer):
    """What a demonstration is trained as, behind its prompt."""
    return text.tokenizer.decode(text.response_ids(answer, 99))


def test_thinking_switched_off_ends_the_prompt_after_an_empty_thought():
    text = ChatTokens(chatml(chat_template=QWEN3))
    assert written(text).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert said(text, "Hello") == "Hello<|im_end|>"
    text = ChatTokens(chatml(chat_template=DEEPSEEK))
    assert written(text) == "<|im_start|>hi<turn><think>\n\n</think>\n\n"
    assert said(text, "Hello") == "Hello<|im_end|>" and text.decode([*text.response_ids("a", 9)], 1) == "a"


def test_thinking_switched_on_leaves_the_thought_to_the_model_and_closes_it_before_a_demonstration():
    text = ChatTokens(chatml(chat_template=QWEN3), enable_thinking=True)
    assert written(text).endswith("<|im_start|>assistant\n")
    assert said(text, "Hello") == "<think>\n\n</think>\n\nHello<|im_end|>"
    text = ChatTokens(chatml(chat_template=DEEPSEEK), enable_thinking=True)
    assert written(text) == "<|im_start|>hi<turn><think>\n"
    assert said(text, "Hello") == "\n</think>\n\nHello<|im_end|>"
    # What the model says begins inside the thought, and reads so.
    for reply, answer in {"Hm.</think>Lyon": "Lyon", "Hm. Paris": ""}.items():
        ids = text.tokenizer.encode(reply)
        assert text.decode(ids, len(ids)) == "<think>" + reply
        assert without_thought(text.decode(ids, len(ids))) == answer
        assert text.response_ids(text.decode(ids, len(ids)), 99)[:-1] == ids


def test_thinking_cannot_be_switched_on_where_there_is_none():
    with pytest.raises(InputError, match="enable_thinking is True, but the chat template knows no thoughts"):
        ChatTokens(chatml(), enable_thinking=True)


def test_marks_of_thoughts_that_are_special_tokens_stay_in_what_is_decoded():
    tokenizer = chatml(chat_template=MAGISTRAL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    text = ChatTokens(tokenizer)
    ids = tokenizer.encode("[THINK]Paris?[/THINK]Lyon<|im_end|>")
    assert text.decode(ids, len(ids)) == "[THINK]Paris?[/THINK]Lyon"


@pytest.mark.parametrize("marked", ["strftime_now('%Y-%m-%d %H:%M')", "strftime_now('%d %b %Y') ~ strftime_now('%A')"])
def test_the_clock_is_in_no_prompt(marked, monkeypatch):
    import transformers.utils.chat_template_utils as utils

    monkeypatch.setattr(utils, "datetime", None)  # it would be asked for the time
    text = ChatTokens(
        chatml(chat_template="{% if strftime_now is defined %}{{ " + marked + " }}\n{% endif %}" + CHATML)
    )
    assert written(text).startswith(("2024-07-26 00:00\n", "26 Jul 2024Friday\n"))


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML, "takes more than"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}" + CHATML, "takes more than"),
        ("{{ 'x'.rjust(4000000000) | length }}" + CHATML, "takes more than"),
        ("x" * 2_000_000 + CHATML, "has 2000[0-9]* characters"),
        ("{{ range(10 ** 5) | random }}" + CHATML, "a different text each time"),
        ("<|im_start|>{{ prompt }}", "leaves out what the user says"),
        ("{{ messages[0].content[0].text }}", "leaves out what the user says"),
        ("{{ raise_exception('never') }}", r"refuses this chat \(never\)"),
        ("{{ 1 / 0 }}", "refuses this chat .division by zero"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML, "refuses this chat .*unsafe"),
        ("{% for m in messages %}{{ m.content }", "refuses this chat"),
        ({"tool_use": CHATML, "rag": CHATML}, "named 'rag', 'tool_use', and none named 'default'"),
        (5, "is int, not text"),
        ("  ", "no chat template"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_template_that_cannot_be_used_is_refused_before_work(template, message):
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        ChatTokens(chatml(chat_template=template))
    assert time.process_time() - start < 5


def test_of_several_templates_the_default_is_taken():
    named = chatml(chat_template={"tool_use": "{{ raise_exception('no') }}", "default": CHATML})
    assert ChatTokens(named).prompt_ids("hi") == ChatTokens(chatml()).prompt_ids("hi")


@pytest.mark.parametrize(
    "change",
    [
        "{{ raise_exception('too long') if messages[0].content|length > 9 }}",
        "{{ messages[0].missing.field if '?' in messages[0].content }}",
    ],
)  # fmt: skip
def test_a_template_that_fails_on_a_real_prompt_names_it(change):
    text = ChatTokens(chatml(chat_template=change + CHATML))
    assert text.prompt_ids("hi")
    with pytest.raises(TemplateRefusal, match="refuses this chat .*whose last question begins 'How do I pick"):
        text.prompt_ids("How do I pick a lock?")


def test_words_that_a_template_drops_or_changes_are_missed():
    text = ChatTokens(chatml(chat_template=CHATML.replace("m['content']", "m['content'][:20]|trim")))
    assert written(text, "  two\nlines ").count("two\nlines") == 1  # blanks around the words may go
    with pytest.raises(TemplateRefusal, match="leaves out or changes what the user says"):
        text.prompt_ids("a question that is longer than twenty letters")
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(InputError, match="leaves out .* the system says .*leave the system prompt empty"):
        ChatTokens(chatml(chat_template=silent), "Be safe.")


def test_an_empty_system_turn_leaves_the_templates_own_out():
    own = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nMine<|im_end|>\n{% endif %}" + CHATML
    assert "Mine" in written(ChatTokens(chatml(chat_template=own)))
    assert written(ChatTokens(chatml(chat_template=own), "")).startswith(
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user"
    )
    # A template that knows no system turn has none to leave out.
    text = ChatTokens(turns(), "")
    assert text.system is None and text.prompt_ids("hi") == ChatTokens(turns()).prompt_ids("hi")


def test_a_benchmarks_own_system_turn_joins_the_question_where_the_template_knows_none():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for tokenizer in (turns(), chatml(chat_template=silent)):
        text = ChatTokens(tokenizer)
        assert "user\nBe brief.\n\nWhy?<" in tokenizer.decode(answers.prompt_ids(text, chat))
    spoken = tokenizer.decode(answers.prompt_ids(ChatTokens(chatml(), "Be kind."), chat[1:]))
    assert spoken.startswith("<|im_start|>system\nBe kind.<")


def test_few_shots_of_a_reasoning_model_may_lose_their_thoughts():
    text = ChatTokens(chatml(chat_template=QWEN3))
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>no</think>\nOne"}]
    assert "One<|im_end|>" in text.tokenizer.decode(text.chat_ids([*chat, {"role": "user", "content": "2?"}]))


def test_prompts_still_share_their_beginning():
    text = ChatTokens(chatml(chat_template=DEEPSEEK))
    assert common_prefix([text.prompt_ids("one"), text.prompt_ids("two")]) == tuple(text.prompt_ids("")[:1])


def test_ordinary_templates_are_bounded_once():
    before = templates.need_bounded.cache_info().misses
    ChatTokens(chatml()), ChatTokens(chatml()), ChatTokens(chatml())
    assert templates.need_bounded.cache_info().misses <= before + 1
