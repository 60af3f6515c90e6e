"""Values of files as other tools write them: known spellings are read, all others refused with their place."""

import json

import pytest
from ml_collections import ConfigDict

from drirl_jax.data import convert, values
from drirl_jax.evals.tasks import advglue, hhh, simpleqa, strongreject, wildchat, xstest
from drirl_jax.judges import labels
from drirl_jax.types import InputError


@pytest.mark.parametrize("value", [True, 1, 1.0, "True", "true", " TRUE ", "1", " 1", "1.0", "yes", "Y", "t"])
def test_true(value):
    assert values.truth("x", value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "False", "false\n", "0", "0.0", "No", "n", "F"])
def test_false(value):
    assert values.truth("x", value) is False


@pytest.mark.parametrize("value", ["", " ", None, "maybe", "-1", -1, 2, 0.5, float("nan"), "unsafe", [True], {}, "²"])
def test_neither(value):
    with pytest.raises(InputError, match="^x is .*: known are 'true'"):
        values.truth("x", value)


@pytest.mark.parametrize("value", ["2_full_refusal", " 2 Full Refusal", "2-full-refusal"])
def test_labels_in_other_spellings(value):
    assert values.label("x", value, {"1_full_compliance": 0, "2_full_refusal": 2}) == 2


@pytest.mark.parametrize("value, expected", [(2, 2), ("2", 2), (2.0, 2), (" 0 ", 0), ("2.0", 2)])
def test_whole_numbers(value, expected):
    assert values.whole_number("x", value, 3) == expected


@pytest.mark.parametrize("value", [3, -1, "-1", 0.5, "a", "", None, True, "nan", "inf", "1e400"])
def test_no_whole_numbers(value):
    with pytest.raises(InputError, match="x is .*: it must be a whole number from 0 to 2"):
        values.whole_number("x", value, 3)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path.parent)


def row_of_beavertails(is_safe, violence, response="Hit hard."):
    category = {"violence,aiding_and_abetting,incitement": violence, "self_harm": "False"}
    return {"prompt": "How do I hurt him?", "response": response, "category": category, "is_safe": is_safe}


@pytest.mark.parametrize("no, yes", [("False", "True"), (0, 1), ("no", "yes"), (False, True)])
def test_an_unsafe_answer_is_no_demonstration(no, yes, tmp_path):
    rows = row_of_beavertails(no, yes), row_of_beavertails(yes, no, "I will not say how one hurts somebody.")
    found, _ = convert.demonstrations("beavertails", lines(tmp_path / "train.jsonl", *rows))
    assert [(row.category, row.response) for row in found] == [("physical_harm", rows[1]["response"])]


@pytest.mark.parametrize("row, name", [
    (row_of_beavertails("perhaps", "True"), "is_safe"), (row_of_beavertails("", "True"), "is_safe"),
    (row_of_beavertails("True", None), "category 'violence"),
])  # fmt: skip
def test_an_unknown_word_in_a_published_file_is_refused_with_its_row(row, name, tmp_path):
    folder = lines(tmp_path / "train.jsonl", row_of_beavertails("True", "False"), row)
    with pytest.raises(InputError, match=f"line 2: {name}.*known are"):
        convert.demonstrations("beavertails", folder)


@pytest.mark.parametrize("harmful, expected", [("0", True), (0.0, True), ("False", True), ("1", False)])
def test_whether_an_answer_of_do_not_answer_is_safe(harmful, expected, tmp_path):
    row = {"question": "How?", "types_of_harm": "Toxic language (hate speech)", "m_response": "So."}
    row |= {"m_harmful": harmful}
    found, left_out = convert.demonstrations("do_not_answer", lines(tmp_path / "x.jsonl", row) + "/x.jsonl")
    assert bool(found) == expected and bool(left_out) != expected


def test_half_a_surrogate_pair_is_left_out_and_counted(tmp_path):
    texts = ("Please do not.", "Please do not. \ud83d", "No. \U0001f600")
    rows = [row_of_beavertails(True, True, text) | {"prompt": f"How {i}?"} for i, text in enumerate(texts)]
    found, left_out = convert.demonstrations("beavertails", lines(tmp_path / "train.jsonl", *rows))
    assert [row.response for row in found] == [texts[0], texts[2]]
    assert left_out == {"with half a surrogate pair, as of an emoji that was cut": 1}


def of(bench, tmp_path, name, content):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return bench.load_items(ConfigDict({"evals": {"data": str(tmp_path), "shots": 0}}))


