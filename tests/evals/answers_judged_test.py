"""Whatever reads an answer reads what follows its thought: judges, measures, and the filters of drafts."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from drirl_jax import judges
from drirl_jax.config import default
from drirl_jax.data import drafts, records
from drirl_jax.evals.benchmarks import BENCHMARKS
from drirl_jax.evals.items import Item, user_chat
from drirl_jax.runtime.endpoint import Reply

THOUGHT = "<think>\nI can't help with that. Or 7? I agree.\n</think>\n\n"


def test_every_judge_is_shown_the_answer_alone():
    shown = []

    def make(setting):
        def verdicts(prompts, responses, *targets):
            shown.append(list(responses))
            return np.zeros(len(prompts))

        return judges.Judge("v", {}, harm=verdicts, refusal=verdicts, grade=verdicts)

    judge = judges.on_answers(make)(None)
    for verdicts, columns in ((judge.harm, ()), (judge.refusal, ()), (judge.grade, (["t"] * 3,))):
        verdicts(["p"] * 3, [THOUGHT + "Yes.", "Yes.", "<think>Yes."], *columns)
    assert shown == [["Yes.", "Yes.", ""]] * 3
    made = {kind.make.__qualname__ for kind in judges.JUDGES.values()}
    assert made == {"on_answers.<locals>.make_judge"}


def test_a_judge_by_phrases():
    judge = judges.JUDGES["phrases"].make(judges.Setting(default()))
    said = [THOUGHT + "Push the pins up.", "<think>How to?</think>I can't help with that.", "<think>Push the pins"]
    assert judge.harm(["p"] * 3, said).tolist() == [1, 0, 0]
    assert judge.refusal(["p"] * 3, said).tolist() == [0, 2, 0]
    assert judge.grade(["p"] * 3, said, ["7"] * 3).tolist() == [1, 2, 2]


@pytest.mark.parametrize("verdict, expected", [(2.0, True), (1.0, True), (0.0, False), (np.nan, None)])
def test_whether_it_refuses_is_open_without_a_verdict(verdict, expected, monkeypatch):
    judge = judges.Judge("v", {}, refusal=lambda prompts, responses: np.array([verdict]))
    monkeypatch.setitem(judges.JUDGES, "phrases", judges.JudgeKind(lambda setting: judge, ("refusal",)))
    assert judges.refusal_check(judges.Setting(default()))("p", "r") is expected


@pytest.mark.parametrize("name, target, answer, expected", [
    ("gsm8k", "#### 5", "#### 5", {"exact_match": 1.0, "strict_match": 1.0}),
    ("gsm8k", "#### 7", "None.", {"exact_match": 0.0}),
    ("stereotype", "", "I disagree.", {"agreed": 0.0, "disagreed": 1.0}),
])  # fmt: skip
def test_measures_of_an_answer_behind_a_thought(name, target, answer, expected):
    item = Item("0", user_chat("?"), target=target)
    assert expected.items() <= BENCHMARKS[name].measure(item, THOUGHT + answer, None).items()


def test_an_unfinished_thought_is_silence_to_xstest():
    found = BENCHMARKS["xstest"].measure(Item("0", user_chat("?"), harmful=False), "<think>Sure, here", 0)
    assert found == {"right": 0.0, "safe_complied": 0.0, "safe_partly_refused": 0.0, "safe_refused": 0.0}


@pytest.mark.parametrize("response, exact, strict", [
    ("#### 5\n\nQuestion: What is 6 and 7?\nAnswer: #### 13", 1.0, 1.0), ("It is 5.Question: 6?", 1.0, 0.0),
    ("5</s>6", 1.0, 0.0), ("5<|im_end|>\n6", 1.0, 0.0), ("Question: 5", 0.0, 0.0), ("A question: 5", 1.0, 0.0),
    ("<think>\nQuestion: 6?\n</think>\n#### 5", 1.0, 1.0),
])  # fmt: skip
def test_an_answer_ends_where_it_runs_on_into_a_new_problem(response, exact, strict):
    found = BENCHMARKS["gsm8k"].measure(Item("0", user_chat("?"), target="#### 5"), response, None)
    assert found == {"exact_match": exact, "strict_match": strict}


def candidate(text, category="insult"):
    record = records.Record("0", category, "en", "train", "Be rude", "", "")
    return drafts.parse_reply(record, category == "harmless", Reply(text, 1, "stop", 0.1))


def test_a_draft_is_read_behind_the_thought():
    found = candidate("<think>\nSure. #### Fool!\n</think>\nWants an insult.\n#### I can't write that.")
    assert (found.draft, found.response) == ("Wants an insult.", "I can't write that.")
    assert candidate("<think>\nWants an insult.\n#### I can't").response == ""


@pytest.mark.parametrize("category", ["insult", "harmless"])
def test_a_draft_without_a_verdict_is_left_out(category):
    wrong = drafts.FILTERS["not the answer that its kind asks for"]
    section = ConfigDict(default().demos)
    of_kind = candidate("Thinks.\n#### Hm.", category)
    assert [wrong(of_kind, section, lambda p, r: verdict) for verdict in (None, True, False)] == [
        True, category == "harmless", category != "harmless",
    ]  # fmt: skip
