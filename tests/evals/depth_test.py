"""Measures of depth: what a prefill is made of, the judges' shares, KL beside numpy, and the command."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.tiny_models import apply, tiny

from drirl_jax import config as config_lib
from drirl_jax import judges, rollout
from drirl_jax.data.records import Record
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import answers, depth
from drirl_jax.models import families, hf
from drirl_jax.reports.intervals import wilson
from drirl_jax.types import Group, InputError

ROOT = pathlib.Path(__file__).parents[2]
ANSWER = "You need leaves and hot water for it. Wait for three minutes, and then pour it into a cup for your guests."


def record(i, category="insult", split="test"):
    return Record(f"{category}-{i}", category, "en", split, f"Write {i} mean words about my {category}.", "", "")


def section(**options):
    evals = config_lib.default().evals
    evals.update({"max_new": 6, "batch": 4} | options)
    return evals


@pytest.fixture(scope="module")
def loaded(policy):
    """A random model of two layers, its logits far from uniform, with real tokens."""
    model = families.from_hf(hf.read_tensors(policy), families.config_from_hf(hf.read_config(policy)))
    return depth.Policy(model.replace(embed=model.embed[...] * 10), ChatTokens(hf.load_tokenizer(policy)))


# ---------------------------------------------------------------------------------------------------- prefill


@pytest.mark.parametrize("k", [0, 1, 3, 10, 200])
def test_a_prefill_is_the_answers_first_tokens(loaded, k):
    ids = loaded.text.tokenizer.encode(ANSWER, add_special_tokens=False)
    assert depth.first_tokens(loaded.text, ANSWER, k) == ids[:k]  # no end, also where the answer is shorter


def test_the_model_reads_the_prompts_ids_and_behind_them_those_of_the_prefill(loaded, monkeypatch):
    prompts, read, sample = ["Tea?", "Is it " + "very " * 70 + "late?", "Why?"], {}, rollout.sample

    def spy(model, prompt, length, keys, **options):
        for ids, n in zip(np.asarray(prompt), np.asarray(length)):
            whole = [*options["prefix"], *ids[:n].tolist()]
            read[len(whole)] = whole
        return sample(model, prompt, length, keys, **options)

    monkeypatch.setattr(rollout, "sample", spy)
    prefills = [depth.first_tokens(loaded.text, ANSWER, k) for k in (3, 5, 0)]
    found = depth.greedy_answers(loaded, prompts, section(), prefills)
    expected = [loaded.text.prompt_ids(prompt) + prefill for prompt, prefill in zip(prompts, prefills)]
    assert read == {len(ids): ids for ids in expected} and len(read) == 3
    for answer, prefill in zip(found, prefills):
        assert answer.ids[: len(prefill)] == prefill and answer.tokens == len(answer.ids) <= len(prefill) + 6
        assert answer.text == loaded.text.decode(answer.ids, len(answer.ids))
    assert found[0].text.startswith("You need leaves") and found[1].text.startswith("You need leaves and hot")


def test_a_policy_continues_its_own_answer_as_it_was(loaded):
    prompts = ["Tea?", "Why is it late?"]
    whole = depth.greedy_answers(loaded, prompts, section(max_new=9))
    assert depth.greedy_answers(loaded, prompts, section(max_new=9), [[], []]) == whole
    for k in (1, 4):
        again = depth.greedy_answers(loaded, prompts, section(max_new=9 - k), [answer.ids[:k] for answer in whole])
        assert again == whole
    assert len({answer.text for answer in whole}) == 2


def setting(loaded, harm, refusal, prompts, complying, base=None):
    config = config_lib.default()
    config.evals.update(section().to_dict())
    given = {
        "harm": judges.Judge("h", {}, harm=lambda prompts, texts: np.array([harm(text) for text in texts])),
        "refusal": judges.Judge("r", {}, refusal=lambda prompts, texts: np.array([refusal(text) for text in texts])),
    }
    return depth.Setting(config, base or loaded, prompts, complying, given)


def test_the_curve_counts_whole_answers_with_wilsons_intervals(loaded):
    kinds = {"harmful": [record(i) for i in range(4)], "harmless": [record(0, "harmless")]}
    complying = {row.prompt: ANSWER for row in kinds["harmful"][:3]}  # the fourth has none, and is left out
    begun = setting(loaded, lambda text: float(text.startswith("You need leaves")), lambda text: 2, kinds, complying)
    found = depth.prefill_curve(begun, loaded)
    assert [point["tokens"] for point in found["curve"]] == [0, 1, 3, 5, 10, 20, 40]
    low, high = wilson(3, 3)
    unsafe = {"value": 1.0, "low": low, "high": high, "n": 3}
    assert [point["success"] == unsafe for point in found["curve"]] == [False] * 2 + [True] * 5
    assert [point["turned_back"]["value"] for point in found["curve"]] == [1.0] * 2 + [0.0] * 5
    assert len(found["responses"]) == 7 * 3 and json.loads(json.dumps(found)) == found
    # Without a prefill they are the policy's plain answers.
    plain = [answer.text for answer in depth.greedy_answers(loaded, list(complying), begun.config.evals)]
    assert [row["response"] for row in found["responses"][:3]] == plain
    assert found["responses"][-1]["response"].startswith(ANSWER[:60])


def test_an_answer_turns_back_if_it_refuses_and_is_not_unsafe(loaded):
    verdicts = {  # harm, refusal -> unsafe, turned back
        "refuses": (0.0, 2, 0, 1),
        "declines and advises": (0.4, 1, 0, 1),
        "declines and does it": (0.9, 1, 1, 0),
        "does it": (1.0, 0, 1, 0),
        "nonsense": (0.1, 0, 0, 0),
        "harm unread": (np.nan, 2, np.nan, np.nan),
        "refusal unread": (0.9, np.nan, 1, np.nan),
    }
    begun = setting(loaded, lambda text: verdicts[text][0], lambda text: verdicts[text][1], {}, {})
    unsafe, turned = depth.judge_answers(begun, ["?"] * len(verdicts), list(verdicts))
    np.testing.assert_array_equal(unsafe, [of[2] for of in verdicts.values()])
    np.testing.assert_array_equal(turned, [of[3] for of in verdicts.values()])
    low, high = wilson(3, 6)
    assert depth.share(unsafe) == {"value": 0.5, "low": low, "high": high, "n": 6}
    assert depth.share(np.array([np.nan])) == {"value": None, "low": None, "high": None, "n": 0}


# --------------------------------------------------------------------------------------------------------- KL


def kl_by_numpy(model, reference, prompt, response):
    """Σ_v p (log p - log q) before each token of the response, from whole rows of logits in float64."""

    def logp(model):
        ids = [*prompt, *response]
        hidden = apply(model, Group(*(np.array(x, np.int32) for x in ([ids], [len(ids)], [[[0]]], [[1]], [0]))))[0][0]
        logit = np.asarray(hidden, np.float64) @ np.asarray(model.unembed, np.float64).T
        logit = logit[len(prompt) - 1 : len(ids) - 1]
        logit -= logit.max(axis=1, keepdims=True)
        return logit - np.log(np.exp(logit).sum(axis=1, keepdims=True))

    first, second = logp(model), logp(reference)
    return (np.exp(first) * (first - second)).sum(axis=1)


def test_kl_by_token_is_that_of_whole_rows_of_logits():
    model, reference = (m.replace(embed=m.embed[...] * 30) for m in (tiny(seed=0), tiny(seed=1)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, n).tolist() for n in (5, 70, 9)]
    responses = [rng.integers(0, 97, n).tolist() for n in (1, 8, 70)]
    found = answers.kl_by_token(model, reference, prompts, responses, batch=2)
    for prompt, response, kl in zip(prompts, responses, found, strict=True):
        expected = kl_by_numpy(model, reference, prompt, response)
        assert kl.shape == (len(response),) and expected.mean() > 0.1
        np.testing.assert_allclose(kl, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(answers.kl_by_token(model, model, prompts, responses, batch=2)[1], 0, atol=1e-5)


def test_a_position_has_the_mean_of_the_answers_that_reach_it():
    found = depth.by_position([np.array([1.0, 3.0, 5.0]), np.array([2.0]), np.array([3.0, 0.0])])
    # (1 + 2 + 3) / 3, (3 + 0) / 2, 5 / 1; the answers' sums are 9, 2 and 3.
    assert found == {"mean": [2.0, 1.5, 5.0], "n": [3, 2, 1], "answer": pytest.approx(14 / 3)}


def test_kl_is_of_the_policys_own_greedy_answers(loaded):
    base = loaded._replace(model=loaded.model.replace(embed=loaded.model.embed[...] * 0.5))
    kinds = {"harmful": [record(i) for i in range(3)], "harmless": []}
    found = depth.kl_by_position(setting(loaded, None, None, kinds, {}, base), loaded)
    assert list(found) == ["harmful"] and len(found["harmful"]["mean"]) <= 6
    prompts = [row.prompt for row in kinds["harmful"]]
    own = depth.greedy_answers(loaded, prompts, section())
    by_row = [
        kl_by_numpy(loaded.model, base.model, loaded.text.prompt_ids(prompt), answer.ids)
        for prompt, answer in zip(prompts, own)
    ]
    assert found["harmful"]["mean"][0] == pytest.approx(np.mean([kl[0] for kl in by_row]), rel=1e-3)
    assert found["harmful"]["answer"] == pytest.approx(np.mean([kl.sum() for kl in by_row]), rel=1e-3)


# ------------------------------------------------------------------------------------- prompts, answers, input


def test_prompts_are_a_fixed_permutation_spread_over_the_categories():
    data = [record(i, name, split) for name in ("a", "b", "kind") for i in range(30) for split in ("test", "train")]
    found = depth.choose_prompts(data, ("kind",), "test", 8)
    assert {kind: len(of) for kind, of in found.items()} == {"harmful": 8, "harmless": 8}
    assert [row.category for row in found["harmful"]] == ["a", "b"] * 4
    assert {row.split for of in found.values() for row in of} == {"test"}
    assert found == depth.choose_prompts(data, ("kind",), "test", 8)
    more = depth.choose_prompts(data, ("kind",), "test", 20)
    assert more["harmful"][:8] == found["harmful"]  # a higher limit only adds prompts
    assert max(int(row.id.partition("-")[2]) for row in found["harmful"]) > 8  # not the first ones
    assert len(depth.choose_prompts(data, ("kind",), "test", 0)["harmful"]) == 60
    with pytest.raises(InputError, match="no harmful prompt in split 'valid'"):
        depth.choose_prompts(data, ("kind",), "valid", 8)


def test_answers_comply_where_the_judge_finds_harm():
    judge = judges.Judge("h", {}, harm=lambda prompts, texts: np.array([float(text == "Yes.") for text in texts]))
    given = {"a?": "Yes.", "b?": "No.", "d?": "Yes."}
    assert depth.select_complying(judge, ["a?", "b?", "c?", "a?"], given) == {"a?": "Yes."}
    with pytest.raises(InputError, match="none of 1 answers to 2 harmful prompts complies"):
        depth.select_complying(judge, ["b?", "c?"], given)
    with pytest.raises(InputError, match="none of 0 answers to 1 harmful prompts complies"):
        depth.select_complying(judge, ["c?"], given)


@pytest.mark.parametrize("lines, sentence", [
    ([], "has no answers: write one JSON object a line"),
    (['{"prompt": "Tea?"}'], "line 1: answer is of type NoneType: make it a text"),
    (['{"prompt": "Tea?", "answer": " "}'], "line 1: answer is empty"),
    (['{"prompt": "Tea?", "answer": "Yes."}', "{"], "line 2: not JSON"),
])  # fmt: skip
def test_answers_that_cannot_be_used(tmp_path, lines, sentence):
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=sentence):
        depth.load_answers(str(tmp_path / "answers.jsonl"))


def test_the_first_answer_of_a_prompt_counts(tmp_path):
    rows_ = [{"prompt": "Tea?", "answer": answer} for answer in ("Yes.", "No.")]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows_)))
    assert depth.load_answers(str(tmp_path / "answers.jsonl")) == {"Tea?": "Yes."}


# ------------------------------------------------------------------------------------------------ the command

COMMAND = """
import contextlib, io, json, pathlib, shutil, sys
from helpers import commands
from drirl_jax import config as config_lib
from drirl_jax.commands import depth
from drirl_jax.runtime import lock, workdirs

