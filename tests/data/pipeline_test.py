"""Batches: shares of categories, epochs, seeds."""

import numpy as np
import pytest
from helpers.record_files import CATEGORIES, rows, write
from ml_collections import ConfigDict

from drirl_jax.data import builder, examples, pipeline, records
from drirl_jax.types import InputError


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


def test_natural_batches_have_the_shares_of_the_data_and_empty_categories_are_left_out():
    rows = [np.arange(0, 8), np.arange(0, 0), np.arange(8, 10)]
    section = ConfigDict({"mixing": "natural", "harmless_share": 0.5})
    drawn = pipeline.batches(section, rows, 5, 0, np.arange(10) >= 8)
    assert sorted(drawn[0] + drawn[1]) == list(range(10)) and drawn[0] != drawn[2]
    section.mixing = "kinds"
    drawn = pipeline.batches(section, rows, 4, 0, np.arange(10) >= 8)
    assert all(sum(row >= 8 for row in drawn[i]) == 2 for i in range(8))
