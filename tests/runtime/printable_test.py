"""Names and texts of others reach terminals, pages and Markdown as what they are: characters, and nothing to obey."""

import json
import logging

import pytest

from drirl_jax.reports import pages
from drirl_jax.runtime import console

NAME = "<img src=//x.example onerror=alert(1)>\x1b[2J\u202e|`x`[a](javascript:b)\x9b\ud800"


def test_a_table_in_markdown_holds_no_html_link_code_or_escape():
    text = pages.Table("", ("run", NAME), [(NAME, "12%*")]).markdown()
    assert "<" not in text and "](" not in text.replace("\\](", "") and not set("\x1b\x9b\u202e\ud800") & set(text)
    assert all(line.replace("\\|", "").count("|") == 3 for line in text.splitlines())
    assert "12%*" in text  # what means something stays


def test_a_table_for_the_terminal_holds_no_escape():
    table = pages.Table(NAME, (NAME,), [(NAME,)]).rich()
    cells = [str(cell) for column in table.columns for cell in (column.header, *column.cells)]
    assert not any(set("\x1b\x9b\u202e\ud800") & set(cell) for cell in [*cells, str(table.title)])


def test_marks_of_direction_are_replaced_and_other_scripts_stay():
    kept = "שלום \u200f é 中 👨\u200d👩 \u200c می\u200cخواهم\n\t"
    assert console.printable(kept) == kept
    assert console.printable("\u202a\u202e\u2066\u2069\x7f\x85") == "\ufffd" * 6


@pytest.fixture
def spoken():
    before = console.mode()
    yield console.set_mode
    console.set_mode(before)


def test_a_result_keeps_colours_and_nothing_else(capsys, spoken):
    spoken("text")
    console.print_result("\x1b[1mbold\x1b[0m \x1b[2J\x1b]0;title\x07 \u202e \r\ud83d")
    assert capsys.readouterr().out == "\x1b[1mbold\x1b[0m \ufffd[2J\ufffd]0;title\ufffd \ufffd \ufffd?\n"


def test_json_lines_have_escapes_for_what_does_not_print(capsys, spoken):
    spoken("json")
    console.print_event("result", text="é \u202e\x9b\u2028\ud800\U000e0041")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.strip().isprintable() and "é" in line
    assert json.loads(line)["text"] == "é \u202e\x9b\u2028\ud800\U000e0041"


def test_a_log_line_holds_no_escape(capsys, spoken):
    spoken("text")
    logging.getLogger("drirl_jax").warning("category %s", "a\x1b[2J\u202e")
    assert capsys.readouterr().err == "category a\ufffd[2J\ufffd\n"


def test_a_page_holds_no_control(tmp_path):
    table, picture = pages.Table(NAME, (NAME,), [(NAME,)]), pages.Picture(NAME, "")
    values = {"title": NAME, "overview": picture, "results": table, "note": NAME, "curves": {NAME: picture}}
    text = pages.write("study.html.jinja", tmp_path / "a.html", **values).read_text("utf-8")
    assert not set("\x1b\x9b\u202e") & set(text) and "<img src=//" not in text
