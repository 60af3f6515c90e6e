"""The Mistral family: a Llama whose layers may have a sliding window, all (arXiv 2310.06825) or some of them."""

from __future__ import annotations

from collections.abc import Mapping

from drirl_jax.models import fields, llama
from drirl_jax.models.architecture import Config

WINDOW = 4096  # the default of transformers; null in the config means no window


def config_from_hf(hf: Mapping) -> Config:
    """The decoder from a Mistral's config. Raises the errors of `llama.config_from_hf`.

    With "layer_types" it is the model that transformers calls and loads as Ministral. Without, all layers are alike.
    """
    window = fields.size(hf, "sliding_window", WINDOW)
    config = llama.shape(hf, llama.ONLY, ("sliding_window", "layer_types"))
    return config._replace(**llama.windows(hf, window, lambda i: window is not None))


_MISTRAL = Config(32_768, 4096, 32, 32, 8, 128, 14_336, 1e6, tied=False, family="mistral")
PRESETS = {
    "mistral-7b-v0.1": _MISTRAL._replace(vocab=32_000, rope_theta=1e4, window=4096, local=(True,) * 32),
    "mistral-7b": _MISTRAL,  # v0.3
}
