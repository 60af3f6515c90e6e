"""What a name may be, and that no name leads out of the folder in which it lies."""

import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from drirl_jax import checks, judges
from drirl_jax import config as config_lib
from drirl_jax.attacks import runner as attacks
from drirl_jax.commands import study
from drirl_jax.data.published import PUBLISHED
from drirl_jax.evals import benchmarks
from drirl_jax.models import families, lora, peft, reward
from drirl_jax.runtime import bucket, names, sinks
from drirl_jax.runtime.metrics import MetricWriter
from drirl_jax.types import InputError

ODD = (
    "hate/threatening", "drug_abuse,weapons,banned_substance", "../x", "..", ".", "/etc/passwd", "a\\b", "C:x", "CON",
    "nul.txt", "insult.tmp", "insult.OLD", "a*", "[draft]", "100%", "a%2Fb", ".hidden", "end.", "é中", "what? <b>",
)  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_files_name_is_no_path_and_gives_the_name_again(name):
    file = names.file_name(name)
    assert pathlib.PurePosixPath(file).name == pathlib.PureWindowsPath(file).name == file
    assert names.name_of_file(file) == name
    assert not set(file) & set('/\\:*?"<>|[]') and not file.lower().endswith((".tmp", ".old"))
    assert not names.DEVICES.fullmatch(file) and file[0] != "."


def test_plain_names_stay_as_they_are():
    plain = [*config_lib.default().data.categories, "clip=0.2, seed+1", "self-harm", "侮辱"]
    plain += [*attacks.ATTACKS, *benchmarks.BENCHMARKS, *judges.JUDGES, *PUBLISHED, *sinks.SINKS]
    assert [names.file_name(name) for name in plain] == plain
    assert names.scalar_name("reward/physical_harm") == "reward/physical_harm"


def test_names_that_pass_never_become_one_file_or_one_scalar():
    names.check("categories", ODD)
    for form in (names.file_name, lambda name: names.scalar_name(f"reward/{name}")):
        assert len({form(name).casefold() for name in ODD}) == len(ODD)


@pytest.mark.parametrize(
    "categories, sentence",
    [
        (("", "harmless"), "an empty name"),
        ((" ", "harmless"), "an empty name"),
        (("a\nb", "harmless"), "no line end"),
        (("a\u202eb", "harmless"), "does not print"),
        (("a\x00", "harmless"), "does not print"),
        ((" a", "harmless"), "no blank at its ends"),
        (("x" * 300, "harmless"), "300 characters"),
        (("中" * 99, "harmless"), "too long for a file"),
        (("CON", "con"), "differ in nothing, or only in case"),
        (("caf\u00e9", "cafe\u0301"), "Unicode form"),
        (("ab", "\uff41\uff42"), "Unicode form"),
        (("physical_harm", "physical harm"), "only in case, blanks"),
        (("a", "a"), "repeats a name"),
        (("all", "harmless"), "means something else"),
        (("Overall", "harmless"), "means something else"),
        (("all_categories", "harmless"), "means something else"),
    ],
)
def test_a_category_that_cannot_be_is_one_sentence(categories, sentence):
    config = config_lib.default()
    config.data.categories, config.data.harmless = categories, categories[-1:]
    with pytest.raises(InputError, match=sentence) as refused:
        checks.validate(config)
    assert str(refused.value).isprintable()


def test_categories_of_published_data_sets_can_be_used_as_they_are():
    config = config_lib.default()
    for data in PUBLISHED.values():
        config.data.categories = (*data.categories, "harmless")
        checks.validate(config)


def bank(count: int) -> reward.Bank:
    zeros = np.zeros(count, np.float32)
    pair = lora.Pair(np.ones((2, count, 4, 32), np.float32), np.ones((2, count, 4, 32), np.float32), 2.0)
    return reward.Bank(reward.Rewards({"q": pair}, np.zeros((count, 32), np.float32), zeros), zeros, zeros)


MODEL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 64, "model_type": "llama",
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_every_reward_lies_in_a_folder_of_its_own_inside_the_workdir(tmp_path):
    given = ("hate/threatening", "hate", "../policy", "hate.tmp", str(tmp_path / "outside"))
    for kept in ("run/adapters/policy/KEPT", "outside/KEPT"):
        (tmp_path / kept).parent.mkdir(parents=True)
        (tmp_path / kept).write_text("kept")
    folder = tmp_path / "run" / "adapters" / "rewards"
    peft.save_rewards(folder, bank(len(given)), families.config_from_hf(MODEL), "base", given)
    assert {names.name_of_file(file.name) for file in folder.iterdir()} == set(given)
    assert len(list(tmp_path.rglob("reward.json"))) == len(list(folder.glob("*/reward.json"))) == len(given)
    assert len(list(tmp_path.rglob("KEPT"))) == 2


