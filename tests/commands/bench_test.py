"""The bench: its operation counts against counting by hand, and a run on a tiny model through the command."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import commands

from drirl_jax.commands import bench
from drirl_jax.costs import roofline
from drirl_jax.models.transformer import Config
from drirl_jax.stages.base import SharedLayers

ROOT = pathlib.Path(__file__).parents[2]


def test_forward_operations_by_hand():
    # Width 2, one layer, 2 heads of 1, 1 key head, MLP 3, vocabulary 5. Weights: q 2x2, k and v 1x2 each, o 2x2, MLP
    # 3 x 6: 30. One prompt of 2 tokens, 2 responses of 3 (2 fed): 6 positions. Predicted: 1 + 2·2 = 5 tokens.
    # Pairs: prompt 1 + 2; each response sees 3 and 4 keys: 3 + 2·7 = 17.
    model = Config(vocab=5, width=2, layers=1, heads=2, kv_heads=1, head_dim=1, ffn=3)
    shape = roofline.Shape(P=1, S=2, G=2, T=3)
    assert roofline.forward_flops(model, shape) == 2 * 30 * 6 + 2 * 2 * 5 * 5 + 4 * 2 * 1 * 17
    assert roofline.forward_flops(model, shape, logits=False) == 2 * 30 * 6 + 4 * 2 * 1 * 17
    # Two prompts and a prefix of 2 tokens: 14 positions; pairs 1 + 2, a prompt 3 + 4, a response 5 and 6, twice each.
    two = shape._replace(P=2, R=2)
    assert roofline.forward_flops(model, two, logits=False) == 2 * 30 * 14 + 4 * 2 * 1 * (3 + 2 * (7 + 2 * 11))


def test_the_floor_takes_the_slower_of_operations_and_bytes():
    model = Config(vocab=5, width=2, layers=1, heads=2, kv_heads=1, head_dim=1, ffn=3)
    shape, size = roofline.Shape(P=1, S=2, G=2, T=3), 50
    quick, slow = roofline.Machine(flops=1e3, bandwidth=1e30), roofline.Machine(flops=1e30, bandwidth=1e3)
    forward = roofline.forward_flops(model, shape) / 1e3
    full = roofline.floor(model, shape, quick, size=size, tuned=size)
    np.testing.assert_allclose([full["rollout"], full["reference"], full["update"]], [forward, forward, 3 * forward])
    np.testing.assert_allclose(roofline.floor(model, shape, quick, size=size, tuned=4)["update"], 2 * forward)
    # Two demonstrations more to learn from are two responses more.
    more = roofline.floor(model, shape, quick, size=size, tuned=size, trained=2)["update"]
    np.testing.assert_allclose(more, 3 * roofline.forward_flops(model, shape._replace(G=4)) / 1e3)
    # Where the rewards leave the only layer as it is, the group passes it once, for them and for the reference; a
    # policy that is tuned whole does not take part.
    once = roofline.floor(
        model, shape, quick, size=size, tuned=size, shared=SharedLayers(1, policy=False, rewards=True)
    )
    alone = roofline.floor(model, shape, quick, size=size, tuned=size)
    assert once["trunk"] == alone["rewards"] and once["rewards"] == 0 and once["update"] == alone["update"]
    np.testing.assert_allclose(once["reference"], 2 * 2 * 5 * 5 / 1e3)  # the logits
    # Weights for each of 3 tokens; keys and values of 1 x 1, 4 bytes each, of the 2 · 7 pairs; AdamW moves 7 floats.
    bound = roofline.floor(model, shape, slow, size=size, tuned=size)
    np.testing.assert_allclose(bound["rollout"], (4 * 50 * 3 + 8 * 14) / 1e3)
    np.testing.assert_allclose(bound["update"], 28 * 50 / 1e3)
    # In bfloat16 sampling reads half, and what is trained is float32 all the same.
    half = roofline.floor(model._replace(dtype="bfloat16"), shape, slow, size=size, tuned=size)
    np.testing.assert_allclose([half["rollout"], half["update"]], [bound["rollout"] / 2, bound["update"]])


def test_the_command(policy, tmp_path):
    file = tmp_path / "bench.json"
    arguments = [f"--config={ROOT / 'configs/tiny.py'}", f"--config.policy.init={policy}", "--steps=1", "--shape=S=50"]
    command = [sys.executable, "-m", "drirl_jax.commands.bench", *arguments, f"--json={file}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(file.read_text())
    assert result["shape"] == {"P": 8, "S": 50, "G": 4, "T": 12, "R": 0}
    for phase in (*bench.PHASES, "step"):
        assert result["seconds"][phase] > 0 and phase in done.stdout


@pytest.mark.slow
def test_growth_on_a_tiny_model(policy):
    arguments = [f"--config={ROOT / 'configs/tiny.py'}", f"--config.policy.init={policy}", "--steps=1"]
    command = [sys.executable, "-m", "drirl_jax.commands.bench", *arguments, "--shape=S=50,T=4", "--grow=C=8,16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][0] == "C" and [row[0] for row in rows[1:]] == ["8", "16", "exponent"]


def test_exponents():
    np.testing.assert_allclose(bench.exponent([1, 2, 8], [3.0, 12.0, 192.0]), 2)


@pytest.mark.parametrize("flag", ["--shape=Q=3", "--shape=S=-3", "--grow=4,8", "--grow=G=4", "--grow=G=2,T=4"])
def test_bad_shapes_are_refused_with_a_sentence(flag):
    arguments = [f"--config={ROOT / 'configs/tiny.py'}", flag]
    commands.refused("^drirl_jax: --", bench, *arguments)
