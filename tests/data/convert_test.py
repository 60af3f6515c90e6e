"""The converter of published data sets."""

import collections
import gzip
import json
import lzma
import pathlib
import sys
import types

import pytest
from helpers.record_files import CATEGORIES, ROW, write

from drirl_jax.commands import convert as convert_command
from drirl_jax.data import convert, records
from drirl_jax.data.published import PUBLISHED
from drirl_jax.types import InputError


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
