"""baselines/tune_vdt.py: the buffer by hand, what is sampled and relabelled, the rollout, resuming bit by bit."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import train_qt as qt
import train_vdt as vdt
import tune_vdt as tune
from conftest import ENV, argv, by_hand, call, data_of, write_hdf5
from test_qt import TINY as QT_TINY
from test_vdt import TINY

import evaluate_alignment as stage3
import train_qalign_dt as stage2

CPU = torch.device("cpu")
ONLINE = "--device cpu --env-steps 150 --updates 3 --eval-rollouts 1 --eval-every 2 --capacity 20".split()


def dataset(returns, lengths=None):
    """Episodes of these returns: all of it in the first reward; the observation is the episode's index."""
    lengths = np.array(lengths or [2] * len(returns))
    ends, N = np.cumsum(lengths), int(np.sum(lengths))
    rewards = np.zeros(N, np.float32)
    rewards[ends - lengths] = returns
    obs = np.repeat(np.arange(len(returns), dtype=np.float32), lengths)[:, None]
    terminals = np.isin(np.arange(N), ends - 1)
    return by_hand(obs, np.zeros((N, 1), np.float32), rewards, terminals, ends)


def trajectory(ret, length=2):
    reward = np.zeros(length, np.float32)
    reward[0] = ret
    return np.zeros((length, 1), np.float32), np.zeros((length, 1), np.float32), reward, False


def test_the_oldest_goes_first_and_that_is_the_worst_offline_one():
    buffer = tune.Buffer(dataset([5.0, 1, 9, 7]), capacity=3)
    contents = [[slot[2].sum() for slot in buffer.slots]]
    for ret in (2, 3, 4, 1):
        buffer.add(trajectory(ret))
        contents.append(sorted(slot[2].sum() for slot in buffer.slots))
    assert contents == [[5, 7, 9], [2, 7, 9], [2, 3, 9], [2, 3, 4], [1, 3, 4]]


def test_a_buffer_that_is_not_full_grows_first():
    buffer = tune.Buffer(dataset([5.0, 1]), capacity=3)
    for ret, expected in ((2, [1, 5, 2]), (3, [3, 5, 2]), (4, [3, 4, 2])):
        buffer.add(trajectory(ret))
        assert [slot[2].sum() for slot in buffer.slots] == expected


def test_every_stored_transition_starts_a_window_equally_often():
    offline = dataset([1.0, 2], [2, 6])
    data = tune.Buffer(offline, 5).dataset(offline)
    windows = stage2.Windows(data, 3, CPU)
    batch = windows.sample(80_000, torch.Generator().manual_seed(0))
    first = batch.valid.int().argmax(dim=1, keepdim=True)
    episode, t = batch.obs.gather(1, first[..., None]).squeeze(), batch.timestep.gather(1, first).squeeze(1)
    which = 2 * (episode > 0).long() + t + 4 * (episode > 0).long()
    share = torch.bincount(which)[torch.bincount(which) > 0] / 80_000
    assert len(share) == 8 and share.tolist() == pytest.approx([1 / 8] * 8, abs=0.005)


def test_tokens_say_what_was_collected_and_statistics_stay_offline():
    """Rewards 1, 2, 3: normalised RTG 0.006, 0.005, 0.003, whatever was asked for."""
    offline = dataset([1.0, 2])
    buffer = tune.Buffer(offline, 5)
    buffer.add((np.full((3, 1), 50, np.float32), np.zeros((3, 1), np.float32), np.array([1, 2, 3], np.float32), False))
    data = buffer.dataset(offline)
    assert (data.returns_to_go()[-3:] / 1000).tolist() == pytest.approx([0.006, 0.005, 0.003])
    assert data.obs_mean is offline.obs_mean and data.obs_std is offline.obs_std
    assert data.terminals.tolist() == [False, True, False, True, False, False, False]  # the new one was a timeout


