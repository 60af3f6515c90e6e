"""A trained judge: logistic regression on sentence embeddings of labelled responses.

It reads style as well as content. So its AUC on attacked responses is written beside every result: their style is the
same whether they are safe or unsafe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from typing import Callable, NamedTuple, Sequence

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from drirl_jax.judges import labels
from drirl_jax.models.encoder import TextEmbedder
from drirl_jax.runtime.files import expand_path
from drirl_jax.types import InputError

MAX_TOKENS = 256  # tokens of a response that the encoder reads


class Classifier(NamedTuple):
    """P(unsafe) = σ(w·Φ(response) + b), w [E]."""

    weight: np.ndarray
    bias: float
    facts: dict

    @property
    def version(self) -> str:
        parameters = np.append(self.weight, self.bias).astype(np.float32)
        return f"classifier-{hashlib.sha256(parameters.tobytes()).hexdigest()[:8]}"


def fit(path: pathlib.Path, embed: Callable[[Sequence[str]], np.ndarray]) -> Classifier:
    """Fits a classifier on a file's training responses, and measures its AUC on the validation responses.

    min_w,b  Σ log(1 + exp(-y (w·x + b))) + ½ ‖w‖²,  y = ±1

    Args:
        path: see `labels.load_labels`. The rows have `unsafe`, and the `split` train or valid.
        embed: texts -> [N, E].

    Raises:
        InputError: one of the four kinds is missing (safe or unsafe, in train or valid).
    """
    rows = labels.load_labels(path)
    for split, unsafe in itertools.product(("train", "valid"), (True, False)):
        if not any(row.split == split and row.unsafe is unsafe for row in rows):
            kind = "unsafe" if unsafe else "safe"
            raise InputError(f"{path} has no {kind} response in split {split!r}: a classifier needs some.")
    rows = [row for row in rows if row.split in ("train", "valid") and row.unsafe is not None]
    x_NE, unsafe = embed([row.response for row in rows]), np.array([row.unsafe for row in rows])
    train_N, attacked_N = (np.array(column) for column in zip(*((row.split == "train", row.attacked) for row in rows)))
    sign, x_train = np.where(unsafe, 1.0, -1.0)[train_N], x_NE[train_N].astype(float)

    def loss(parameters):
        w, b = parameters[:-1], parameters[-1]
        margin = sign * (x_train @ w + b)
        gradient = -sign * expit(-margin)
        return np.logaddexp(0, -margin).sum() + w @ w / 2, np.append(x_train.T @ gradient + w, gradient.sum())

    optimum = minimize(loss, np.zeros(x_NE.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    weight, bias = optimum.x[:-1], float(optimum.x[-1])
    valid_N, score_N = ~train_N, x_NE @ weight + bias
    facts = {
        "fitted_on": path.name,
        "n_train": int(train_N.sum()),
        "n_valid": int(valid_N.sum()),
        "auc_valid": auc(score_N[valid_N], unsafe[valid_N]),
        "n_valid_attacked": int((valid_N & attacked_N).sum()),
        "auc_valid_attacked": auc(score_N[valid_N & attacked_N], unsafe[valid_N & attacked_N]),
    }
    return Classifier(weight.astype(np.float32), bias, facts)


def auc(score_N: np.ndarray, positive_N: np.ndarray) -> float | None:
    """Share of (positive, negative) pairs whose positive scores higher (Mann-Whitney U). A tie counts as a half.

    None where there are no positives or no negatives.
    """
    positives, negatives = int(positive_N.sum()), int((~positive_N).sum())
    if not positives or not negatives:
        return None
    rank_sum = rankdata(score_N)[positive_N].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def save(classifier: Classifier, path: pathlib.Path) -> None:
    """Writes a safetensors file with the facts in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": classifier.weight, "bias": np.array([classifier.bias], np.float32)}
    save_file(tensors, path, metadata={"facts": json.dumps(classifier.facts)})


def load(path: str) -> Classifier:
    """Reads a file that `save` wrote. Raises InputError."""
    try:
        with safe_open(expand_path(path), framework="numpy") as file:
            weight, bias = file.get_tensor("weight"), float(file.get_tensor("bias")[0])
            return Classifier(weight, bias, json.loads(file.metadata()["facts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"no classifier at config.evals.classifier = {path!r} ({type(error).__name__}): fit one with "
            "python -m drirl_jax judge --fit LABELLED.jsonl --to FILE.safetensors."
        ) from error


def embedder(folder: pathlib.Path) -> TextEmbedder:
    """The text encoder. It reads more tokens than the encoder of response parts, because it gets whole responses."""
    return TextEmbedder.from_folder(folder, MAX_TOKENS)


def harm(classifier: Classifier, folder: pathlib.Path) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """(prompts, responses) -> [N] P(unsafe), from the responses alone. An empty response has 0.

    Raises:
        InputError: the classifier was fitted on the embeddings of another encoder.
    """
    embed = embedder(folder)
    if classifier.weight.shape != (embed.width,):
        raise InputError(
            f"the classifier was fitted on embeddings of width {classifier.weight.size}, but config.encoder.init has "
            f"{embed.width}: fit one for this encoder."
        )

    def predict_harm(prompts, responses):
        has_text_N = np.array([bool(text.strip()) for text in responses])
        x_NE = embed([text if text.strip() else "-" for text in responses])
        return expit(x_NE @ classifier.weight + classifier.bias) * has_text_N

    return predict_harm
