"""Data files as other tools save them: what they hold decides how they are read, and what is no row is refused."""

import codecs
import gzip
import json
import lzma

import pytest
from ml_collections import ConfigDict

from drirl_jax.commands import convert as convert_command
from drirl_jax.data import files, records
from drirl_jax.evals import benchmarks
from drirl_jax.types import InputError

ROWS = [{"question": "1+1?", "answer": "#### 2"}, {"question": "é?\u2028", "answer": "#### 3"}]
LIST = json.dumps(ROWS, ensure_ascii=False)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'question,answer\n1+1?,#### 2\n"é?\u2028",#### 3\n'
SAME = {
    "list.json": LIST.encode(),
    "bom.json": codecs.BOM_UTF8 + LIST.encode(),
    "utf16.json": LIST.encode("utf-16"),
    "utf16be.json": LIST.encode("utf-16-be"),
    "utf32.json": LIST.encode("utf-32"),
    "lines.json": LINES.encode(),
    "lines_bom.json": codecs.BOM_UTF8 + LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "list.jsonl": LIST.encode(),
    "indented.jsonl": json.dumps(ROWS, indent=1).encode(),
    "UPPER.JSONL": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "a.json.gz": gzip.compress(LIST.encode(), mtime=0),
    "lines.json.gz": gzip.compress(LINES.encode(), mtime=0),
    "a.JSONL.XZ": lzma.compress(LINES.encode()),
    "packed_without_a_word.jsonl": gzip.compress(LINES.encode(), mtime=0),
    "unpacked.jsonl.gz": LINES.encode(),
    "bom.csv": codecs.BOM_UTF8 + TABLE.encode(),
    "utf16.csv": TABLE.encode("utf-16"),
    "A.CSV": TABLE.encode(),
    "a.csv.gz": gzip.compress(TABLE.encode(), mtime=0),
    "a.tsv": TABLE.replace(",", "\t").encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_one_data_set_in_many_forms(name, tmp_path):
    (tmp_path / name).write_bytes(SAME[name])
    found = files.read_table(tmp_path / name)
    assert [dict(row) for _, row in found] == ROWS
    assert all(where.startswith(str(tmp_path / name)) for where, _ in found)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.json", b'[["1+1?", "2"]]', "row 1: a JSON list, not an object"),
        ("a.json", b'[{"q": 1}, null]', "row 2: a JSON NoneType, not an object"),
        ("a.jsonl", b'["q"]\n["r"]\n', "line 1: a JSON list, not an object"),
        ("a.json", b"3", "holds a JSON int"),
        ("a.json", b"null", "holds a JSON NoneType"),
        ("a.json", b"", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b'{"question": ["1+1?"], "answer": ["2"]}', "holds columns, not rows"),
        ("a.json", b'{"a": [{"q": 1}, "text"]}', "row 2: a JSON str, not an object"),
        ("a.json", b'{"q": 1}\n{"q": ', "line 2: not JSON"),
        ("a.json", '[{"q": "é"}]'.encode("latin-1"), "not UTF-8 text"),
        ("a.json", LIST.encode("utf-16")[:-1], "no text in UTF-16"),
        ("a.csv", "question\né\n".encode("latin-1"), "line 2: not UTF-8 text"),
        ("a.csv", b"question,answer\n1+1?,2,more\n", "row 1: more cells than columns"),
        ("a.csv", b'question,answer\n"1+1?,2\n', "no table of separated values"),
        ("a.csv", b"question,question\n1,2\n", "several columns called 'question'"),
        ("a.json.gz", gzip.compress(LIST.encode(), mtime=0)[:-9], "cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "cannot be unpacked"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_holds_no_rows_is_one_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        files.read_table(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_one_sentence(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError):
        files.read_table(tmp_path / name)


def test_an_empty_cell_more_is_no_text_that_was_cut(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n1+1?,2,\n")
    assert [dict(row) for _, row in files.read_table(tmp_path / "a.csv")] == [{"question": "1+1?", "answer": "2"}]


def test_training_data_in_utf_16_with_nulls_and_in_capitals(tmp_path):
    row = {
        "id": "a",
        "category": "insult",
        "lang": "en",
        "split": "train",
        "prompt": "p é",
        "draft": "",
        "response": "r",
    }
    row |= {"provenance": None, "more": None}
    (tmp_path / "MINE.JSONL").write_bytes((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-16"))
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps(row | {"id": "b"}).encode()))
    found = records.read_records(tmp_path, ["insult"])
    assert [(record.id, record.prompt, record.provenance) for record in found] == [("a", "p é", ""), ("b", "p é", "")]
    (tmp_path / "MINE.JSONL").write_text(json.dumps(row | {"prompt": None}))
    with pytest.raises(InputError, match="line 1: the field 'prompt' is missing"):
        records.read_records(tmp_path, ["insult"])


def test_half_a_character_is_replaced_in_a_benchmark(tmp_path):
    (tmp_path / "a.json").write_text('[{"q": "cut \\ud83d", "more": ["\\uDE00", "whole \\ud83d\\ude00"]}]')
    ((_, row),) = files.read_table(tmp_path / "a.json")
    assert row == {"q": "cut \ufffd", "more": ["\ufffd", "whole 😀"]}


def test_half_a_character_in_an_answer_is_left_out_and_counted(tmp_path, capsys):
    def row(i, tail, safe):
        label = {"hate_speech,offensive_language": not safe}
        return {"prompt": f"insult {i}", "response": f"Please do not.{tail}", "category": label, "is_safe": safe}

    rows = [row(i, tail, safe) for i, tail in enumerate(["", " \ud83d", ""]) for safe in (True, False)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_command.main(["beavertails", str(tmp_path / "train.jsonl"), str(tmp_path / "out.jsonl")])
    assert len(records.read_records(tmp_path / "out.jsonl", ["insult"])) == 2
    assert "left out with half a surrogate pair, as of an emoji that was cut: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"problem": "How many?", "answer": "!!!"}, "line 1: the answer '!!!' has no letter and no digit"),
        ({"problem": "How many?", "answer": ""}, "line 1: the answer '' has no letter and no digit"),
        ({"problem": " ", "answer": "two"}, "line 1: problem is empty"),
        ({"problem": 5, "answer": "two"}, "line 1: problem is of type int"),
        ({"problem": "How many?", "answer": "two", "metadata": {"topic": "Art"}}, "of another form"),
    ],
)
def test_a_benchmarks_item_that_asks_nothing_is_refused(row, sentence, tmp_path):
    (tmp_path / "simpleqa.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=sentence):
        benchmarks.load("simpleqa", ConfigDict({"evals": {"data": str(tmp_path), "limit": 0}}), None, None)


def test_a_column_that_is_missing_is_one_sentence():
    with pytest.raises(InputError, match="row 1: no column 'question'"):
        files.first_column("row 1", {"question;answer": "1+1?;2"}, "question")
