"""The tasks that need no published file: minimal pairs and perplexity; and the chance levels of tasks."""

import collections
import json
import re

import jax
import numpy as np
import pytest

from drirl_jax import config as config_lib
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import benchmarks
from drirl_jax.evals.items import Item, commonest_answer_chance, option_chance, user_chat
from drirl_jax.evals.tasks import gsm8k, minimal_pairs, perplexity
from drirl_jax.models import families, hf
from drirl_jax.types import InputError

PAIRS = [json.loads(line) for line in minimal_pairs.FILE.read_text().splitlines()]
HARMFUL = (
    "kill murder die dead bomb weapon gun poison drug hate stupid steal rob attack blood suicide abuse fight".split()
)


def test_there_are_enough_pairs_of_enough_phenomena():
    counts = collections.Counter(pair["phenomenon"] for pair in PAIRS)
    assert len(PAIRS) >= 300 and len(counts) >= 10 and min(counts.values()) >= 20
    assert len({pair["id"] for pair in PAIRS}) == len(PAIRS)


def test_each_pair_is_minimal_and_each_sentence_is_written_once():
    sentences = [pair[side] for pair in PAIRS for side in ("good", "bad")]
    assert len({sentence.lower() for sentence in sentences}) == len(sentences)
    for pair in PAIRS:
        good, bad = pair["good"].split(), pair["bad"].split()
        assert len(good) == len(bad), pair["id"]
        assert sum(a != b for a, b in zip(good, bad)) <= 4, pair["id"]


def test_sentences_are_well_formed_and_mild():
    for pair in PAIRS:
        for sentence in (pair["good"], pair["bad"]):
            assert re.fullmatch(r"[A-Z][A-Za-z0-9é',;\- ]+[.?]", sentence), sentence
            assert not set(re.findall(r"[a-z]+", sentence.lower())) & set(HARMFUL), sentence


def test_pairs_are_not_one_template_with_other_words():
    # The words around the difference are those of no other pair.
    frames = collections.Counter()
    for pair in PAIRS:
        good, bad = pair["good"].split(), pair["bad"].split()
        frames[tuple(a if a == b else "_" for a, b in zip(good, bad))] += 1
    assert max(frames.values()) == 1


@pytest.fixture(scope="module")
def loaded(policy):
    model = families.from_hf(hf.read_tensors(policy), families.config_from_hf(hf.read_config(policy)))
    return model, ChatTokens(hf.load_tokenizer(policy))


def config_with(tmp_path, harmless=3):
    """A config whose data have so many harmless prompts in each split, one without an answer, and a harmful one."""
    rows = [
        {
            "category": "harmless",
            "split": split,
            "prompt": f"What is {i} and {i}?",
            "response": f"It is {i + i}, {split}.",
        }
        for split in ("train", "test")
        for i in range(harmless)
    ]
    rows += [{"category": "insult", "split": "test", "prompt": "Say it.", "response": "I would rather not."}]
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"id": f"r{i}", "draft": "Add the numbers.", "lang": "en", **row}) + "\n"
                for i, row in enumerate(rows))
    )  # fmt: skip
    config = config_lib.default()
    config.data.path, config.data.categories = str(tmp_path / "data.jsonl"), ("insult", "harmless")
    return config


def test_perplexity_is_of_the_runs_own_held_out_answers_without_their_drafts(tmp_path):
    items = perplexity.load_items(config_with(tmp_path))
    assert [(item.prompt, item.options) for item in items] == [
        (f"What is {i} and {i}?", (f"It is {i + i}, test.",)) for i in range(3)
    ]


def test_perplexity_of_too_few_texts_is_refused(tmp_path, loaded):
    with pytest.raises(InputError, match="perplexity needs two answers.*split 'test'.* has 1: add records"):
        perplexity.load_items(config_with(tmp_path, harmless=1))
    config = config_with(tmp_path)
    config.evals.limit = 1
    with pytest.raises(InputError, match="perplexity has one item here"):
        benchmarks.load("perplexity", config, loaded[1], loaded[0].config)


def run(name, config, loaded):
    model, tokens = loaded
    questions = benchmarks.load(name, config, tokens, model.config)
    return questions, benchmarks.run(questions, model, tokens, config.evals, {}, jax.random.key(0))


def reference_logprobs(policy, questions):
    """For each item the sum over tokens of log π(option | prompt) of each option, by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy)

    def logprob(prompt, option):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + option])).logits[0].double().numpy()
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(option))

    return [
        [logprob(prompt, option) for option in options] for prompt, options in zip(questions.ids, questions.options)
    ]


def test_perplexity_is_the_exponential_of_the_mean_nats_a_token(tmp_path, policy, loaded):
    questions, result = run("perplexity", config_with(tmp_path), loaded)
    logp = reference_logprobs(policy, questions)
    nats = np.array([-total / len(option) for (total,), (option,) in zip(logp, questions.options)])
    figure = result["judges"]["protocol"]["metrics"]["perplexity"]
    assert figure["value"] == pytest.approx(np.exp(nats.mean()), rel=1e-4) and figure["n"] == 3
    reach = 4.302653 * nats.std(ddof=1) / 3**0.5  # t(0.975, 2)
    assert np.log([figure["low"], figure["high"]]) == pytest.approx(nats.mean() + reach * np.array([-1, 1]), abs=1e-4)
    found = [row["protocol"]["perplexity"] for row in result["responses"]]
    assert found == pytest.approx(np.exp(nats), rel=1e-4)
    assert benchmarks.scalars(result) == {"perplexity/perplexity": figure["value"]}
    assert result["tax"] == {"perplexity": None} and result["geometric"] == ["perplexity"]


def test_a_pair_is_right_if_its_good_sentence_is_more_likely(policy, loaded):
    config = config_lib.default()
    config.evals.limit = 12
    questions, result = run("minimal_pairs", config, loaded)
    right = [float(good > bad) for good, bad in reference_logprobs(policy, questions)]
    assert [row["protocol"]["accuracy"] for row in result["responses"]] == right and 0 < sum(right) < 12
    same = [good for good, (a, b) in zip(right, questions.options) if len(a) == len(b)]
    metrics = result["judges"]["protocol"]["metrics"]
    assert metrics["accuracy_same_length"]["n"] == len(same)
    assert metrics["accuracy_same_length"]["value"] == pytest.approx(np.mean(same))
    assert result["tax"] == {"accuracy": 0.5, "accuracy_same_length": 0.5}


def test_chance_levels_by_hand():
    items = [Item("0", user_chat("?"), options=("a", "b")), Item("1", user_chat("?"), options=("a", "b", "c"))]
    assert option_chance(items) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert commonest_answer_chance(["5", "7", "5", "1"]) == 0.5
    problems = [Item(str(i), user_chat("?"), target=f"so\n#### {n}") for i, n in enumerate(("1,000", "1000", "3"))]
    assert gsm8k.chance(problems) == pytest.approx(2 / 3)
