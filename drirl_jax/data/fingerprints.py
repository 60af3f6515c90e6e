"""Hashes of a run's inputs: weights, tokenizer, template, data, text encoder and rewards."""

from __future__ import annotations

import json
import pathlib
from typing import Sequence

from ml_collections import ConfigDict

from drirl_jax import config as config_lib
from drirl_jax.data import records
from drirl_jax.data.text import ChatTokens
from drirl_jax.models import hf
from drirl_jax.runtime import bucket, hashes
from drirl_jax.runtime.checkpoint import Checkpoints

ENCODER_FILES = ("config.json", "*.safetensors", "tokenizer.json")


def policy_contents(config: ConfigDict, tokens: ChatTokens) -> dict[str, str]:
    """The hashes of the files in the policy's folder, and of its tokenizer as it was loaded.

    Raises:
        InputError: there is no such policy.
    """
    path = hf.resolve(config.policy.init)
    return {
        "weights": weights_hash(path),
        # A .gguf file holds its config beside the weights, and parsing it takes seconds.
        "model": hashes.hash_model_config(hf.read_config(path)) if path.is_dir() else hashes.hash_value("in the file"),
        "tokenizer": hashes.hash_tokenizer(tokens.tokenizer),
        "template": hashes.hash_template(tokens.tokenizer),
        "ends": hashes.hash_value(list(tokens.eos_ids)),
    }


def policy_settings(config: ConfigDict, tokens: ChatTokens) -> dict:
    """What a policy's answers depend on, for a file of results: the options of config.policy, and "contents".

    The contents (see `policy_contents`) stand for the path, because the same model may have another path.
    """
    options = json.loads(config.policy.to_json())
    del options["init"]
    return options | {"contents": policy_contents(config, tokens)}


def weights_hash(path: pathlib.Path) -> str:
    """A hash of a model's weights: a copy has the same hash, newly trained weights have another."""
    return hashes.hash_weights(path, hf.read_tensors(path) if path.is_dir() else None)


def encoder_hash(folder: pathlib.Path) -> str:
    """A hash of what a text encoder's folder holds: its config, weights and tokenizer."""
    return hashes.hash_folder(folder, ENCODER_FILES)


def run_contents(config: ConfigDict, tokens: ChatTokens, question_sets: Sequence = ()) -> dict[str, str]:
    """The hash of each input of a run with this config.

    Args:
        tokens: the policy's.
        question_sets: the loaded questions of config.evals.benchmarks (see `evals.benchmarks.load`).

    Raises:
        InputError: one of the inputs does not exist.
    """
    rows = records.read_records(
        config.data.path,
        config.data.categories,
        harmless=config.data.harmless,
        unanswered=config_lib.learns_own_answers(config),
    )
    by_input = policy_contents(config, tokens) | {
        "data": hashes.hash_records(row._replace(provenance="") for row in rows),
        "encoder": encoder_hash(hf.resolve(config.encoder.init)),
    }
    if question_sets:
        by_input["benchmarks"] = hashes.hash_value([questions.contents for questions in question_sets])
    if config.reward.init:
        by_input["rewards"] = hashes.hash_value(
            Checkpoints(bucket.parse_path(config.reward.init) / "rewards", keep=1).newest_checksums()
        )
    if config.evals.every and config.evals.benchmarks and config.evals.classifier:  # the metrics hold its figures
        by_input["classifier"] = hashes.hash_file(config.evals.classifier)
    return by_input