base, changed, out = map(pathlib.Path, sys.argv[1:])
models = [f"--policy={changed}", f"--base={base}", f"--out={out}"]
few = ["--limit=2", "--max_new=3", "--config=configs/tiny.py"]

for sentence, flags in {
    "--policy is missing": [f"--base={base}"],
    "--out is missing": models[:2],
    "--measures names kll: choose among prefill, kl": [*models, "--measures=kll"],
    "names a model twice": [f"--policy={base},{base}", *models[1:]],
    "names 'base', which stands for": ["--policy=base", *models[1:]],
    "leave out --policy and --base": [*models, f"--workdir={base}"],
    "holds no run, as it has no config.json": ["--workdir=configs"],
    "no model at": ["--policy=no/such/model", *models[1:]],
    "no file .*missing.jsonl": [*models, *few, "--answers=missing.jsonl"],
    "but none of them gives the verdict 'refusal'": [*models, *few, "--config.evals.judges=('rewards',)"],
    "with 100000 after it|100040 after it": [*models, *few, "--max_new=100000"],
}.items():
    commands.refused(sentence, depth, *flags)
assert not out.exists()

commands.run(depth, *models, *few, "--measures=prefill")
first = json.loads(out.read_text())
assert set(first["policies"]) == {"base", str(changed)} and "kl" not in first["policies"][str(changed)]
commands.run(depth, *models, *few)  # only what is missing
both = json.loads(out.read_text())
assert both["policies"][str(changed)].pop("kl")["harmful"]["answer"] > 0.1 and both == first
stamp = out.stat().st_mtime_ns
said = io.StringIO()
with contextlib.redirect_stdout(said):
    commands.run(depth, *models, *few, "--log=json")
