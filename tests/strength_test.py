"""The strength of the aligned policy: which is chosen, and what a scaled policy is."""

import jax
import numpy as np
import pytest
from transformer_test import filled, random_group, tiny

from drirl_jax.evals import strength
from drirl_jax.models import lora, transformer
from drirl_jax.stages.base import POLICIES


def test_the_largest_strength_within_the_bound_is_chosen_and_none_is_tried_after_it():
    shares = {1.0: 0.5, 0.9: 0.3, 0.8: 0.2, 0.7: 0.1}
    assert strength.strongest(shares.__getitem__, 0.2) == (0.8, {1.0: 0.5, 0.9: 0.3, 0.8: 0.2})
    assert strength.strongest(shares.__getitem__, 0.5) == (1.0, {1.0: 0.5})


def test_a_policy_that_refuses_at_every_strength_gets_the_smallest_and_a_warning(caplog):
    chosen, seen = strength.strongest(lambda s: 0.11, 0.1)
    assert chosen == 0.3 and seen == dict.fromkeys(strength.STRENGTHS, 0.11)
    assert "down to 0.3 more than 10% of the harmless validation prompts" in caplog.text


@pytest.mark.parametrize("tune", POLICIES)
def test_a_scaled_policy_lies_between_the_reference_and_itself(tune):
    model, policy, group = tiny(), POLICIES[tune], random_group()
    adapter = filled(lora.init(model, jax.random.key(1), rank=4, alpha=8), 2)
    params = {"lora": adapter, "full": lora.merge(model, adapter)}[tune]

    def close(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)

    close(policy.merged(model, policy.scaled(model, params, 0.0)), model)
    close(policy.merged(model, policy.scaled(model, params, 1.0)), policy.merged(model, params))
    half, whole = (policy.merged(model, policy.scaled(model, params, s)) for s in (0.5, 1.0))
    close(jax.tree.map(lambda w, v: (w + v) / 2, model, whole), half)
    hidden = [transformer.apply(m, group)[1] for m in (model, half, whole)]
    assert all(float(abs(a - b).max()) > 0.01 for a, b in zip(hidden, hidden[1:]))
