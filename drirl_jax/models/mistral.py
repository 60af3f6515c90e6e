"""The Mistral family: a Llama all of whose layers may have a sliding window (arXiv 2310.06825)."""

from __future__ import annotations

from typing import Mapping

from drirl_jax.models import llama
from drirl_jax.models.architecture import Config


def config_from_hf(hf: Mapping) -> Config:
    """The decoder from a Mistral's config; raises what `llama.config_from_hf` does."""
    config, window = llama.shape(hf, llama.ONLY), hf.get("sliding_window")
    return config._replace(window=window, local=(True,) * config.layers) if window else config


_MISTRAL = Config(32_768, 4096, 32, 32, 8, 128, 14_336, 1e6, tied=False, family="mistral")
PRESETS = {
    "mistral-7b-v0.1": _MISTRAL._replace(vocab=32_000, rope_theta=1e4, window=4096, local=(True,) * 32),
    "mistral-7b": _MISTRAL,  # v0.3
}