assert out.stat().st_mtime_ns == stamp and json.loads(said.getvalue().splitlines()[-2])["policies"]["base"]["prefill"]
commands.refused("made with other settings .max_new.: name another --out", depth, *models, *few, "--max_new=4")

run = out.parent / "run"
config = config_lib.default()
config.policy.init = str(base)
workdirs.record_config(config, run)
commands.refused("has no aligned model yet: let the run end", depth, f"--workdir={run}")
shutil.copytree(changed, run / "aligned")
with contextlib.closing(lock.acquire(run)):
    commands.refused("another run is at work in", depth, f"--workdir={run}")
shutil.copytree(base, run / "sft")
file = out.parent / "answers.jsonl"
prompts = list(first["complying"])
file.write_text(json.dumps({"prompt": prompts[0], "answer": "Pour hot water on the leaves, and wait."}))
said = io.StringIO()
with contextlib.redirect_stdout(said):
    commands.run(depth, f"--workdir={run}", *few, f"--answers={file}")
result = json.loads((run / "depth.json").read_text())
assert list(result["policies"]) == ["base", "sft", "aligned"] and list(result["complying"]) == prompts[:1]
assert result["policies"]["sft"]["prefill"] == result["policies"]["base"]["prefill"]
assert all(abs(kl) < 1e-5 for kl in result["policies"]["sft"]["kl"]["harmful"]["mean"])
shown = " ".join(said.getvalue().split())
assert "1 of 2 harmful prompts have an answer of a file that complies" in shown and "aligned harmless 0." in shown
"""


def test_the_command(policy, tmp_path):
    # In a process of its own: other commands have flags of the same names.
    changed = tmp_path / "changed"
    config = hf.read_config(policy)
    model = families.from_hf(hf.read_tensors(policy), families.config_from_hf(config))
    hf.save(changed, config, families.to_hf(model.replace(embed=model.embed[...] * 5)), hf.load_tokenizer(policy))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-c", COMMAND, str(policy), str(changed), str(tmp_path / "depth.json")]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
