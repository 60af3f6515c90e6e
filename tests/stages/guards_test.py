"""Guards: updates that are not finite, warnings, stops, replay; the loop on a stage that takes no time."""

import os
import pathlib
import re
import signal

import jax
import numpy as np
import pytest
from helpers.stand_in_stage import batch_of, fresh, run, stage, update

from drirl_jax import config as config_lib
from drirl_jax.runtime import lock, metrics, preemption
from drirl_jax.stages import guards
from drirl_jax.types import InputError


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=str)  # the last: the loss overflows, and so the gradient
def test_an_update_that_is_not_finite_is_left_out_and_counted(bad):
    before, _ = update(fresh(), batch_of(0))
    spoilt = batch_of(1)
    spoilt["x"][3, 1] = bad
    left_out, scalars = update(before, spoilt)
    for name in ("params", "opt_state", "step"):
        jax.tree.map(np.testing.assert_array_equal, getattr(left_out, name), getattr(before, name))
    assert (int(left_out.skipped), int(left_out.skipped_in_a_row)) == (1, 1) and not np.isfinite(float(scalars["loss"]))
    after, _ = update(left_out, batch_of(2))
    want, _ = update(before, batch_of(2))
    jax.tree.map(np.testing.assert_array_equal, after[:3], want[:3])
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)


def test_a_step_left_out_is_told_and_the_run_goes_on(tmp_path):
    state = run(tmp_path, stage(bad=(2, 5)))
    assert [row["skipped"] for row in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 1, 1, 2, 2]
    assert int(state.train.step) == 4 and np.isfinite(state.train.params["w"]).all()


def test_several_in_a_row_stop_the_run_and_the_last_can_be_run_again(tmp_path):
    with pytest.raises(InputError, match="stopped at step 4 of align: .* not finite 2 times in a row") as stop:
        run(tmp_path, stage(bad=(3, 4, 5)), skips=2)
    folder = tmp_path / "replay" / "align-4"
    assert f"--replay={folder}" in str(stop.value)
    rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["loss"] is None
    step, scalars = guards.replay_step(
        folder, stage()
    )  # what it collects now is finite: the batch kept is the one updated
    assert step == 4 and np.isnan(scalars["loss"])
    with pytest.raises(InputError, match="stopped at step 4"):  # started again, it finds the same
        run(tmp_path, stage(bad=(3, 4, 5)), skips=2)
    run(tmp_path, stage(bad=(3, 4, 5)), skips=4)  # a limit may be changed
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl")[-1]["skipped"] == 3
    with pytest.raises(InputError, match="no step was kept in"):
        guards.replay_step(tmp_path / "nowhere", stage())


def test_the_count_in_a_row_goes_on_after_a_kill(tmp_path):
    bad = (2, 3, 4)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, stage(bad=bad)._replace(evaluate=lambda state, step: 1 / 0 if step == 3 else {}), skips=3)
    with pytest.raises(InputError, match="stopped at step 4 of align"):
        run(tmp_path, stage(bad=bad), skips=3)


def test_warnings_come_once_for_each_crossing_also_after_a_restart(tmp_path, caplog):
    kl, reward = [0.1, 2.0, 3.0, 0.2, 4.0, 4.0], [1.0, 0.0, 6.0, 6.0, 1.0, 1.0]
    run(tmp_path, stage(3, kl=kl, reward=reward))
    run(tmp_path, stage(6, kl=kl, reward=reward))
    told = re.findall(r"step (\d) of align: the (KL|mean reward)", caplog.text)
    assert told == [("2", "KL"), ("3", "mean reward"), ("5", "KL")]


def test_where_metrics_are_older_than_the_checkpoint_their_steps_are_done_again(tmp_path, caplog):
    whole = run(tmp_path / "whole", stage())
    run(tmp_path / "old", stage())
    file = tmp_path / "old" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]))  # checkpoints are of the steps 4 and 6
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "old", stage()), whole)
    assert file.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert "metrics.jsonl lacks step 6 of align" in caplog.text and "put aside" in caplog.text
    for broken in ("", "".join(lines[1:]), "".join(lines[:1] + lines[2:])):
        file.write_text(broken)
        with pytest.raises(InputError, match=r"metrics.jsonl lacks step [12] of align, which it has done.* put whole"):
            run(tmp_path / "old", stage())
    file.write_text("".join(lines[:3]) + "{torn\n" + "".join(lines[3:]))
    with pytest.raises(InputError, match="metrics.jsonl, line 4 is damaged"):
        run(tmp_path / "old", stage())


