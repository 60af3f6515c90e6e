"""Records of which each of two processes reads and tokenises its share; what one finds wrong, both say."""

import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys

import numpy as np

from drirl_jax.configs import tiny
from drirl_jax.data import builder, examples
from drirl_jax.data.text import ChatTokens
from drirl_jax.models import hf

ROOT = pathlib.Path(__file__).parents[2]
SPLITS = ("train", "train", "valid", "test")


def write(path, count, changed=None):
    """So many records of uneven length, the last one of which is changed."""
    names = tiny.get_config().data.categories
    rows = [
        {
            "id": f"r{i}",
            "category": names[i % len(names)],
            "lang": "en",
            "split": SPLITS[i // len(names) % len(SPLITS)],
            "prompt": f"Ünder 请 {i}? " + "word " * (i * 7 % 23),
            "draft": "",
            "response": "No. " * (1 + i * 5 % 11),
        }
        for i in range(count)
    ]
    rows[-1] |= changed or {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def two(command):
    """Two processes of what `command` gives for a port and a number: their exit codes, stdouts and stderrs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NPROC": "64"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command(port, str(number))],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*said)


ONE_OF_TWO = """
import pathlib, pickle, sys
import jax
from drirl_jax.runtime import processes
from drirl_jax.configs import tiny
from drirl_jax.data import builder, examples
from drirl_jax.models import hf
from drirl_jax.data.text import ChatTokens
from drirl_jax.types import InputError

folder, tokenizer, port, number = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
processes.MOST_AT_ONCE = 1024  # several pieces
folder, config = pathlib.Path(folder), tiny.get_config()
tokens, read, made = ChatTokens(hf.load_tokenizer(pathlib.Path(tokenizer))), [], []
to_record, prompt_ids = builder._to_record, tokens.prompt_ids
builder._to_record = lambda example: read.append(1) or to_record(example)
tokens.prompt_ids = lambda prompt: made.append(1) or prompt_ids(prompt)
by_split = builder.read_splits(folder / "all.jsonl", config.data.categories, folder / number)
(folder / f"{number}.pickle").write_bytes(pickle.dumps(examples.tokenise(by_split, tokens, config)))
print(len(read), len(made))

def fails(do):
    try:
        print(do())
    except Exception as error:
        print(type(error).__name__, error)

fails(lambda: builder.read_splits(folder / f"of{number}.jsonl", config.data.categories, folder / number))
fails(lambda: builder.read_splits(folder / f"only{number}.jsonl", config.data.categories, folder / number))
fails(lambda: processes.map_shares(range(4), lambda share: [10 // (3 - i) for i in share]))
fails(lambda: processes.map_shares([5], lambda share: [i + 1 for i in share]))
"""


def test_two_processes_have_the_examples_of_one_and_each_makes_its_share(policy, tmp_path):
    config = tiny.get_config()
    path = write(tmp_path / "all.jsonl", 43)
    for number in range(2):
        write(tmp_path / f"of{number}.jsonl", 3, {"prompt": f"{number}"})
    write(tmp_path / "only0.jsonl", 3)
    codes, out, errors = two(lambda *own: ["-c", ONE_OF_TWO, str(tmp_path), str(policy), *own])
    assert codes == [0, 0], errors
    loaded = builder.load(path, config.data.categories, tmp_path / "alone")
    alone = examples.tokenise(
        {split: list(of) for split, of in loaded.items()}, ChatTokens(hf.load_tokenizer(policy)), config
    )
    for number in range(2):
        found = pickle.loads((tmp_path / f"{number}.pickle").read_bytes())
        assert list(found) == list(alone)
        for split, want in alone.items():
            for name, x, y in zip(want._fields, found[split], want):
                assert type(x) is type(y) and getattr(x, "dtype", None) == getattr(y, "dtype", None), name
                np.testing.assert_array_equal(x, y, err_msg=name)
    first, other = ([line for line in lines.splitlines() if not line.startswith("[Gloo]")] for lines in out)
    (read, made), (read_by_other, made_by_other) = (map(int, lines.pop(0).split()) for lines in (first, other))
    # Each process also reads all prepared records once, to compare them with the files that they were made of.
    assert read + read_by_other - 2 * 43 == made + made_by_other == 43 and abs(made - made_by_other) <= 1
    assert abs(read - read_by_other) <= 3  # of each of three splits at most one more
    # Other files for each; a file that one lacks; an error that is no input's; fewer items than processes.
    assert "InputError the processes read different records in" in first[0] and "InputError the" in other[0]
    assert "InputError no file" in first[1] and first[1] == other[1]
    assert first[2] == "RuntimeError process 1 failed: ZeroDivisionError('integer division or modulo by zero')"
    assert other[2].startswith("ZeroDivisionError")
    assert first[3:] == other[3:] == ["[6]"]


def test_a_bad_record_in_the_share_of_one_ends_both_with_its_sentence(policy, tmp_path):
    # Splits lie one behind the other, so that the last record of `test` is in the second half.
    path = write(tmp_path / "long.jsonl", 64, {"prompt": "word " * 500})

    def command(port, number):
        own = {"coordinator": f"127.0.0.1:{port}", "processes": 2, "process": number}
        return [
            "-m", "drirl_jax.main", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}",
            f"--config.policy.init={policy}", f"--config.data.path={path}", "--config.data.minimum=1",
            *(f"--config.distributed.{name}={value}" for name, value in own.items()),
        ]  # fmt: skip

    codes, _, errors = two(command)
    last = [[line for line in error.splitlines() if line.startswith("drirl_jax: ")] for error in errors]
    assert codes == [1, 1] and len(last[0]) == 1 and last[0] == last[1], errors
    assert last[0][0].startswith("drirl_jax: the prompt of record r63 has ") and "Traceback" not in "".join(errors)
