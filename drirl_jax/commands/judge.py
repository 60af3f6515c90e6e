"""Judges of responses: fits the trained one, and compares all with labels.

python -m drirl_jax judge --fit LABELLED.jsonl --to judge.safetensors
python -m drirl_jax judge --compare LABELLED.csv --raters phrases,classifier --classifier judge.safetensors --to a.json

`drirl_jax/judges/labels.py` says what the files hold: XSTest's published completions and JailbreakBench's comparison
of judges have people's labels. Other options, such as the endpoint, are those of config.evals in a --config file.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from drirl_jax import checks, judges
from drirl_jax import config as config_lib
from drirl_jax import main as command
from drirl_jax.judges import classifier, labels
from drirl_jax.models import hf
from drirl_jax.runtime import console
from drirl_jax.runtime.files import beside, expand_path, need_apart, replace_file
from drirl_jax.types import InputError

FIT = flags.DEFINE_string("fit", None, "Labelled responses to fit the classifier on.")
COMPARE = flags.DEFINE_string("compare", None, "Labelled responses to compare the judges with.")
TO = flags.DEFINE_string("to", None, "The file to write.")
RATERS = flags.DEFINE_list("raters", ["phrases"], f"Some of {', '.join(judges.JUDGES)}, but no rewards.")
CLASSIFIER = flags.DEFINE_string("classifier", None, "The file of the classifier that --fit has written.")


def fit(config: ConfigDict, path: pathlib.Path, out: pathlib.Path) -> dict:
    """Writes the classifier; returns what is known of it."""
    found = classifier.fit(path, classifier.embedder(hf.resolve(config.encoder.init)))
    classifier.save(found, out)
    return found.facts


def compare(config: ConfigDict, path: pathlib.Path, memory: pathlib.Path) -> dict:
    """The agreement of the judges with the labels, and with each other.

    Returns:
        {"file", "versions", "harm", "refusal"}: the last two of `judges.agreement`, with "label" among the raters, of
        the rows that are labelled so; {} where there are none.
    """
    rows = labels.load_labels(path)
    setting = judges.Setting(config, memory, lambda: hf.resolve(config.encoder.init))
    raters = {name: judges.JUDGES[name].make(setting) for name in config.evals.judges}
    found: dict = {"file": path.name, "versions": {name: judge.version for name, judge in raters.items()}}
    for what, label in (("harm", "unsafe"), ("refusal", "refusal")):
        of = [row for row in rows if getattr(row, label) is not None]
        said = {"label": [int(getattr(row, label)) for row in of]}
        texts = ([row.prompt for row in of], [row.response for row in of])
        for name in config.evals.judges if of else ():
            if what in judges.JUDGES[name].tells:
                verdict = getattr(raters[name], what)(*texts)
                said[name] = judges.is_unsafe(verdict) if what == "harm" else verdict
        found[what] = judges.agreement(said) if of else {}
    return found


def main(argv: list[str]) -> None:
    """The fit or the comparison that the flags ask for. Raises InputError."""
    if (FIT.value is None) == (COMPARE.value is None) or TO.value is None:
        raise InputError("give --fit or --compare, one of them, and --to: see python -m drirl_jax judge --help.")
    config = (command.CONFIG.value or config_lib.default()).copy_and_resolve_references()
    out, given = expand_path(TO.value), expand_path(FIT.value if COMPARE.value is None else COMPARE.value)
    need_apart(out, given)
    if FIT.value is not None:
        told = fit(config, given, out)
    else:
        config.evals.update({"judges": tuple(RATERS.value), "classifier": CLASSIFIER.value or ""})
        checks.validate(config)
        told = compare(config, given, beside(out, "judgements"))
        replace_file(out, json.dumps(told, indent=1) + "\n")
    console.print_result(f"{json.dumps(told, indent=1)}\nwritten to {out}", **told, out=str(out))


if __name__ == "__main__":
    command.start(main, resumes=False)