def test_lost_times_and_samples_are_told_of(tmp_path, caplog):
    run(tmp_path, stage())
    (tmp_path / "timing.jsonl").unlink()
    run(tmp_path, stage(8))
    assert "timing.jsonl lacks 6 steps that are done (1, 2, 3, 4, 5, ...)" in caplog.text
    assert "samples.jsonl lacks" in caplog.text


def test_log_probabilities_that_differ_and_rewards_that_are_not_finite_stop_the_run():
    limits = config_lib.default().guards
    fine = {"skipped_in_a_row": 0.0, "sampler_gap": 0.09}
    assert guards.stop_reason(limits, fine) is None and guards.stop_reason(limits, {"skipped_in_a_row": 4.0}) is None
    assert "differ from the sampler's by 0.11 nats" in guards.stop_reason(limits, fine | {"sampler_gap": 0.11})
    told = guards.stop_reason(limits, {"skipped_in_a_row": 5.0, "bad_rewards": 2.0})
    assert told.startswith("2 rewards are not finite") and "irl.optimizer.learning_rate" in told


# ---------------------------------------------------------------------------------------------- the process


def test_sigterm_keeps_the_step_that_is_done(tmp_path):
    def signalled(state, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preemption.Preempted, match="step 3 of align is kept"):
        run(tmp_path / "left", stage()._replace(evaluate=signalled))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "left" / "checkpoints" / "align" / "3").is_dir()
    found, want = run(tmp_path / "left", stage()), run(tmp_path / "whole", stage())
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert (tmp_path / "left" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_workdir_is_one_run_s(tmp_path):
    held = lock.acquire(tmp_path / "run")
    with pytest.raises(InputError, match="another run is at work in .*run: wait until it has ended"):
        lock.acquire(tmp_path / "run")
    held.close()
    lock.acquire(tmp_path / "run").close()


def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in ("/proc/run", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="the workdir .*run cannot be written .*: take another --workdir"):
            lock.acquire(pathlib.Path(workdir))


# ---------------------------------------------------------------------------------------------- what learns nothing


def test_a_stage_whose_updates_were_all_left_out_has_no_product(tmp_path):
    sentence = "all 3 updates of align were left out, .* not finite: nothing was learned; lower config.align"
    for _ in range(2):  # started again, it says the same
        with pytest.raises(InputError, match=sentence):
            run(tmp_path, stage(3, bad=(1, 2, 3)))
    state = run(tmp_path / "once", stage(3, bad=(1, 2)))
    assert int(state.train.step) == 1


def rows(count=4, **scalars):
    return [{"stage": "align", "step": step + 1} | scalars for step in range(count)]


def test_signs_that_nothing_was_learned():
    config = config_lib.default()
    for scalars, words in {
        ("grad_norm", 0.0): "no update had a gradient",
        ("zero_spread", 1.0): "all samples of a prompt have one reward",
        ("advantage_abs", 0.0): "every advantage is 0",
        ("pairs", 0.0): "no pair of responses says anything",
    }.items():
        name, value = scalars
        (told,) = guards.idle(config, "align", rows(**{name: value}))
        assert told.startswith("align seems to have learned nothing: ") and words in told
        assert not guards.idle(config, "align", rows(**{name: value}) + rows(1, **{name: 0.5}))
        assert not guards.idle(config, "align", rows(**{name: None})) and not guards.idle(config, "align", [])
    # One sample a prompt, or values instead of groups: equal rewards within a prompt are no sign.
    for changes in ({"objective": "ppo"}, {"group_size": 1}):
        other = config_lib.default()
        other.align.update(changes)
        assert not guards.idle(other, "align", rows(zero_spread=1.0))
    for accuracy, count in ((0.5, 1), (0.51, 0)):
        assert len(guards.idle(config, "irl", [{"accuracy": 1.0}, {"accuracy": accuracy}, {"loss": 1.0}])) == count
    config.irl.rounds, config.irl.policy_steps, config.align.epochs = 3, 4, 2
    (told,) = guards.idle(config, "irl", [{"inner_skipped": 15.0}, {"inner_skipped": 16.0}])
    assert "updates of the inner policy were left out" in told


def test_what_learned_nothing_is_warned_of_once(tmp_path, caplog):
    def idle(state, step):
        return {"zero_spread": 1.0}

    for _ in range(2):  # the second start finds the stage done
        run(tmp_path, stage(4)._replace(evaluate=idle))
    told = [record.message for record in caplog.records if "learned nothing" in record.message]
    assert len(told) == 1 and "one reward" in told[0]
