"""GRPO's and DPO's losses against TRL's own code, on random log-probabilities: values and gradients.

TRL's losses are methods of its trainers; they are called with a stand-in for the trainer that holds the options alone.
"""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drirl_jax import losses

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

P, G, T, BETA, LOW, HIGH = 4, 3, 6, 0.05, 0.2, 0.3
SAME = {"sequence": "grpo", "token": "bnpo", "constant": "dr_grpo"}  # our reductions by TRL's names


def batch(seed):
    """(logp, old, ref [P, G, T], advantage [P, G], mask), ratios on both sides of the clip."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(size=(P, G, T))
    old, ref = logp + rng.normal(scale=0.3, size=(2, P, G, T))
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G))[..., None]
    return *(x.astype(np.float32) for x in (logp, old, ref, rng.normal(size=(P, G)))), mask


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def alone():
    """An accelerate.Accelerator of one process: what it gathers and reduces is what it is given."""
    return mock.MagicMock(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )


@pytest.mark.parametrize("ratio", losses.RATIO)
@pytest.mark.parametrize("reduce", SAME)
def test_grpo(reduce, ratio):
    for seed in range(3):
        logp, old, ref, advantage, mask = batch(seed)
        mine = torch.tensor(logp.reshape(-1, T), requires_grad=True)
        trainer = mock.MagicMock(
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=ratio, beta=BETA,
            loss_type=SAME[reduce], epsilon_low=LOW, epsilon_high=HIGH, use_vllm=False, aux_loss_enabled=False,
            max_completion_length=T, _entropy_bonus_enabled=False, model=SimpleNamespace(training=False),
            accelerator=alone(), args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (mine, torch.zeros_like(mine), None),
        )  # fmt: skip
        inputs = {
            "prompt_ids": torch.zeros(P * G, 1), "prompt_mask": torch.ones(P * G, 1),
            "completion_ids": torch.zeros(P * G, T), "completion_mask": torch.tensor(mask.reshape(-1, T)).float(),
            "advantages": torch.tensor(advantage.reshape(-1)), "old_per_token_logps": torch.tensor(old.reshape(-1, T)),
            "ref_per_token_logps": torch.tensor(ref.reshape(-1, T)),
        }  # fmt: skip
        theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
        theirs.backward()

        def ours(x):
            weights = losses.token_weights(reduce, mask, G)
            return losses.policy_loss(
                x, old, ref, advantage[..., None], mask, weights,
                clip_low=LOW, clip_high=HIGH, beta_kl=BETA, ratio=ratio,
            )[0]  # fmt: skip

        value, slope = jax.value_and_grad(ours)(jnp.asarray(logp))
        close(value, theirs.item())
        close(slope, mine.grad.numpy().reshape(P, G, T))


def test_dpo():
    rng = np.random.default_rng(0)
    logp = (-rng.exponential(size=(2, P, T))).astype(np.float32)  # chosen, rejected
    ref = (logp.sum(-1) + rng.normal(size=(2, P))).astype(np.float32)
    mine = torch.tensor(logp.reshape(-1, T), requires_grad=True)
    trainer = mock.MagicMock(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"],
        loss_weights=[1.0], beta=0.1, aux_loss_enabled=False, use_weighting=False, accelerator=alone(),
        model=SimpleNamespace(training=False),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * P, T + 1, dtype=torch.long), "completion_mask": torch.ones(2 * P, T + 1),
        "ref_chosen_logps": torch.tensor(ref[0]), "ref_rejected_logps": torch.tensor(ref[1]),
    }  # fmt: skip
    zeros = torch.zeros(2 * P, T)
    outputs = SimpleNamespace(log_probs=mine, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    theirs.backward()

    def ours(x):
        score = x.sum(-1) - ref
        return losses.preference(score[0] - score[1], jnp.ones(P), 0.1, "beta").mean()

    value, slope = jax.value_and_grad(ours)(jnp.asarray(logp))
    close(value, theirs.item())
    close(slope, mine.grad.numpy().reshape(2, P, T))
