"""The attacked model and a judge."""

import pytest
from helpers.attack_targets import small

from drirl_jax.attacks import target as target_lib
from drirl_jax.data.text import ChatTokens
from drirl_jax.judges import phrases
from drirl_jax.models import families, hf


@pytest.fixture(scope="module")
def loaded(policy):
    """The random model with real tokens, its logits far from uniform."""
    model = families.from_hf(hf.read_tensors(policy), families.config_from_hf(hf.read_config(policy)))
    return model.replace(embed=model.embed[...] * 10), ChatTokens(hf.load_tokenizer(policy))


@pytest.fixture
def target(loaded):
    return target_lib.Target(*loaded, small(), {"phrases": phrases.refused_by_phrases})


@pytest.fixture
def judge(target):
    """A judge to whom all is safe, so that no search ends early; and the pairs that it saw."""
    seen = []
    target.judges["phrases"] = lambda prompt, response: seen.append((prompt, response)) or True
    return seen
