"""The field's harnesses with a policy of this project: real tasks of theirs on local data, beside our own files."""

import json
import pathlib

import pytest

from drirl_jax.commands import evaluate
from drirl_jax.evals.tasks import gsm8k
from drirl_jax.harness import Policy, chat_from_string, chat_to_string
from drirl_jax.types import InputError

QUESTIONS = ["What is 2 and 3?", "Tom has 4 apples and eats one. How many are left?", "Half of 12?", "7 times 6?"]
MAX_NEW = 24


def test_a_chat_survives_as_a_string():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "chat: <|im_end|>\n你好"}]
    assert chat_from_string(chat_to_string(chat)) == chat
    assert list(chat_from_string("Hello")) == [{"role": "user", "content": "Hello"}]


def test_a_chat_that_is_too_long_is_told_before_its_batch_is_asked(policy):
    of = Policy(str(policy))
    short, long = ([{"role": "user", "content": text}] for text in ("Hello", "and " * 90))
    of.model.config = of.model.config._replace(positions=90)
    of.need_room(short, 8)
    with pytest.raises(InputError, match="texts of this model have at most 90"):
        of.need_room(long, 8)


@pytest.fixture(scope="module")
def case(policy, tmp_path_factory):
    """A folder with problems of GSM8K's form, some of which a random model solves, and our own results on them."""
    data = tmp_path_factory.mktemp("gsm8k")
    chats = [({"role": "user", "content": text},) for text in QUESTIONS]
    said = Policy(str(policy), batch=4).respond(chats, MAX_NEW, 0.0)
    right = [gsm8k.NUMBER.findall(of.text) for of in said]
    answers = [numbers[-1] if numbers and i % 2 == 0 else "41" for i, numbers in enumerate(right)]
    rows = [{"question": text, "answer": f"So it is.\n#### {number}"} for text, number in zip(QUESTIONS, answers)]
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    solved = [{"question": f"{n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(3)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, solved)))
    flags = {"benchmarks": ("gsm8k",), "data": str(data), "batch": 4, "benchmark_max_new": MAX_NEW}
    (ours,) = evaluate.run(str(policy), evaluate.evaluation_config(str(policy), None, flags), data / "ours")
    return data / "test.jsonl", ours


def responses(ours):
    return [row["response"] for row in ours["responses"]]


@pytest.mark.parametrize("shots", [0, 2])
def test_lm_eval(case, policy, tmp_path, shots):
    """Its own task gsm8k, whose filters and metric are its file's; where the data lie and what is asked are ours."""
    lm_eval = pytest.importorskip("lm_eval", reason='pip install -e ".[harness]"')
    import yaml
    from lm_eval.tasks import TaskManager

    import drirl_jax.harness.lm_eval as harness

    path, ours = case
    if shots:
        flags = {"benchmarks": ("gsm8k",), "data": str(path.parent), "batch": 4, "benchmark_max_new": MAX_NEW}
        (ours,) = evaluate.run(
            str(policy), evaluate.evaluation_config(str(policy), None, flags | {"shots": shots}), tmp_path
        )
    file = pathlib.Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(file.read_text())
    task |= {"task": "gsm8k_of_files", "doc_to_text": "{{question}}", "num_fewshot": shots, "target_delimiter": ""}
    files = {"test": str(path), "train": str(path.parent / "train.jsonl")}
    task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    task |= {"fewshot_config": {"sampler": "first_n", "split": "train"}}
    task["generation_kwargs"]["max_gen_toks"] = MAX_NEW
    found = lm_eval.simple_evaluate(
        harness.DrirlJax(str(policy), batch_size=4), tasks=[task], task_manager=TaskManager(), apply_chat_template=True,
        fewshot_as_multiturn=bool(shots), bootstrap_iters=0,
    )  # fmt: skip
    theirs = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"]["gsm8k_of_files"]}
    assert [theirs[i] for i in sorted(theirs)] == responses(ours)
    told, metrics = found["results"]["gsm8k_of_files"], ours["judges"]["protocol"]["metrics"]
    assert told["exact_match,flexible-extract"] == metrics["exact_match"]["value"]
    assert told["exact_match,strict-match"] == metrics["strict_match"]["value"]


def test_lm_eval_log_likelihoods_are_those_of_our_options(policy):
    pytest.importorskip("lm_eval", reason='pip install -e ".[harness]"')
    from lm_eval.api.instance import Instance

    import drirl_jax.harness.lm_eval as harness

    model = harness.DrirlJax(str(policy), batch_size=2)
    pairs = [("Is it late?", " Yes."), ("Is it late?", " No, not at all."), ("Why?", " Because.")]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    chats = [chat_from_string(context) for context, _ in pairs]
    ours = model.policy.score(chats, [text for _, text in pairs])
    assert [total for total, _ in found] == pytest.approx([float(of.total[0]) for of in ours])
    assert found[1][0] < 0 and not any(greedy for _, greedy in found)
    with pytest.raises(InputError, match="without a prompt"):
        model.loglikelihood_rolling([])
    assert harness.cut("one\n\ntwo Q: three", ["Q:", "\n\n"]) == "one"


def test_inspect_ai(case, policy, tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai", reason='pip install -e ".[harness]"')
    from inspect_ai.dataset import FieldSpec, json_dataset
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    import drirl_jax.harness.inspect_ai  # noqa: F401  registers the provider

    path, ours = case
    numbers = [json.loads(line) for line in path.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"q": of["question"], "a": of["answer"].rpartition(" ")[2]}) for of in numbers)
    )
    task = inspect_ai.Task(
        dataset=json_dataset(str(tmp_path / "rows.jsonl"), FieldSpec(input="q", target="a")),
        solver=generate(),
        scorer=match(numeric=True),
    )
    (log,) = inspect_ai.eval(
        task, model=f"drirl_jax/{policy}", max_tokens=MAX_NEW, temperature=0.0, log_dir=str(tmp_path / "logs"),
        display="none", model_args={"batch": 4},
    )  # fmt: skip
    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == responses(ours)
    # Its scorer looks for the number at the end of an answer; ours takes the last number anywhere.
    ends = [sample.scores["match"].value == "C" for sample in log.samples]
    assert all(not right or row["protocol"]["exact_match"] for right, row in zip(ends, ours["responses"]))
