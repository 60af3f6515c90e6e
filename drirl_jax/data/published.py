"""Published data sets with safe answers, and the mapping from their categories to the method's seven.

The seven are those of Safety-Prompts (arXiv 2304.10436), so its names stay. The other mappings are ours; they follow
the definitions in each data set's card. A category that a mapping lacks has no counterpart among the seven, or several
(as "controversial topics"). Its prompts are left out and counted.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

from drirl_jax.data import values
from drirl_jax.data.files import Row
from drirl_jax.data.records import SPLITS


class Answer(NamedTuple):
    """A prompt and one answer to it, from one row.

    Attributes:
        prompt: the question.
        text: the answer.
        safe: whether the data set calls the answer safe.
        by: who wrote or judged the answer.
        labels: the prompt's categories in this row, in the data set's words.
        lang: language of prompt and answer.
        id, split: of the prompt; "" if the data set has none that we use.
    """

    prompt: str
    text: str
    safe: bool
    by: str
    labels: tuple[str, ...]
    lang: str = "en"
    id: str = ""
    split: str = ""


class Published(NamedTuple):
    """A published data set.

    Attributes:
        parse: (row, name of its part) -> its answers, or the reason why we use none. Raises KeyError, TypeError,
            AttributeError or ValueError for a row of another form, InputError for an unknown value.
        categories: the data set's category -> ours.
        files: patterns of its file names on disk; a file's part is the name of its folder.
        parts: on the hub: the part's name -> options of `datasets.load_dataset`. Only parts meant for training.
        url: the download page.
        terms: its licence, and what a user must know before using it.
    """

    parse: Callable[[Row, str], list[Answer] | str]
    categories: Mapping[str, str]
    files: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Any]]
    url: str
    terms: str


def _safety7(row: Row, part: str) -> list[Answer]:
    """`{"id", "category", "lang", "split": "train" | "valid", "prompt", "safe": [{"text", "model"}, ...], ...}`."""
    metadata = {"labels": (row["category"],), "lang": row["lang"]}
    metadata["split"] = values.label("split", row["split"], {name: name for name in SPLITS})
    metadata["id"] = f"{row['id']}-{row['lang']}"
    safe = [Answer(row["prompt"], x["text"], True, f"of {x.get('model', 'a model')}", **metadata) for x in row["safe"]]
    return safe or [Answer(row["prompt"], "", False, "", **metadata)]


def _safety_prompts(row: Row, part: str) -> list[Answer]:
    """`{"prompt", "response", "type"}`, in lists by type."""
    label = row.get("type") or row.get("subset") or part
    return [Answer(row["prompt"], row["response"], True, "of ChatGPT, not judged", (label,), "zh")]


def _do_not_answer(row: Row, part: str) -> list[Answer]:
    """`{"question", "types_of_harm", "MODEL_response", "MODEL_harmful": 0 | 1, ...}`, of six models."""
    models = [column.removesuffix("_response") for column in row if column.endswith("_response")]
    if not models:
        raise ValueError("no column ends in _response: take the files of the hub, not those of prompts alone")
    label = (row["types_of_harm"],)
    return [
        Answer(row["question"], row[f"{m}_response"] or "", not harmful, f"of {m}", label)
        for m in models
        for harmful in [values.truth(f"{m}_harmful", row[f"{m}_harmful"])]
    ]


def _beavertails(row: Row, part: str) -> list[Answer]:
    """`{"prompt", "response", "category": {NAME: bool, ...}, "is_safe"}`.

    A safe answer has no category, so a prompt's categories are those of its unsafe answers.
    """
    labels = tuple(name for name, value in row["category"].items() if values.truth(f"category {name!r}", value))
    safe = values.truth("is_safe", row["is_safe"])
    return [Answer(row["prompt"], row["response"], safe, "judged safe by people", labels)]


def _hh_rlhf(row: Row, part: str) -> list[Answer] | str:
    """`{"chosen", "rejected"}`: dialogues of turns after "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    opening, *turns = row["chosen"].split("\n\nHuman:")
    if opening.strip() or not turns or "rejected" not in row:
        raise ValueError("no dialogue that Human begins, chosen and rejected")
    prompt, *answers = turns[0].split("\n\nAssistant:")
    if len(turns) > 1 or len(answers) != 1:
        return "as dialogues of several turns"
    return [Answer(prompt, answers[0], True, "preferred by people, not judged safe", (part,))]


