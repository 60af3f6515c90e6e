"""Judges of responses: fits the classifier, or compares judges with labels.

python -m drirl_jax judge --fit LABELLED.jsonl --to judge.safetensors
python -m drirl_jax judge --compare LABELLED.csv --raters phrases,classifier --classifier judge.safetensors --to a.json

`drirl_jax/judges/labels.py` explains the form of the labelled files. XSTest's published completions and the comparison
of judges by JailbreakBench have labels by people. A --config file gives further options (the endpoint, say), in its
evals section.
"""

from __future__ import annotations

import json
import pathlib
from typing import Sequence

from absl import flags
from ml_collections import ConfigDict

from drirl_jax import checks, judges
from drirl_jax import config as config_lib
from drirl_jax.commands import cli
from drirl_jax.judges import classifier, labels
from drirl_jax.models import hf
from drirl_jax.runtime import console
from drirl_jax.runtime.files import expand_path, need_apart, replace_file, replies_file
from drirl_jax.types import InputError

FIT = flags.DEFINE_string("fit", None, "File of labelled responses to fit the classifier on.")
COMPARE = flags.DEFINE_string("compare", None, "File of labelled responses to compare the judges with.")
TO = flags.DEFINE_string("to", None, "The file to write.")
RATERS = flags.DEFINE_list("raters", ["phrases"], f"Some of {', '.join(judges.JUDGES)}, but not rewards.")
CLASSIFIER = flags.DEFINE_string("classifier", None, "File of a classifier that --fit has written.")


def fit(config: ConfigDict, path: pathlib.Path, out: pathlib.Path) -> dict:
    """Fits and writes the classifier; returns its facts."""
    fitted = classifier.fit(path, classifier.embedder(hf.resolve(config.encoder.init)))
    classifier.save(fitted, out)
    return fitted.facts


def compare(config: ConfigDict, path: pathlib.Path, kept_verdicts: pathlib.Path) -> dict:
    """The agreement of the judges with the labels, and with each other.

    Returns:
        {"file", "versions", "harm", "refusal"}. The last two come from `judges.agreement` on the rows that have this
        label, with "label" as one of the raters; {} if no row has it.
    """
    rows = labels.load_labels(path)
    setting = judges.Setting(config, kept_verdicts, lambda: hf.resolve(config.encoder.init))
    raters = {name: judges.JUDGES[name].make(setting) for name in config.evals.judges}
    result: dict = {"file": path.name, "versions": {name: judge.version for name, judge in raters.items()}}
    for question, column in (("harm", "unsafe"), ("refusal", "refusal")):
        labelled = [row for row in rows if getattr(row, column) is not None]
        verdicts: dict[str, Sequence[float | None]] = {"label": [int(getattr(row, column)) for row in labelled]}
        texts = ([row.prompt for row in labelled], [row.response for row in labelled])
        for name in config.evals.judges if labelled else ():
            if question in judges.JUDGES[name].verdicts:
                verdict = getattr(raters[name], question)(*texts)
                verdicts[name] = list(judges.is_unsafe(verdict) if question == "harm" else verdict)
        result[question] = judges.agreement(verdicts) if labelled else {}
    return result


def main(argv: list[str]) -> None:
    """Runs the fit or the comparison that the flags ask for. Raises InputError."""
    if (FIT.value is None) == (COMPARE.value is None) or TO.value is None:
        raise InputError("give either --fit or --compare, and --to: see python -m drirl_jax judge --help.")
    config = (cli.CONFIG.value or config_lib.default()).copy_and_resolve_references()
    out, labelled_file = expand_path(TO.value), expand_path(FIT.value if COMPARE.value is None else COMPARE.value)
    need_apart(out, labelled_file)
    if FIT.value is not None:
        result = fit(config, labelled_file, out)
    else:
        config.evals.update({"judges": tuple(RATERS.value), "classifier": CLASSIFIER.value or ""})
        checks.validate(config)
        result = compare(config, labelled_file, replies_file(out, "judgements"))
        replace_file(out, json.dumps(result, indent=1) + "\n")
    console.print_result(f"{json.dumps(result, indent=1)}\nwritten to {out}", **result, out=str(out))


if __name__ == "__main__":
    cli.run_command(main, resumes=False)