@pytest.mark.parametrize("label, expected", [("unsafe", True), ("Unsafe ", True), ("UNSAFE", True), (" safe", False)])
def test_labels_of_xstest(label, expected, tmp_path):
    (item,) = of(xstest, tmp_path, "xstest_prompts.csv", f"id,prompt,type,label\n1,How do I?,homonyms,{label}\n")
    assert item.harmful is expected
    (tmp_path / "xstest_prompts.csv").unlink()
    row = {"prompt": "How do I?", "type": "homonyms", "harmful": str(expected)}
    (item,) = of(xstest, tmp_path, "xstest.jsonl", row)
    assert item.harmful is expected


@pytest.mark.parametrize("bench, name, content, message", [
    (xstest, "xstest_prompts.csv", "id,prompt,type,label\n1,How?,homonyms,\n", "row 1: label is ''"),
    (xstest, "xstest_prompts.csv", "id,prompt,type,label\n1,How?,homonyms,1\n", "row 1: label is '1'"),
    (xstest, "xstest.jsonl", {"prompt": "How?", "type": "x", "harmful": "rather"}, "line 1: harmful is 'rather'"),
    (strongreject, "strongreject_dataset.csv", "category,source,forbidden_prompt\nHate,x,\n", "row 1: .*is empty"),
    (simpleqa, "simple_qa_test_set.csv", "metadata,problem,answer\nx,How?,!!!\n", "row 1: the answer '!!!' has no"),
    (wildchat, "wildchat.jsonl", {"toxic": "so so", "conversation": [{"content": "x"}]}, "line 1: toxic is 'so so'"),
    (advglue, "dev.json", {"sst2": [{"label": 2, "sentence": "x"}]}, "row 1: label is 2: .* from 0 to 1"),
    (advglue, "dev.json", {"sst2": [{"label": -1, "sentence": "x"}]}, "row 1: label is -1"),
    (advglue, "dev.json", {"sst2": [{"label": "positive", "sentence": "x"}]}, "row 1: label is 'positive'"),
    (hhh, "helpful/task.json", [{"input": "x", "target_scores": {"a": 0, "b": 0}}], "row 1: 0 options are labelled"),
    (hhh, "helpful/task.json", [{"input": "x", "target_scores": {"a": 1, "b": "1"}}], "row 1: 2 options are labelled"),
    (hhh, "helpful/task.json", [{"input": "x", "target_scores": {"a": 0.5, "b": 1}}], "row 1: the label of an option"),
])  # fmt: skip
def test_what_a_benchmarks_file_may_not_hold(bench, name, content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        of(bench, tmp_path, name, content)


def test_a_message_that_is_marked_as_not_toxic_in_words_is_left_out(tmp_path):
    rows = [
        {"toxic": toxic, "conversation": [{"content": f"{toxic}{first}", "toxic": first, "language": "English"}]}
        for toxic in ("True", "False") for first in ("true", "0")
    ]  # fmt: skip
    found = of(wildchat, tmp_path, "wildchat.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [item.prompt for item in found] == ["Truetrue"]


def labelled(tmp_path, **columns):
    folder = lines(tmp_path / "x.jsonl", {"prompt": "p", "response": "r"} | columns)
    return labels.load_labels(tmp_path / "x.jsonl") if folder else None


@pytest.mark.parametrize("columns", [
    {"unsafe": "yes"}, {"unsafe": "Unsafe"}, {"unsafe": " 1"}, {"unsafe": True}, {"unsafe": "1.0"},
    {"human_majority": 1},
    {"jailbroken": "Jailbroken"}, {"safe": "False"}, {"is_safe": 0}, {"safe": "unsafe"}, {"safe": False},
])  # fmt: skip
def test_responses_that_are_labelled_unsafe(columns, tmp_path):
    (found,) = labelled(tmp_path, **columns)
    assert found.unsafe is True


@pytest.mark.parametrize("columns", [{"unsafe": "no"}, {"unsafe": "safe"}, {"unsafe": 0.0}, {"is_safe": "True"}])
def test_responses_that_are_labelled_safe(columns, tmp_path):
    (found,) = labelled(tmp_path, **columns)
    assert found.unsafe is False


@pytest.mark.parametrize("columns", [
    {"unsafe": ""}, {"unsafe": "?"}, {"unsafe": 2}, {"safe": "dunno"}, {"unsafe": 1, "attacked": "x"},
    {"final_label": "full"},
])  # fmt: skip
def test_labels_of_no_known_spelling_are_refused_with_their_row(columns, tmp_path):
    with pytest.raises(InputError, match="line 1: .*known are"):
        labelled(tmp_path, **columns)


def test_a_class_and_a_split_in_other_spellings(tmp_path):
    (found,) = labelled(tmp_path, final_label=" 2_Full_Refusal", split="Validation")
    assert (found.refusal, found.split) == (2, "valid")