class Asked(torch.nn.Module):
    """A policy that remembers the RTG, and acts by it."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def act(self, rtg, obs, act, timestep, valid):
        self.seen.append([x[0].clone() for x in (rtg, act, timestep, valid)])
        return torch.full((1, 3), 0.95)


def test_a_rollout_is_gymnasiums_and_its_noise_is_clipped():
    offline = data_of("hopper-mini")
    policy, generator = Asked(), torch.Generator().manual_seed(1)
    config = SimpleNamespace(context_len=3, max_timestep=4)  # a rollout may outlast the times that were trained
    obs, act, reward, terminal = tune.run_episode(policy, config, 500.0, offline, 7, noise=0.1, generator=generator)
    env = stage2.make_env("Hopper-v4")
    observation, total = env.reset(seed=7)[0], 0.0
    for t in range(len(reward)):
        assert np.allclose(obs[t], observation, atol=1e-5)
        assert policy.seen[t][0][-1].item() == pytest.approx((500 - total) / 1000, abs=1e-6)
        observation, r, terminated, _, _ = env.step(act[t].astype(np.float64))
        total += r
        assert reward[t] == pytest.approx(r, rel=1e-5) and terminated == (t == len(reward) - 1)
    assert terminal and act.max() == 1.0 and 0.05 < np.std(act) < 0.15
    rtg, actions, timestep, valid = policy.seen[1]
    assert valid.tolist() == [False, True, True] and timestep.tolist() == [0, 0, 1]
    assert actions[1].tolist() == act[0].tolist() and not actions[2].any()
    assert max(timestep.max() for _, _, timestep, _ in policy.seen) == 3


def test_collected_episodes_may_be_longer_than_the_trained_times(monkeypatch):
    offline = dataset([1.0, 2], [2, 9])
    sizes = dict(embed_dim=8, n_layer=1, n_head=1, context_len=3, batch_size=64, critic_width=8, actor_lr=1e-3)
    config = tune.Config(seed=1, bf16=False, max_timestep=4, conv=False, dropout=0.0, **sizes)
    policy = stage2.make_policy(offline.task, vars(config), False)
    learner = tune.Tuning(offline.task, config, dict(policy=policy.state_dict(), stage="train_qalign_dt"), CPU)
    learner.round(offline, 1, 1e-3)  # with times up to 8 it would index beyond the embedding


@pytest.mark.parametrize("best, request_, asked", [(100, 1.2, 120), (-100, 1.2, -80), (-100, 1, -100), (0, 1.2, 0)])
def test_more_than_the_best_is_asked_for_also_below_zero(best, request_, asked):
    assert tune.asked_return(best, request_) == pytest.approx(asked)


# ---- files and command lines


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, hopper_file):
    runs = tmp_path_factory.mktemp("tune")
    assert call(vdt, *argv(hopper_file, runs, *TINY))[0] == 0
    code, out, err = call(tune, *argv(hopper_file, runs, *ONLINE))
    assert code == 0, err
    return runs, out


def test_it_collects_learns_and_reports(tuned, run_main, tmp_path):
    runs, out = tuned
    folder = runs / f"{ENV}__tune_vdt__1"
    rows = [line.split(",") for line in (folder / "online.csv").read_text().split()]
    assert rows[0] == ["step", "episodes", "collected_score", "score"]
    assert int(rows[-1][0]) >= 150 and [int(row[1]) for row in rows[1:]] == list(range(len(rows) - 1))
    assert "before" in out and "after" in out and f"{int(rows[-1][0]):,} steps" in out
    old, new = (torch.load(runs / f"{ENV}__{x}__1" / "policy.pt", weights_only=True) for x in ("train_vdt", "tune_vdt"))
    for part in ("policy", "critic", "value"):
        assert any(not torch.equal(x, old[part][name]) for name, x in new[part].items()), part
    assert new["model"] is None and torch.equal(new["obs_mean"], old["obs_mean"])
    (copy := tmp_path / "policy.pt").write_bytes((folder / "policy.pt").read_bytes())
    code, _, err = run_main(stage3, "--checkpoint", copy, "--rollouts", 1, "--device", "cpu")
    assert code == 0 and stage3.load_policy(copy, "fp32", CPU).identity()["method"] == "VDT, tuned online", err


def test_killed_and_resumed_ends_with_the_same_bits(tuned, run_main, hopper_file, tmp_path, monkeypatch):
    runs, _ = tuned
    source = runs / f"{ENV}__train_vdt__1" / "policy.pt"
    flags = argv(hopper_file, tmp_path, *ONLINE, "--checkpoint", source, "--checkpoint-minutes", 0)
    with monkeypatch.context() as m:
        step, calls = tune.Tuning.round, []

        def killed(self, *args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            step(self, *args)

        m.setattr(tune.Tuning, "round", killed)
        assert run_main(tune, *flags)[0] == 130
    code, _, err = run_main(tune, *flags)
    assert code == 0, err
    for name in ("policy.pt", "resume.pt"):
        ours, whole = (torch.load(f / f"{ENV}__tune_vdt__1" / name, weights_only=True) for f in (tmp_path, runs))
        for part in ("policy", "critic", "value"):
            assert all(torch.equal(x, whole[part][key]) for key, x in ours[part].items()), (name, part)
    slots = ours["buffer"]["slots"], whole["buffer"]["slots"]
    assert all(torch.equal(x[2], y[2]) for x, y in zip(*slots)) and len(slots[0]) == len(slots[1])


def test_a_dt_is_tuned_by_imitation_alone(pipeline, run_main, hopper_file, tmp_path):
    code, out, err = run_main(tune, *argv(hopper_file, tmp_path, *ONLINE, "--checkpoint", pipeline.dt))
    assert code == 0 and ": DT of " in out, err
    new = torch.load(tmp_path / f"{ENV}__tune_vdt__1" / "policy.pt", weights_only=True)
    assert new["config"]["method"] == "DT, tuned online" and new["critic"] is None


def test_data_of_negative_returns_only(run_main, hopper_arrays, tmp_path):
    """As halfcheetah-random-v2's: VDT and QT train, VDT is tuned."""
    obs, act, rewards, terminals, timeouts = hopper_arrays
    file = write_hdf5(tmp_path / "negative.hdf5", obs, act, -1 - np.abs(rewards), terminals, timeouts)
    for script, flags in ((vdt, TINY), (tune, ONLINE[:-2]), (qt, [*QT_TINY, "--critic", "none"])):
        code, out, err = run_main(script, *argv(file, tmp_path, *flags))
        assert code == 0, out + err