def test_a_name_that_is_none_is_refused_before_any_reward_is_written(tmp_path):
    with pytest.raises(InputError, match="empty name"):
        peft.save_rewards(tmp_path / "rewards", bank(2), families.config_from_hf(MODEL), "base", ("hate", ""))
    assert not list(tmp_path.iterdir())


def test_scalars_of_odd_categories_are_curves_of_their_own(tmp_path, monkeypatch):
    seen = {}

    class Sink(sinks.TensorBoard):
        def write(self, row, stage, step, scalars):
            seen.update(scalars)
            super().write(row, stage, step, scalars)

    monkeypatch.setitem(sinks.SINKS, "tensorboard", Sink)
    scalars = {"reward": 1.0, "reward/a b": 2.0, "reward/a,b": 3.0, "reward/a//b": 4.0, "reward/a_b": 5.0}
    with MetricWriter(tmp_path) as writer:
        writer.write("align", 1, scalars)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()).keys() - {"stage", "step"} == scalars.keys()
    assert seen == {
        "reward": 1.0, "reward/a.20b": 2.0, "reward/a.2Cb": 3.0, "reward/a.2F.2Fb": 4.0, "reward/a_b": 5.0
    }  # fmt: skip
    row = {"stage": "align", "step": 1} | scalars
    assert sinks._parse_row(row)[2] == seen  # what a later start tells a sink


def test_a_run_is_called_like_its_folder_also_where_that_is_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sinks.Start(pathlib.Path("."), "", {}, []).name == tmp_path.name
    assert sinks.Start(pathlib.Path("runs/x/.."), "", {}, []).name == "runs"


@pytest.mark.parametrize("place", ["runs/v1[draft]/x", "a*", "what?", "gs://bucket/x[1]", "runs/a\x1b[2Jb"])
def test_a_workdir_in_which_checkpoints_cannot_be_read_again_is_refused(place):
    with pytest.raises(InputError, match="take another folder"):
        bucket.parse_path(place)


def test_a_relative_workdir_is_judged_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "x [1]").mkdir()
    monkeypatch.chdir(tmp_path / "x [1]")
    with pytest.raises(InputError, match="also of those above it"):
        bucket.parse_path("run")


@pytest.mark.parametrize("place", ["jane doe@example.org", "a=b, 100%", "#{}$", "é中", "a'b"])
def test_other_odd_places_are_taken(place):
    assert bucket.parse_path(place) == pathlib.Path(place)


def a_study(variants: dict, seeds=(0,)) -> ConfigDict:
    base = config_lib.default().copy_and_resolve_references()
    made = ConfigDict({"base": base, "seeds": seeds, "reference": next(iter(variants)), "jobs": 1})
    made.variants = ConfigDict(variants, allow_dotted_keys=True)
    return made


@pytest.mark.parametrize(
    "variants, seeds, sentence",
    [
        ({"plain": {}, "Plain": {}}, (0,), "only in case"),
        ({"curves": {}}, (0,), "means something else"),
        ({"study.csv": {}}, (0,), "means something else"),
        ({"base": {}}, (0,), "means something else"),
        ({"a\nb": {}}, (0,), "no line end"),
        ({1: {}}, (0,), "1, which is no text"),
        ({"plain": {}}, ("../../x",), "give whole numbers"),
        ({"plain": {}}, (0, 0), "each once"),
    ],
)
def test_variants_and_seeds_that_cannot_be_folders_are_refused(variants, seeds, sentence):
    with pytest.raises(InputError, match=sentence):
        study.check(a_study(variants, seeds))


def test_a_variants_runs_lie_inside_the_study(tmp_path):
    made = a_study({"../../x": {}, "lr=1/3": {}})
    folders = [folder for _, folder in study.plan_runs(made, tmp_path)]
    assert {folder.parent.parent for folder in folders} == {tmp_path}
    assert {names.name_of_file(of.parent.name) for of in folders} == {"../../x", "lr=1/3"}