SEVEN = (
    "Insult Unfairness_And_Discrimination Crimes_And_Illegal_Activities Physical_Harm Mental_Health "
    "Privacy_And_Property Ethics_And_Morality"
).split()
PRIVACY = "privacy_and_property"
CRIMES, ETHICS, UNFAIR = "crimes_and_illegal_activities", "ethics_and_morality", "unfairness_and_discrimination"

PUBLISHED: dict[str, Published] = {
    "safety7": Published(
        parse=_safety7,
        categories={name.lower(): name.lower() for name in SEVEN},
        files=("*.jsonl",),
        parts={},
        url="https://github.com/RobustNLP/CipherChat",
        terms="research use; labels are a model's",
    ),
    "safety_prompts": Published(
        parse=_safety_prompts,
        categories={name: name.lower() for name in SEVEN},
        files=("typical_safety_scenarios.json", "instruction_attack_scenarios.json"),
        parts={
            name: {"data_files": "typical_safety_scenarios.json", "field": name, "split": "train"} for name in SEVEN
        },
        url="https://huggingface.co/datasets/thu-coai/Safety-Prompts",
        terms="Apache-2.0; the answers are ChatGPT's, and nobody judged them",
    ),
    "do_not_answer": Published(
        parse=_do_not_answer,
        categories={
            "Risks from leaking or inferring sensitive information (organization/gov)": PRIVACY,
            "Compromise privacy by leaking or inferring private information (person/individual)": PRIVACY,
            "Assisting illegal activities": CRIMES,
            "Nudging or advising users to perform unethical or unsafe actions": ETHICS,
            "Reducing the cost of disinformation campaigns": ETHICS,
            "Disseminating false or misleading information": ETHICS,
            "Causing material harm by disseminating misinformation e.g. in medicine or law": "physical_harm",
            "Social stereotypes and unfair discrimination": UNFAIR,
            "Toxic language (hate speech)": "insult",
            "Mental Health or Overreliance Crisis": "mental_health",
        },
        files=("train*.parquet", "do_not_answer*.csv"),
        parts={"train": {"split": "train"}},
        url="https://huggingface.co/datasets/LibrAI/do-not-answer",
        terms="CC BY-NC-SA 4.0; a benchmark, which says nothing of a model that was trained on it",
    ),
    "beavertails": Published(
        parse=_beavertails,
        categories={
            "animal_abuse": ETHICS,
            "child_abuse": CRIMES,
            "discrimination,stereotype,injustice": UNFAIR,
            "drug_abuse,weapons,banned_substance": CRIMES,
            "financial_crime,property_crime,theft": CRIMES,
            "hate_speech,offensive_language": "insult",
            "misinformation_regarding_ethics,laws_and_safety": ETHICS,
            "non_violent_unethical_behavior": ETHICS,
            "privacy_violation": PRIVACY,
            "self_harm": "mental_health",
            "terrorism,organized_crime": CRIMES,
            "violence,aiding_and_abetting,incitement": "physical_harm",
        },
        files=("train.jsonl", "train.jsonl.gz", "train.jsonl.xz"),
        parts={"330k_train": {"split": "330k_train"}},
        url="https://huggingface.co/datasets/PKU-Alignment/BeaverTails",
        terms="CC BY-NC 4.0",
    ),
    "hh_rlhf": Published(
        parse=_hh_rlhf,
        categories=dict.fromkeys(("helpful-base", "helpful-online", "helpful-rejection-sampled"), "harmless"),
        files=("train.jsonl", "train.jsonl.gz"),
        parts={
            name: {"data_dir": name, "split": "train"}
            for name in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
        },
        url="https://huggingface.co/datasets/Anthropic/hh-rlhf",
        terms="MIT; meant for preference models: its authors warn of training dialogue agents on it directly",
    ),
}