def test_an_antmaze_is_tuned_too(run_main, antmaze_arrays, tmp_path):
    file = write_hdf5(tmp_path / "antmaze.hdf5", *antmaze_arrays)
    with h5py.File(file, "a") as f:
        f.attrs["max_episode_steps"] = 40
    own = ["--env", "antmaze-umaze-tiny", "--dataset-path", file, "--runs-dir", tmp_path]
    assert run_main(vdt, *own, *TINY)[0] == 0
    code, _, err = run_main(tune, *own, *ONLINE, "--env-steps", 1, "--eval-every", 0)
    assert code == 0, err
    content = torch.load(tmp_path / "antmaze-umaze-tiny__tune_vdt__1" / "resume.pt", weights_only=True)
    obs, _, rewards, terminal = content["buffer"]["slots"][0]
    assert obs.shape[1] == 29 and len(rewards) <= 40 and terminal == (rewards[-1] > 0)


def test_bad_input_is_one_line(tuned, pipeline, run_main, hopper_file, tmp_path):
    whole = torch.load(tuned[0] / f"{ENV}__train_vdt__1" / "policy.pt", weights_only=True)
    for name in ("policy", "critic", "value"):
        torch.save(whole | {name: {key: x[..., :-1] for key, x in whole[name].items()}}, tmp_path / f"{name}.pt")
    damaged = [(["--checkpoint", tmp_path / f"{name}.pt"], name) for name in ("policy", "critic", "value")]
    for flags, said in (
        *damaged,
        (["--checkpoint", pipeline.policy], "of Q-Align DT"),
        (["--checkpoint", tmp_path / "none.pt"], "No such file"),
        (["--env", "hopper-expert-tiny", "--checkpoint", pipeline.dt], "was trained on --env"),
        (["--env-steps", "0"], "--env-steps"),
    ):
        code, out, err = run_main(tune, *argv(hopper_file, tmp_path / "runs", *ONLINE, *flags))
        runs = [p.name for p in (tmp_path / "runs").glob("*")]
        assert code == 2 and said in out + err and all(name.endswith("__data") for name in runs), (said, err)
