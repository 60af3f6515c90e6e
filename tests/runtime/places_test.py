"""Paths as users write them, and files that are replaced whole or not at all."""

import json
import os
import pathlib
import re

import pytest

import drirl_jax
from drirl_jax.attacks import autodan, templates
from drirl_jax.commands import cli
from drirl_jax.commands import convert as convert_command
from drirl_jax.data import records
from drirl_jax.evals import items
from drirl_jax.judges import classifier
from drirl_jax.runtime import bucket, files, workdirs
from drirl_jax.types import InputError

ROW = {"id": "a", "category": "insult", "lang": "en", "split": "train", "prompt": "p", "draft": "", "response": "r"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "é中").mkdir()
    (tmp_path / "é中" / "mine.jsonl").write_text(json.dumps(ROW | {"template": "[PROMPT]"}) + "\n")
    return tmp_path


def test_a_tilde_is_the_home_folder_in_every_option_that_is_a_path(home):
    assert bucket.parse_path("~/run") == bucket.local_folder("~/run") == files.expand_path("~/run") == home / "run"
    assert [record.id for record in records.read_records("~/é中", ["insult"])] == ["a"]
    assert items.find("~", ["mine.jsonl"]) == home / "é中" / "mine.jsonl"
    assert templates.load_demonstrations("~/é中/mine.jsonl") == [("p", "r")]
    with pytest.raises(InputError, match=re.escape(str(home / "é中" / "mine.jsonl"))):
        autodan.load_templates("~/é中/mine.jsonl")  # found, and refused for what it holds
    with pytest.raises(InputError, match="SafetensorError"):
        classifier.load("~/é中/mine.jsonl")  # found, and no classifier
    (home / "run" / "aligned").mkdir(parents=True)
    with pytest.raises(InputError, match=re.escape(f"{home / 'run'} holds no run")):
        workdirs.policy_config("~/run")


def test_a_config_file_in_the_home_folder_is_found(home):
    assert cli._home_in_full("--config=~/c.py", (cli.CONFIG,)) == f"--config={home}/c.py"
    assert cli._home_in_full("--config.data.path=~/x", (cli.CONFIG,)) == "--config.data.path=~/x"


def test_no_module_makes_a_path_of_an_option_by_itself():
    sources = pathlib.Path(drirl_jax.__file__).parent.rglob("*.py")
    assert not [path for path in sources if re.search(r"pathlib\.Path\(\w+\.value\)", path.read_text())]


@pytest.mark.parametrize("name", ["", " ", "a\0b", "~nobody-of-this-name/x"])
def test_what_is_no_path_is_one_sentence(name):
    with pytest.raises(InputError):
        files.expand_path(name)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.replace_file(path, "before\n")
    with pytest.raises(UnicodeEncodeError):
        files.replace_file(path, "half \ud83d")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        files.replace_file(path, "after")
    assert path.read_text() == "before\n" and os.listdir(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link_and_a_mode_a_mode(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    files.replace_file(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_is_written_to_or_refused(tmp_path):
    files.replace_file(pathlib.Path("/dev/null"), "gone")
    with pytest.raises(InputError, match="is a folder"):
        files.replace_file(tmp_path, "")
    assert os.listdir(tmp_path) == []


def test_a_command_does_not_write_over_what_it_reads(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").symlink_to("a")
    files.need_apart(tmp_path / "new", tmp_path / "a")
    with pytest.raises(InputError, match="is read and would be written over"):
        files.need_apart(tmp_path / "b", tmp_path / "a")


UNSAFE = {"prompt": "how?", "response": "So.", "category": {"hate_speech,offensive_language": True}, "is_safe": False}


@pytest.mark.parametrize(
    "lines, sentence",
    [([{"prompt": "how?"}], "not a beavertails record"), ([UNSAFE], "without a safe answer: 1"), ([], "holds no rows")],
)
def test_convert_leaves_what_was_there_where_it_has_nothing_to_write(lines, sentence, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(SystemExit, match=sentence):
        convert_command.main(["beavertails", str(tmp_path / "train.jsonl"), str(out)])
    assert out.read_text() == "before"


def test_convert_does_not_read_what_it_wrote(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(UNSAFE) + "\n")
    with pytest.raises(SystemExit, match="would be written over"):
        convert_command.main(["beavertails", str(tmp_path), str(tmp_path / "train.jsonl")])


def test_what_commands_keep_beside_their_results_is_no_data(tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text(json.dumps(ROW) + "\n")
    for what in files.REPLY_KINDS:
        files.replies_file(out, what).write_text(json.dumps({"request": "ab", "text": "x"}) + "\n")
    (tmp_path / "._mine.jsonl").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them
    assert len(records.read_records(tmp_path, ["insult"])) == 1
    # A user's own file of such a name is data.
    (tmp_path / "more.replies.jsonl").write_text(json.dumps(ROW | {"id": "b"}) + "\n")
    assert len(records.read_records(tmp_path, ["insult"])) == 2
