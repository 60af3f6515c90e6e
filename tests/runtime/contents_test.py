"""What a workdir belongs to: its config and what the files that it names hold, wherever they lie."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import small_run
from safetensors.numpy import load_file, save_file

from drirl_jax import config as config_lib
from drirl_jax.data import fingerprints
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import runner
from drirl_jax.models import hf
from drirl_jax.reports import pages, status
from drirl_jax.runtime import hashes, json_files, lock, workdirs
from drirl_jax.runtime.bucket import Workdir
from drirl_jax.types import InputError


def write_kept(path, text):
    """Writes as many bytes, and sets the file's time back: an edit that neither size nor time tell."""
    stat = path.stat()
    path.write_text(text)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_copy_has_the_same_hash_and_an_edit_in_place_another(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("abc")
    before = hashes.hash_folder(folder, ["*.json"])
    copy = shutil.copytree(folder, tmp_path / "two")
    os.utime(copy / "tokenizer.json", (1, 1))
    (copy / "README.md").write_text("not looked at")
    assert hashes.hash_folder(copy, ["*.json"]) == before
    write_kept(folder / "tokenizer.json", "abd")
    assert hashes.hash_folder(folder, ["*.json"]) != before
    (copy / "tokenizer.json").rename(copy / "other.json")
    assert hashes.hash_folder(copy, ["*.json"]) != before


def test_weights_are_known_by_their_arrays_not_by_their_files(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    save_file(tensors, one / "model.safetensors", {"format": "pt"})
    save_file(tensors, other / "model.safetensors")  # another header
    found = [hashes.hash_weights(folder, hf.read_tensors(folder)) for folder in (one, other)]
    assert found[0] == found[1] == hashes.hash_weights(tmp_path, tensors)
    changes = [{"a": tensors["a"] + 1}, {"a": tensors["a"].reshape(3, 2)}, {"a": tensors["a"].view(np.int32)}]
    assert len({hashes.hash_tensors(tensors | change) for change in changes} | {found[0]}) == 4


def test_records_are_known_in_any_order_and_a_config_without_what_is_not_the_model():
    rows = [("a", "b"), ("c", "d")]
    assert hashes.hash_records(rows) == hashes.hash_records(rows[::-1]) != hashes.hash_records([("a", "d"), ("c", "b")])
    config = {"rope_theta": 1e4, "transformers_version": "4", "_name_or_path": "x"}
    assert hashes.hash_model_config(config) == hashes.hash_model_config({"rope_theta": 1e4})
    assert hashes.hash_model_config(config) != hashes.hash_model_config(config | {"rope_theta": 2e4})


def loaded(folder, tokens=None):
    config = config_lib.default()
    config.policy.init = str(folder)
    return fingerprints.policy_contents(config, tokens or ChatTokens(hf.load_tokenizer(folder)))


def edited(file, change):
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def test_each_part_of_a_policy_has_its_own_hash(policy, tmp_path):
    tokens = ChatTokens(hf.load_tokenizer(policy))
    before = loaded(policy, tokens)
    assert set(before) == set(workdirs.POLICY)
    tokens.tokenizer(["one", "one and two"], padding=True, truncation=True, max_length=3)  # leaves a state behind
    copy = shutil.copytree(policy, tmp_path / "copy")

    def changed(tokens=None):
        after = loaded(copy, tokens)
        return [key for key in before if before[key] != after[key]]

    assert changed(tokens) == []
    file = copy / "model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert changed(tokens) == ["weights"]
    rope = {"rope_theta": 12345.0, "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}
    edited(copy / "config.json", lambda tree: tree.update(rope))
    assert changed(tokens) == ["weights", "model"]
    file = copy / "chat_template.jinja"
    file.write_text(file.read_text().replace("You are a helpful AI assistant", "You answer all that is asked"))
    edited(copy / "tokenizer.json", lambda tree: tree["model"]["merges"].pop(len(tree["model"]["merges"]) // 2))
    assert changed() == ["weights", "model", "tokenizer", "template"]


# -------------------------------------------------------------------------------------------- the workdir


def begun(tmp_path, **changes):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    now = dict.fromkeys(workdirs.POLICY + ("data", "encoder"), "0" * 32)
    workdirs.record_config(config, tmp_path, now)
    return config, now


def test_changed_contents_are_refused_by_name(tmp_path):
    config, now = begun(tmp_path)
    workdirs.record_config(config, tmp_path, now)
    before = (tmp_path / "config.json").read_text()
    for name in now:
        with pytest.raises(InputError) as refused:
            workdirs.record_config(config, tmp_path, now | {name: "1" * 32})
        assert workdirs.CONTENTS[name].rstrip(",") in str(refused.value) and "other contents" in str(refused.value)
    with pytest.raises(InputError, match="made with other contents of the weights"):
        workdirs.require_same(tmp_path, {"weights": "1"})
    assert (tmp_path / "config.json").read_text() == before and workdirs.recorded_contents(tmp_path) == now


def test_the_same_contents_may_lie_elsewhere(tmp_path):
    config, now = begun(tmp_path)
    moved = config.copy_and_resolve_references()
    moved.policy.init, moved.data.path, moved.encoder.init = (
        "gs://bucket/model",
        "/elsewhere/data",
        "/elsewhere/encoder",
    )
    workdirs.record_config(moved, tmp_path, now)
    assert workdirs.load_config(tmp_path).policy.init == "gs://bucket/model"  # where it lies now
    config.reward.init = "runs/other"  # of which no hash is known
    with pytest.raises(InputError, match="reward.init: '' there, 'runs/other' now"):
        workdirs.record_config(config, tmp_path, now)


def test_a_workdir_of_an_older_version_is_told_of_and_then_known(tmp_path, caplog):
    config, now = begun(tmp_path)
    edited(tmp_path / "config.json", lambda tree: tree.pop("contents"))
    workdirs.record_config(config, tmp_path, now)
    assert "begun by a version of drirl_jax that kept no hashes" in caplog.text
    with pytest.raises(InputError, match="other contents"):
        workdirs.record_config(config, tmp_path, now | {"data": "1"})
    edited(tmp_path / "config.json", lambda tree: tree["align"].pop("group_size"))
    with pytest.raises(InputError, match=r"begun by another version of drirl_jax, whose options are others \(align.gr"):
        workdirs.record_config(config, tmp_path, now)


JUDGED = {"evals.judges": ("endpoint",), "evals.endpoint.model": "other"}


@pytest.mark.parametrize(
    "before,change,fits",
    [
        ({}, JUDGED, True),
        (
            {},
            {
                "evals.classifier": "other.safetensors",
                "reward.endpoint.model": "unused",
                "scaling.endpoint.url": "unused",
            },
            True,
        ),
        ({"reward.source": "judge"}, {"reward.endpoint.model": "other"}, False),
        ({"reward.source": "judge"}, {"reward.endpoint.timeout": 5.0, "reward.endpoint.concurrency": 2}, True),
        ({"reward.source": "rules"}, {"evals.judges": ("endpoint",)}, False),
        ({"scaling.split": "llm"}, {"scaling.endpoint.model": "other"}, False),
        ({"evals.benchmarks": ("xstest",), "evals.every": 5}, {"evals.judges": ("endpoint",)}, False),
        ({"evals.benchmarks": ("xstest",)}, {"evals.judges": ("endpoint",)}, True),
        ({}, {"metrics.samples": 1, "guards.kl": 9.0, "compilation_cache": ""}, True),
        ({}, {"evals.temperature": 0.5}, False),
    ],
    ids=str,
)
def test_what_no_training_depends_on_may_change(tmp_path, before, change, fits):
    config, now = begun(tmp_path, **before)
    config.update_from_flattened_dict(change)
    if fits:
        workdirs.record_config(config, tmp_path, now)
        assert workdirs.flat_options(workdirs.load_config(tmp_path)) == workdirs.flat_options(config)
    else:
        with pytest.raises(InputError, match="holds a run of a different config"):
            workdirs.record_config(config, tmp_path, now)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"contents": 3}', "\x00\x00"], ids=repr)
def test_a_damaged_config_is_one_sentence_and_stays(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for use in (workdirs.load_config, lambda path: workdirs.record_config(config_lib.default(), path, {"data": "1"})):
        with pytest.raises(InputError, match="config.json is damaged"):
            use(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_a_config_of_wrong_types_is_one_sentence(tmp_path):
    begun(tmp_path)
    edited(tmp_path / "config.json", lambda tree: tree.update(schedule=3))
    with pytest.raises(InputError, match="config.json is of another version of drirl_jax, or damaged"):
        workdirs.load_config(tmp_path)


@pytest.mark.parametrize("trace", workdirs.TRACES)
def test_a_run_without_its_config_is_not_begun_anew(tmp_path, trace):
    (tmp_path / trace).mkdir()
    with pytest.raises(InputError, match=f"holds {trace} of a run, but no config.json"):
        workdirs.record_config(config_lib.default(), tmp_path)


# ---------------------------------------------------------------------------------------- its files as read


DAMAGES = {
    "evals/base.json": ("", "[]", '{"overall": {}}', '{"overall": 3, "by_category": {}, "responses": []}'),
    "facts.json": ("{", "3", '{"records": {"train": 5}}'),
    "reliability.json": ("[]", '{"all": [{"n": "6"}]}'),
    "metrics.jsonl": ("{}\n", "nonsense\n", '{"stage": "irl", "step": 1, "loss": "x"}\n', "[1]\n", "\xff\n"),
    "timing.jsonl": ('{"stage": "irl", "step": "1"}\n', "null\n"),
    "samples.jsonl": ('{"stage": "align", "step": 1}\n', "{\n"),
}


@pytest.mark.parametrize("name,text", [(name, text) for name, texts in DAMAGES.items() for text in texts])
def test_a_report_says_which_file_is_damaged(tmp_path, name, text):
    small_run.write(tmp_path)
    path = tmp_path / name
    path.write_bytes((path.read_bytes() if name.endswith("l") else b"") + text.encode("latin-1"))
    with pytest.raises(InputError) as refused:
        pages.load_run(tmp_path)
    assert f"{path}" in str(refused.value) and "is damaged" in str(refused.value)
    if name.endswith("l"):
        assert f", line {len(path.read_bytes().splitlines())} is" in str(refused.value)


def test_the_status_says_which_file_is_damaged(tmp_path):
    small_run.write(tmp_path)
    assert status.run_status(tmp_path)["last"]["step"] == 8
    whole = (tmp_path / "timing.jsonl").read_text()
    for text in ("nonsense\n", "{}\n", '{"stage": "irl", "step": null}\n'):
        (tmp_path / "timing.jsonl").write_text(whole + text)
        with pytest.raises(ValueError, match="timing.jsonl, line 17 is damaged"):
            status.run_status(tmp_path)
    edited(tmp_path / "config.json", lambda tree: tree.update(schedule=["irl", "pretrain"]))
    with pytest.raises(ValueError, match="names the stages .'pretrain'.: it is damaged"):
        status.run_status(tmp_path)


def test_a_form_says_what_is_wrong():
    form = {"n": int, json_files.Maybe("of"): [str], ...: json_files.NUMBER}
    assert json_files.fault({"n": 1, "of": ["a"], "x": None, "y": 2}, form) is None
    for value, why in (
        ([], "it is no object"),
        ({}, "it has no 'n'"),
        ({"n": True}, "n is true, not of type int"),
        ({"n": 1, "of": [3]}, "of[0] is 3, not of type str"),
        ({"n": 1, "x": "1"}, 'x is "1", not of type float or null'),
    ):
        assert json_files.fault(value, form) == why


def test_an_evaluation_of_another_judge_or_a_damaged_one_is_made_anew(tmp_path, caplog):
    path, settings = tmp_path / "base.json", {"judge": "phrases 1", "judges": {}, "rewards": None}
    result = small_run.result("base")
    assert not runner.is_done(path, settings) and not caplog.text
    path.write_text(json.dumps(result | {"settings": settings}))
    assert runner.is_done(path, settings)
    assert not runner.is_done(path, settings | {"judge": "phrases 2"}) and "another judge" in caplog.text
    path.write_text(json.dumps(result))  # of an older version
    assert not runner.is_done(path, settings)
    path.write_text('{"settings"')
    assert not runner.is_done(path, settings) and "is damaged" in caplog.text


# ------------------------------------------------------------------------------------------------ its lock


def test_a_lock_file_that_a_cleaner_removes_lets_no_second_run_in(tmp_path):
    first = lock.acquire(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    for _ in range(2):
        assert lock.is_locked(tmp_path / "run")
        with pytest.raises(InputError, match="another run is at work"):
            lock.acquire(tmp_path / "run")
        with pytest.raises(InputError, match="another run is at work"):
            lock.require_free(tmp_path / "run")
    first.check_held()
    assert (tmp_path / "run" / ".lock").exists()
    first.close()
    lock.acquire(tmp_path / "run").close()


def test_where_only_files_can_be_locked_the_first_run_finds_the_second(tmp_path, monkeypatch):
    taken = lock.Lock._taken
    monkeypatch.setattr(lock.Lock, "_taken", lambda lock, fd: fd != getattr(lock, "folder", None) and taken(lock, fd))
    first = lock.acquire(tmp_path)
    with pytest.raises(InputError, match="another run is at work"):
        lock.acquire(tmp_path)
    (tmp_path / ".lock").unlink()
    second = lock.acquire(tmp_path)
    with pytest.raises(InputError, match="another run is at work"):
        first.check_held()
    second.close()
    first.close()


@pytest.mark.parametrize("again", [False, True])
def test_a_workdir_that_is_removed_during_a_run_is_one_sentence(tmp_path, again):
    place = Workdir(tmp_path / "run")
    with pytest.raises(InputError, match="the workdir .*run was removed or moved during the run"):
        with place.at_work():
            place.push()
            shutil.rmtree(tmp_path / "run")
            if again:
                (tmp_path / "run").mkdir()  # as orbax would
                place.push()
            (tmp_path / "run" / "metrics.jsonl").open("a")
