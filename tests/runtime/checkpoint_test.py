"""Checkpoints: written in the background from what was there, and what is damaged is found and put aside."""

import contextlib
import os
import random
import shutil
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax.runtime.checkpoint import Checkpoints
from drirl_jax.types import InputError


def tree(step, size=300):
    key = jax.random.fold_in(jax.random.key(0), step)
    return {
        "params": (jax.random.normal(key, (size, size)), jnp.full(7, step, jnp.bfloat16)),
        "carry": {"seen": jnp.arange(5) % 2 == 0, "samples": np.arange(12, dtype=np.int32).reshape(3, 4) * step},
        "empty": jnp.zeros((0, 3)),
        "step": jnp.array(step, jnp.int32),
    }


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@partial(jax.jit, donate_argnums=0)
def spoilt(x):
    return jax.tree.map(lambda v: jnp.full_like(v, 1), x)


def test_what_is_donated_after_save_is_kept_as_it_was(tmp_path, monkeypatch):
    state = jax.tree.map(jnp.asarray, tree(1, size=4000))
    want = jax.tree.map(np.array, state)
    jax.block_until_ready(spoilt(jax.tree.map(jnp.copy, state)))  # compiled, so that the next is quick
    rename, overwritten = os.rename, threading.Event()
    monkeypatch.setattr(os, "rename", lambda *paths: overwritten.wait(60) and rename(*paths))
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as kept:
        kept.save(1, state)
        jax.block_until_ready(spoilt(state))
        in_background = not (tmp_path / "1").exists()
        overwritten.set()
    step, found = Checkpoints(tmp_path, keep=2).restore(jax.tree.map(jnp.zeros_like, want))
    assert step == 1 and in_background  # otherwise the test has shown nothing
    assert_same(found, want)


def test_the_newest_are_kept(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as kept:
        for step in (3, 6, 9):
            kept.save(step, tree(step))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [6, 9]


def flipped(file, draw):
    raw = bytearray(file.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    file.write_bytes(raw)


def cut(file, draw):
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def gone(file, draw):
    file.unlink()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with contextlib.closing(Checkpoints(folder, keep=2)) as kept:
        for step in (1, 2):
            kept.save(step, tree(step))
    return folder


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 300), marks=pytest.mark.slow)], ids=len)
def test_a_damaged_checkpoint_never_gives_other_numbers(two, tmp_path, seeds):
    fallen_back = 0
    for seed in seeds:
        draw, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(two, folder)
        files = sorted(path for path in (folder / "2").rglob("*") if path.is_file() and path.stat().st_size)
        file = draw.choices(files, [path.stat().st_size + 1000 for path in files])[0]
        draw.choice((flipped, cut, gone))(file, draw)
        kept = Checkpoints(folder, keep=2)
        step, found = kept.restore(tree(0))
        assert_same(found, tree(step))  # damage to what is not read harms nothing
        fallen_back += step == 1
        assert kept.latest() == step and (tmp_path / f"{seed}.damaged" / "2").exists() == (step == 1)
        with contextlib.closing(kept):
            kept.save(2, tree(2)) if step == 1 else None
        shutil.rmtree(folder)
    assert fallen_back > len(seeds) / 2


def test_a_flipped_bit_of_an_array_is_found_by_the_checksum(two, tmp_path, caplog):
    shutil.copytree(two, tmp_path / "run")
    largest = max((p for p in (tmp_path / "run" / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)
    assert Checkpoints(tmp_path / "run", keep=2).restore(tree(0))[0] == 1
    assert "run/2 is damaged" in caplog.text and "put aside" in caplog.text


def test_where_none_is_whole_or_fits_nothing_is_put_aside(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    template = tree(0)
    with pytest.raises(InputError, match="no checkpoint in .* fits this run"):
        Checkpoints(tmp_path / "run", keep=2).restore(template | {"step": jnp.zeros(3)})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]
    assert_same(Checkpoints(tmp_path / "run", keep=2).restore(template)[1], tree(2))


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def lacks(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def says(text):
    return lambda folder: (folder / "_CHECKPOINT_METADATA").write_text(text)


COPIED_IN_PART = {
    "empty": emptied,
    "without arrays": lacks("default"),
    "without metadata": lacks("_CHECKPOINT_METADATA"),
    "empty metadata": says(""),
    "metadata without checksums": says("{}"),
    "metadata of another type": says('{"custom_metadata": [1]}'),
    "metadata that is a list": says("[]"),
    "some checksums": says('{"custom_metadata": {"checksums": {"[\'step\']": 5}}}'),
}


@pytest.mark.parametrize("how", COPIED_IN_PART)
def test_a_newest_checkpoint_copied_in_part_leaves_the_older_one_usable(two, tmp_path, how):
    shutil.copytree(two, tmp_path / "run")
    COPIED_IN_PART[how](tmp_path / "run" / "2")
    kept = Checkpoints(tmp_path / "run", keep=2)
    step, found = kept.restore(tree(0))
    assert step == 1
    assert_same(found, tree(1))
    with contextlib.closing(kept):
        kept.save(2, tree(2))
    assert_same(Checkpoints(tmp_path / "run", keep=2).restore(tree(0))[1], tree(2))
    assert (tmp_path / "run.damaged" / "2").is_dir()


def test_a_checkpoint_that_may_not_be_taken_is_put_aside_and_nothing_is_lost(two, tmp_path):
    for n in (1, 2):  # twice: the one that was put aside first stays
        shutil.copytree(two, tmp_path / "run", dirs_exist_ok=True)
        kept = Checkpoints(tmp_path / "run", keep=2)
        step, _ = kept.restore(tree(0), lambda step: "not yet" if step > 1 else None)
        assert step == 1 and len(list((tmp_path / "run.damaged").iterdir())) == n
    with pytest.raises(InputError, match="no checkpoint .* fits this run .*not yet.* move that folder elsewhere"):
        Checkpoints(tmp_path / "run", keep=2).restore(tree(0), lambda step: "not yet")
    assert (tmp_path / "run" / "1").is_dir()
    with pytest.raises(InputError, match="newest checkpoint in .* is damaged .it has no checksums"):
        Checkpoints(tmp_path / "none", keep=1).newest_checksums()
    copy = shutil.copytree(two, tmp_path / "copy")
    assert Checkpoints(copy, keep=2).newest_checksums() == Checkpoints(two, keep=2).newest_checksums() != {}


@pytest.mark.slow
def test_a_step_does_not_wait_for_the_disk(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as kept:
        kept.save(1, tree(1, size=9000))  # which compiles the checksums
        kept.manager.wait_until_finished()
        state = jax.block_until_ready(tree(2, size=9000))
        start = time.perf_counter()
        kept.save(2, state)
        blocked = time.perf_counter() - start
        kept.manager.wait_until_finished()
        whole = time.perf_counter() - start
    print(f"save returns after {blocked:.2f} of {whole:.2f} s")
    assert blocked < whole / 2
