"""Stage 0: SAC's losses, episodes equal to Gymnasium's own stepping, what is recorded, resume, bad arguments."""

import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import collect_dataset as stage0
import gymnasium
import h5py
import numpy as np
import pretrain_q as stage1
import pytest
import torch
from conftest import TINY1

ROOT = Path(stage0.__file__).parent
SMALL = dict(START=400, EVAL_EVERY=600, LOG_EVERY=200, WIDTH=32, BATCH=32, EVAL_EPISODES=3)
ALL = ("random", "medium-replay", "medium", "expert", "medium-expert", "mini")
SMALL_RUN = ["--total-steps", 1800, "--transitions", 700]


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(stage0, name, value)


# ---- environments ----


def with_time_limit(env_id):
    with warnings.catch_warnings(action="ignore"):  # v4 is out of date
        return gymnasium.make(env_id)


def gymnasium_episode(env, seed, actions):
    """Observations before and after, rewards, terminated, truncated, of Gymnasium's own stepping through `actions`."""
    steps = [(env.reset(seed=seed)[0],)]
    for action in actions:
        steps.append(env.step(action)[:4])
    return [x[0] for x in steps], *[np.array([x[k] for x in steps[1:]]) for k in (1, 2, 3)]


@pytest.mark.parametrize(
    "env_id, steps",
    [
        ("Hopper-v4", 60),
        ("HalfCheetah-v4", 1010),
        ("Walker2d-v4", 60),
        ("Ant-v4", 40),
        ("Reacher-v5", 120),
        ("InvertedPendulum-v5", 60),
    ],
)
def test_episodes_equal_gymnasiums_own_stepping(env_id, steps):
    """Lockstep bodies and gymnasium.vector alike: every row is what reset(seed) and step return, ends set apart."""
    n, first_seed = 3, 10**18 + 7
    rng, envs = np.random.default_rng(0), stage0.Episodes(env_id, n, first_seed)
    low, high = envs.low, envs.high
    blocks = [envs.step(rng.uniform(low, high, (n, len(low))).astype(np.float32)) for _ in range(steps)]
    last_obs = np.array(envs.obs, np.float32)
    rows = np.stack(blocks)  # (T, n)
    reference = with_time_limit(env_id)
    ended = 0
    for i in range(n):
        for k in dict.fromkeys(rows["episode"][:, i].tolist()):
            mine = rows[rows["episode"][:, i] == k, i]
            obs, reward, terminated, truncated = gymnasium_episode(reference, first_seed + k, mine["actions"])
            width = len(obs[0])  # Ant is padded by zeros
            np.testing.assert_allclose(mine["observations"][:, :width], obs[:-1], rtol=1e-6, atol=1e-6)
            assert not mine["observations"][:, width:].any()
            np.testing.assert_allclose(mine["rewards"], reward, rtol=1e-5, atol=1e-6)
            assert (mine["terminals"] == terminated).all() and (mine["timeouts"] == (truncated & ~terminated)).all()
            assert not (mine["terminals"] | mine["timeouts"])[:-1].any()
            ended += bool(mine["terminals"][-1] or mine["timeouts"][-1])
            if k == envs.number[i]:
                np.testing.assert_allclose(last_obs[i, :width], obs[-1], rtol=1e-6, atol=1e-6)
    assert ended >= (0 if env_id == "Ant-v4" else 2)
    assert rows["timeouts"].any() == (env_id in ("HalfCheetah-v4", "Reacher-v5"))
    assert sorted(np.unique(rows["episode"])) == list(range(rows["episode"].max() + 1))
    envs.close()


@pytest.mark.parametrize("env_id, steps", [("Hopper-v4", 45), ("InvertedPendulum-v5", 23), ("Reacher-v5", 50)])
def test_replay_brings_the_environments_back(env_id, steps):
    """From the recorded rows alone; every later step is then the same. Reacher: all episodes end in the last row."""
    rng, one = np.random.default_rng(1), stage0.Episodes(env_id, 4, 99)
    actions = rng.uniform(one.low, one.high, (steps + 30, 4, len(one.low))).astype(np.float32)
    rows = np.stack([one.step(a) for a in actions[:steps]])
    two = stage0.Episodes(env_id, 4, 99)
    two.replay(rows)
    assert (one.number == two.number).all() and (one.t == two.t).all() and one.begun == two.begun
    for a in actions[steps:]:
        assert (one.step(a) == two.step(a)).all()


class Echo(gymnasium.Env):
    """Observes its last action; refuses one outside bounds that do not contain 0 and are float64."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(0.1, 0.7, (2,), np.float64)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2, 6))
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert (action >= 0.1).all() and (action <= 0.7).all()
        self.left -= 1
        return np.asarray(action), 0.0, self.left == 0, False, {}


def test_what_is_recorded_is_what_was_played_in_an_environment_of_other_bounds():
    gymnasium.register("Echo-v0", Echo, max_episode_steps=4)
    rng, one = np.random.default_rng(0), stage0.Episodes("Echo-v0", 3, 5)
    assert one.low.dtype == np.float32 and np.allclose(one.low, 0.1) and np.allclose(one.high, 0.7)
    rows = np.stack([one.step(one.low + (one.high - one.low) * rng.random((3, 2), np.float32)) for _ in range(9)])
    goes_on = ~(rows["terminals"] | rows["timeouts"])[:-1]
    assert (rows["actions"][:-1][goes_on] == rows["observations"][1:][goes_on]).all() and goes_on.any()
    assert rows["terminals"].any() and rows["timeouts"].any()
    two = stage0.Episodes("Echo-v0", 3, 5)
    two.replay(rows)  # waiting environments too are only played what they allow
    actions = np.full((3, 2), 0.5, np.float32)
    assert (one.step(actions) == two.step(actions)).all()
    gymnasium.registry.pop("Echo-v0")


# ---- SAC ----


def agent_and_batch(batch=16):
    torch.manual_seed(0)
    low, high = np.array([-0.5, -2.0], np.float32), np.array([0.5, 1.0], np.float32)
    agent = stage0.Agent(3, low, high)
    obs, following = torch.randn(2, batch, 3)
    act = torch.rand(batch, 2) - 0.5
    flags = torch.zeros(2, batch, dtype=torch.bool)
    return agent, stage0.Batch(obs, act, torch.randn(batch), *flags, following)


def test_the_actors_density_is_that_of_a_squashed_gaussian():
    agent, batch = agent_and_batch()
    actor = agent.actor
    act, log_pi = actor(batch.obs, torch.Generator().manual_seed(3))
    mean, log_std = actor.net(batch.obs).chunk(2, dim=-1)
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(gaussian, torch.distributions.TanhTransform())
    unstretched = (act - actor.middle) / actor.scale
    torch.testing.assert_close(log_pi, squashed.log_prob(unstretched).sum(-1), rtol=1e-3, atol=1e-3)
    assert (act.detach().numpy() <= [0.5, 1.0]).all() and (act.detach().numpy() >= [-0.5, -2.0]).all()
    assert np.allclose(actor.act(batch.obs.numpy(), None), (actor.middle + actor.scale * mean.tanh()).detach())
    assert not np.allclose(actor.act(batch.obs.numpy(), torch.Generator()), actor.act(batch.obs.numpy(), None))


def test_critic_loss_by_hand():
    agent, batch = agent_and_batch(3)
    with torch.no_grad():
        agent.log_alpha.fill_(-1.0)
        for p in agent.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch.terminal[1], batch.timeout[2] = True, True
    loss, q_mean = stage0.critic_loss(agent, batch, torch.Generator().manual_seed(5))
    with torch.no_grad():
        act, log_pi = agent.actor(batch.next_obs, torch.Generator().manual_seed(5))
        q_next, q = agent.target_critic(batch.next_obs, act), agent.critic(batch.obs, batch.act)
    y0 = batch.reward[0] + 0.99 * (min(q_next[0, 0], q_next[1, 0]) - np.exp(-1) * log_pi[0])
    expected = (
        sum((q[m, 0] - y0) ** 2 + (q[m, 1] - batch.reward[1]) ** 2 for m in range(2)) / 3
    )  # the timeout is left out
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(q_mean, q[0].mean())
    loss.backward()
    assert all(p.grad is None for p in [*agent.actor.parameters(), agent.log_alpha])


def test_actor_and_temperature_move_the_right_way():
    agent, batch = agent_and_batch(64)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    opt = torch.optim.Adam(agent.actor.parameters(), lr=1e-2)
    before = stage0.actor_loss(agent, batch, seeded())[0].item()
    act, log_pi = agent.actor(batch.obs, seeded())
    by_hand = (agent.log_alpha.exp() * log_pi - agent.critic(batch.obs, act).min(dim=0).values).mean()
    assert before == pytest.approx(by_hand.item(), rel=1e-5)
    for _ in range(10):
        stage0.descend(opt, stage0.actor_loss(agent, batch, seeded())[0])
    assert stage0.actor_loss(agent, batch, seeded())[0].item() < before and agent.log_alpha.grad is None
    for log_pi, up in ((2.0 + 1, True), (2.0 - 1, False)):  # entropy -log_pi below and above its target, -2
        agent.log_alpha.grad = None
        stage0.temperature_loss(agent, torch.tensor(log_pi)).backward()
        assert (agent.log_alpha.grad < 0) == up


def test_a_batch_pairs_each_transition_with_its_environments_next():
    row = np.dtype(
        [("observations", "f4", (1,)), ("actions", "f4", (1,)), ("rewards", "f4"), ("terminals", bool), ("timeouts", bool), ("episode", "i4")]
    )  # fmt: skip
    replay = np.zeros(60, row)
    replay["observations"][:, 0] = np.arange(60)
    replay["observations"][50:] = np.nan  # not yet filled
    batch = stage0.sample_batch(replay, 50, 7, torch.Generator().manual_seed(0))
    assert torch.equal(batch.next_obs, batch.obs + 7) and {0.0, 42.0} <= set(batch.obs[:, 0].tolist())


def test_main_makes_one_gradient_step_of_everything_per_environment_step(tmp_path, small, run_main, monkeypatch):
    """... after START; the target critic then moves by TAU."""
    monkeypatch.chdir(tmp_path)
    calls, real = {"critic_loss": 0, "actor_loss": 0, "temperature_loss": 0}, stage0.ema_update

    def counted(name):
        inner = getattr(stage0, name)

        def call(*args):
            calls[name] += 1
            return inner(*args)

        monkeypatch.setattr(stage0, name, call)

    for name in list(calls):
        counted(name)
    seen = []

    def moved(target, online, tau):
        before = [p.clone() for p in target.parameters()]
        real(target, online, tau)
        seen.append(
            all(
                torch.allclose(p, 0.995 * b + 0.005 * q, atol=1e-6)
                for p, b, q in zip(target.parameters(), before, online.parameters(), strict=True)
            )
        )

    monkeypatch.setattr(stage0, "ema_update", moved)
    code, _, err = run_main(stage0, "--total-steps", 600, "--transitions", 50, "--qualities", "random")
    assert code == 0 and len(seen) == 200 and all(seen) and set(calls.values()) == {200}, (err, calls)
    agent = run_state(tmp_path)[0]["agent"]
    for part in ("critic", "target_critic"):
        assert not torch.equal(agent[f"{part}.q1.0.weight"], agent[f"{part}.q2.0.weight"])


# ---- what is recorded ----


def test_levels_by_hand():
    assert stage0.choose_levels({0: 100, 5: 320, 10: 420, 15: 1000, 20: 990}, None) == dict(
        random=0, medium=10, expert=15
    )
    assert stage0.choose_levels({0: 987, 5: 620, 10: 1700, 15: 4500}, None) == dict(
        random=0, medium=10, expert=15
    )  # Ant
    assert stage0.choose_levels({0: -45, 5: -40, 10: -30, 15: -6}, None) == dict(random=0, medium=10, expert=15)
    assert stage0.choose_levels({0: -45, 5: -60, 10: -50}, None) == dict(random=0, medium=10, expert=10)
    assert stage0.choose_levels({0: 100, 5: 390, 10: 420}, 380) == dict(random=0, medium=5, expert=10)
    assert stage0.choose_levels({0: 1000, 5: 390, 10: 420}, 500) == dict(random=0, expert=10)  # untrained is no level


RUNNING = types.SimpleNamespace(requested=False)


class Constant:
    """A policy that plays 0, the same in every state; an evaluation gives it no noise, a recording does."""

    evaluated = False

    def act(self, obs, generator):
        assert (generator is None) == self.evaluated
        return np.zeros((len(obs), 3), np.float32)


def test_recorded_episodes_are_the_first_to_begin_not_the_first_to_end(monkeypatch):
    """Of environments whose episodes last 1, 2, 3, 4, 1, 2, ... steps."""

    class Counting:
        def __init__(self, env_id, n, seed):
            self.number, self.t, self.begun, self.obs = np.arange(n), np.zeros(n, int), n, np.zeros((n, 1))

        def step(self, actions):
            rows = np.zeros(
                len(self.t), [("episode", "i4"), ("rewards", "f4"), ("terminals", bool), ("timeouts", bool)]
            )
            rows["episode"], rows["rewards"] = self.number, self.t
            self.t += 1
            rows["terminals"] = ended = self.t == self.number % 4 + 1
            for i in np.flatnonzero(ended):
                self.number[i], self.t[i], self.begun = self.begun, 0, self.begun + 1
            return rows

        def close(self):
            pass

    monkeypatch.setattr(stage0, "Episodes", Counting)
    args = stage0.Args()
    for minimum, whole in ((1, 1), (2, 2), (3, 2), (4, 3), (10, 4), (11, 5), (25, 11)):
        monkeypatch.setattr(stage0, "HORIZON", 4)
        rows = stage0.record(Constant(), args, 5, RUNNING, transitions=minimum)
        assert rows["episode"].tolist() == [k for k in range(whole) for _ in range(k % 4 + 1)]
        assert rows["rewards"].tolist() == [t for k in range(whole) for t in range(k % 4 + 1)]
    monkeypatch.setattr(Constant, "evaluated", True)
    assert stage0.record(Constant(), args, None, RUNNING, episodes=3)["episode"].tolist() == [0, 1, 1, 2, 2, 2]


def test_spread_evenly_takes_from_every_bin_in_turn(monkeypatch):
    monkeypatch.setattr(stage0, "MINI_BINS", 4)
    rng = np.random.default_rng(0)
    returns = rng.permutation(
        np.concatenate([rng.uniform(0, 25, 300), rng.uniform(25, 50, 20), rng.uniform(50, 100, 40)])
    )
    returns = np.append(returns, [0.0, 100.0])
    rows = np.zeros(2 * len(returns), [("rewards", "f4"), ("terminals", bool), ("timeouts", bool), ("k", "i4")])
    rows["rewards"] = np.repeat(returns / 2, 2)
    rows["k"] = np.repeat(np.arange(len(returns)), 2)
    rows["terminals"][1::4], rows["timeouts"][3::4] = True, True
    chosen = stage0.spread_evenly(rows, 2 * 40 + 1)
    found = stage0.episode_returns(chosen)
    assert len(chosen) == 80 and np.histogram(found, 4, (0, 100))[0].tolist() == [10, 10, 10, 10]
    assert (np.diff(chosen["k"])[1::2] > 0).all() and (np.diff(chosen["k"])[::2] == 0).all()  # whole, in order
    assert len(stage0.spread_evenly(rows, 1)) == 0


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Every quality of a small Hopper run; the files, the run folder, and what was printed."""
    folder = tmp_path_factory.mktemp("collected")
    result = subprocess.run(small_command(folder), capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def small_command(cwd, *extra):
    """collect_dataset.py's main with SMALL constants, as a process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import collect_dataset as c\nvars(c).update({SMALL!r}); c.main()"
    return [sys.executable, "-c", code, *map(str, [*SMALL_RUN, "--qualities", *ALL, *extra])]


def test_every_quality_is_written_and_stage_1_reads_it_back(collected, run_main, tmp_path):
    folder, result = collected
    evaluations = (folder / "runs/Hopper-v4__collect_dataset__1/evaluations.csv").read_text().split()
    assert [line.split(",")[0] for line in evaluations] == ["step", "0", "600", "1200", "1800"]
    by_step = {int(line.split(",")[0]): float(line.split(",")[1]) for line in evaluations[1:]}
    assert len(result.stdout.splitlines()) == 1 + 2 * len(ALL)
    rows = {}
    for quality in ALL:
        name = "hopper-mini" if quality == "mini" else f"hopper-{quality}-local"
        path = folder / "data" / f"{name}.hdf5"
        with h5py.File(path) as f:
            assert set(f) == {"observations", "actions", "rewards", "terminals", "timeouts"}
            N = rows[quality] = len(f["rewards"])
            assert f["observations"].shape == (N, 11) and f["actions"].shape == (N, 3)
            assert all(f[k].dtype == np.float32 for k in ("observations", "actions", "rewards"))
            assert all(f[k].dtype == bool and f[k].shape == (N,) for k in ("terminals", "timeouts"))
            assert (f["terminals"][-1] or f["timeouts"][-1]) and not (f["terminals"][()] & f["timeouts"][()]).any()
            a = dict(f.attrs)
            assert a["env_id"] == "Hopper-v4" and a["seed"] == 1 and a["quality"] == quality and a["num_envs"] == 8
            assert a["gymnasium"] == gymnasium.__version__ and "--total-steps 1800" in a["command"]
            returns = np.add.reduceat(
                f["rewards"][()], np.append(0, np.flatnonzero(f["terminals"][()] | f["timeouts"][()])[:-1] + 1)
            )
            counts = " ".join(map(str, np.histogram(returns, 10)[0]))
            assert (
                f"{path.name}: {N:,} transitions, {len(returns):,} episodes" in result.stdout
                and counts in result.stdout
            )
            assert [by_step[k] for k in a["policy_step"]] == pytest.approx(a["policy_return"], rel=1e-4)
        if quality in ("random", "medium", "mini"):  # the other stages take it by its name
            task = stage1.parse_env(name)
            data = stage1.read_dataset(task, (str(path),))
            assert len(data.rewards) == N and data.clipped == 0
    code, out, err = run_main(
        stage1, "--env", "hopper-medium-expert-local", "--dataset-path", path.with_name("hopper-medium-expert-local.hdf5"),
        "--runs-dir", tmp_path, *TINY1,
    )  # fmt: skip
    assert code == 0 and "Spearman" in out
    assert 700 <= rows["random"] < 900 and rows["mini"] <= 700
    assert rows["medium-expert"] == rows["medium"] + rows["expert"]


def test_recorded_rows_are_gymnasiums(collected):
    """Episode k of the policy of step s starts from reset(seed 10**18 + (s + 2) 10**9 + k): play its actions again."""
    folder, _ = collected
    env = with_time_limit("Hopper-v4")
    with h5py.File(folder / "data/hopper-expert-local.hdf5") as f:
        data, first_seed = {k: f[k][()] for k in f}, 10**18 + (int(f.attrs["policy_step"][0]) + 2) * 10**9
    starts = np.append(0, np.flatnonzero(data["terminals"] | data["timeouts"]) + 1)
    assert len(starts) > 5
    for k, (a, b) in enumerate(zip(starts, starts[1:])):
        obs, reward, terminated, truncated = gymnasium_episode(env, first_seed + k, data["actions"][a:b])
        np.testing.assert_allclose(data["observations"][a:b], obs[:-1], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(data["rewards"][a:b], reward, rtol=1e-5, atol=1e-6)
        assert (data["terminals"][a:b] == terminated).all() and (data["timeouts"][a:b] == truncated).all()


def test_medium_replay_is_the_buffer_up_to_the_medium_policy(collected):
    folder, _ = collected
    with h5py.File(folder / "data/hopper-medium-replay-local.hdf5") as f:
        data, step = {k: f[k][()] for k in f}, int(f.attrs["policy_step"][0])
    envs = stage0.Episodes("Hopper-v4", 8, 0)
    buffer = np.fromfile(folder / "runs/Hopper-v4__collect_dataset__1/replay.bin", envs.row)
    assert len(buffer) == 1800
    early = buffer[:step]
    whole = [
        e for e in np.unique(early["episode"]) if (early["terminals"] | early["timeouts"])[early["episode"] == e].any()
    ]
    for key in data:
        assert (data[key] == np.concatenate([early[key][early["episode"] == e] for e in whole])).all()
    uniform = early["actions"][:400]  # the first START steps are uniformly random
    assert abs(uniform.mean()) < 0.1 and uniform.std() == pytest.approx(1 / np.sqrt(3), abs=0.05)


def test_a_gymnasium_vector_environment_is_collected_and_says_so(tmp_path, run_main, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(
        stage0, "--env-id", "InvertedPendulum-v5", "--num-envs", 3, "--total-steps", 900, "--transitions", 100,
        "--qualities", "random", "medium",
    )  # fmt: skip
    assert code == 0 and "gymnasium.vector (slower" in out, err
    with h5py.File(tmp_path / "data/invertedpendulum_v5-random-local.hdf5") as f:
        assert f["observations"].shape[1] == 4 and np.abs(f["actions"]).max() > 1  # its actions go to 3
    assert (tmp_path / "data/invertedpendulum_v5-medium-local.hdf5").exists()


# ---- resume, refusals ----


def test_rows_of_a_killed_run_after_its_checkpoint_are_cut_off(tmp_path):
    rows = np.arange(10, dtype=np.int32).view([("observations", "i4")])
    stage0.append_replay(tmp_path, rows, 0, 6)
    stage0.append_replay(tmp_path, rows[::-1], 4, 8)  # the checkpoint knew of 4
    found = np.zeros(8, rows.dtype)
    stage0.read_replay(tmp_path, found)
    assert found["observations"].tolist() == [0, 1, 2, 3, 5, 4, 3, 2]


def run_state(folder):
    state = torch.load(folder / "runs/Hopper-v4__collect_dataset__1/resume.pt", weights_only=True)
    return state, (folder / "runs/Hopper-v4__collect_dataset__1/replay.bin").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_killed_and_resumed_gives_the_same_policies_and_files(collected, tmp_path, how):
    whole, _ = collected
    process = subprocess.Popen(
        small_command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    run = tmp_path / "runs/Hopper-v4__collect_dataset__1"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run / "policies/600.pt").exists():
        time.sleep(0.002)
    time.sleep(0.2)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), err
    step = run_state(tmp_path)[0]["step"]
    assert 0 < step < 1800 and not (tmp_path / "data/hopper-random-local.hdf5").exists()
    if how == signal.SIGINT:
        assert "the same command continues" in out and "Traceback" not in err
    result = subprocess.run(small_command(tmp_path), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and f"continuing at step {step:,}" in result.stdout, result.stderr
    (a, rows_a), (b, rows_b) = run_state(whole), run_state(tmp_path)
    assert all(torch.equal(a["agent"][k], b["agent"][k]) for k in a["agent"]) and rows_a == rows_b
    assert a["evaluations"] == b["evaluations"]
    for path in (whole / "data").iterdir():
        with h5py.File(path) as f, h5py.File(tmp_path / "data" / path.name) as g:
            assert all((f[k][()] == g[k][()]).all() for k in f)
    for log in ("metrics.csv", "evaluations.csv"):
        assert (run / log).read_text() == (whole / "runs/Hopper-v4__collect_dataset__1" / log).read_text()


def test_an_evaluation_whose_checkpoint_was_not_written_is_listed_once(tmp_path, small, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = stage0.save_checkpoint

    def dying(path, payload):
        if path.name == "600.pt":
            raise KeyboardInterrupt
        real(path, payload)

    arguments = ["--total-steps", 600, "--transitions", 50, "--qualities", "random"]
    monkeypatch.setattr(stage0, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        run_main(stage0, *arguments)
    monkeypatch.setattr(stage0, "save_checkpoint", real)
    log = tmp_path / "runs/Hopper-v4__collect_dataset__1/evaluations.csv"
    assert [line.split(",")[0] for line in log.read_text().split()] == ["step", "0", "600"]
    assert run_main(stage0, *arguments)[0] == 0
    assert [line.split(",")[0] for line in log.read_text().split()] == ["step", "0", "600"]


def test_more_steps_go_on_and_less_steps_choose_among_the_first(collected, tmp_path, small, run_main, monkeypatch):
    """1,200 steps raised to 1,800 is a run of 1,800; its files are refused where a level moved, not overwritten."""
    whole, _ = collected
    monkeypatch.chdir(tmp_path)
    common = ["--transitions", 700, "--qualities"]
    code, _, err = run_main(stage0, "--total-steps", 1200, *common, "random", "expert")
    assert code == 0, err
    code, out, err = run_main(stage0, "--total-steps", 1800, *common, "random", "mini")
    assert code == 0 and "continuing at step 1,200" in out and "hopper-random-local.hdf5 is there already" in out, err
    (a, rows_a), (b, rows_b) = run_state(whole), run_state(tmp_path)
    assert all(torch.equal(a["agent"][k], b["agent"][k]) for k in a["agent"]) and rows_a == rows_b
    # the best of 1,200 steps again, though there are 1,800 by now
    code, out, err = run_main(stage0, "--total-steps", 1200, *common, "expert")
    assert code == 0 and "is there already" in out, err
    before = (tmp_path / "data/hopper-mini.hdf5").read_bytes()
    code, out, err = run_main(stage0, "--total-steps", 1200, *common, "mini")
    assert code == 2 and "made otherwise (policy_step [0, 600, 1200, 1800] there" in err and "Traceback" not in err
    assert (tmp_path / "data/hopper-mini.hdf5").read_bytes() == before


def test_a_medium_return_that_is_never_reached_says_so_and_keeps_the_rest(tmp_path, small, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(
        stage0, "--medium-return", 3000, "--total-steps", 600, "--transitions", 50, "--qualities", *ALL
    )
    last = err.splitlines()[-1]
    assert code == 1 and "--medium-return 3000 was never reached (best:" in last and "--total-steps" in last
    assert "medium-replay, medium, medium-expert could not be made" in last
    assert {p.name for p in (tmp_path / "data").iterdir()} == {
        "hopper-random-local.hdf5", "hopper-expert-local.hdf5", "hopper-mini.hdf5",
    }  # fmt: skip
    assert (tmp_path / "runs/Hopper-v4__collect_dataset__1/resume.pt").exists()


def test_bad_arguments(tmp_path, run_main, collected, monkeypatch):
    folder, _ = collected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/hopper-random-local.hdf5").write_text("not HDF5")
    gymnasium.register("Endless-v0", "gymnasium.envs.mujoco.hopper_v4:HopperEnv")
    cases = [
        (["--env-id", "Hoper-v4"], "Hoper"),
        (["--env-id", "CartPole-v1"], "Discrete"),
        (["--env-id", "CarRacing-v3"], "--env-id CarRacing-v3"),
        (["--env-id", "Endless-v0"], "no time limit"),
        (["--out-dir", tmp_path / "file"], "cannot write there"),
        (["--out-dir", "/proc/none"], "cannot write there"),
        (["--total-steps", 9999], "--total-steps 9999"),
        (["--qualities"], "--qualities"),
        (["--transitions", 0], "--transitions 0"),
        (["--num-envs", 0], "--num-envs 0"),
        (["--seed", -1], "--seed -1"),
        (["--out-dir", tmp_path / "elsewhere"], "was made otherwise"),
        (["--out-dir", folder / "data", "--seed", 2], "was made otherwise (seed 1 there, 2 here)"),
        (["--out-dir", folder / "data"], "was made otherwise (transitions 700 there, 1000000 here)"),
        (["--runs-dir", tmp_path / "file"], "cannot write there"),
    ]
    if os.geteuid():  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        cases.append((["--out-dir", tmp_path / "locked"], "cannot write there"))
    for arguments, says in cases:
        code, out, err = run_main(stage0, *arguments)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, (arguments, out, err)
        assert not (tmp_path / "runs").exists()
    gymnasium.registry.pop("Endless-v0")
    code, out, err = run_main(stage0, "--total-steps", 10**17)
    assert (code, out) == (2, "") and "does not fit into memory" in err and err.count("\n") == 1


def test_steps_that_the_environments_do_not_divide_and_files_without_an_episode(tmp_path, small, run_main, monkeypatch):
    """7 environments pass 1,200 steps at 1,204: that policy counts. HalfCheetah has no whole episode in 602 / 7 steps."""
    monkeypatch.chdir(tmp_path)
    common = ["--num-envs", 7, "--transitions", 50]
    code, _, err = run_main(stage0, *common, "--total-steps", 1200, "--qualities", "mini")
    assert code == 0, err
    with h5py.File(tmp_path / "data/hopper-mini.hdf5") as f:
        assert f.attrs["policy_step"].tolist() == [0, 602, 1204]
    code, out, err = run_main(
        stage0,
        *common,
        "--env-id",
        "HalfCheetah-v4",
        "--total-steps",
        600,
        "--qualities",
        "medium-replay",
        "mini",
        "expert",
    )
    last = err.splitlines()[-1]
    assert code == 1 and "medium-replay-local.hdf5: no whole episode; --num-envs is too large" in last
    assert "mini.hdf5: no whole episode; --transitions is too small" in last
    assert [p.name for p in (tmp_path / "data").glob("half*")] == ["halfcheetah-expert-local.hdf5"]


def test_a_file_that_another_process_wrote_meanwhile_is_kept(tmp_path):
    path = tmp_path / "x.hdf5"
    path.write_text("theirs")
    rows = np.zeros(3, stage0.Episodes("Hopper-v4", 1, 0).row)
    rows["terminals"][-1] = True
    with pytest.raises(SystemExit):
        stage0.write_hdf5(path, rows, {})
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]


def test_a_damaged_run_folder_is_refused(collected, tmp_path, small, run_main, monkeypatch):
    import shutil

    folder, _ = collected
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    run = tmp_path / "copy/runs/Hopper-v4__collect_dataset__1"
    arguments = [*SMALL_RUN, "--qualities", "mini"]
    code, _, err = run_main(stage0, *arguments, "--num-envs", 4, "--out-dir", "new")
    assert code == 2 and "num_envs 8 there, 4 here" in err
    lock = stage0.claim(run)
    code, _, err = run_main(stage0, *arguments)
    assert code == 2 and "another process" in err and err.count("\n") == 1
    lock.release()
    os.truncate(run / "replay.bin", 1000)
    code, _, err = run_main(stage0, *arguments)
    assert code == 2 and "replay.bin" in err and "rows, resume.pt needs 1,800" in err and err.count("\n") == 1


def test_a_nan_stops_the_training_and_keeps_the_last_good_state(tmp_path, small, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = stage0.critic_loss

    def broken(agent, batch, generator):
        loss, q = real(agent, batch, generator)
        return (loss * float("nan"), q) if broken.calls > 300 else (loss, q)

    broken.calls = 0

    def counting(*args):
        broken.calls += 1
        return broken(*args)

    monkeypatch.setattr(stage0, "critic_loss", counting)
    code, _, err = run_main(stage0, *SMALL_RUN)
    assert code == 1 and "NaN" in err.splitlines()[-1] and "resume.pt is the last good state" in err
    state, _ = run_state(tmp_path)
    assert state["step"] == 600 and all(x.isfinite().all() for x in state["agent"].values())


# ---- hopper-mini, the embedded dataset ----


def test_hopper_mini_is_what_readme_says():
    path = ROOT / "data" / "hopper-mini.hdf5"
    assert path.stat().st_size <= 6 * 2**20
    data = stage1.read_dataset(stage1.parse_env("hopper-mini"), ())
    assert 60_000 <= len(data.rewards) <= 100_000 and data.clipped == 0 and not data.is_d4rl
    counts, edges = np.histogram(data.returns)
    assert edges[0] < 50 and counts.min() * 2 >= counts.max(), counts  # from falling at once, evenly
    with h5py.File(path) as f:
        assert edges[-1] > 0.9 * max(f.attrs["policy_return"]) and f.attrs["env_id"] == "Hopper-v4"
        assert f.attrs["command"] in (ROOT / "README.md").read_text()


def test_rows_of_hopper_mini_are_steps_of_gymnasiums_hopper():
    """Put Gymnasium's own environment into the recorded state (x is not in it, and nothing depends on x), and step."""
    data = stage1.read_dataset(stage1.parse_env("hopper-mini"), ())
    inside = np.ones(len(data.rewards), bool)
    inside[data.ends - 1] = False
    inside[np.abs(data.observations[:, 5:]).max(axis=1) >= 10] = False  # a clipped velocity is not the state's
    env = stage0.make_env("Hopper-v4")
    env.reset(seed=0)
    for i in np.random.default_rng(0).choice(np.flatnonzero(inside), 300, replace=False):
        obs = data.observations[i].astype(np.float64)
        env.set_state(np.append(0.0, obs[:5]), obs[5:])
        following, reward, terminated, _, _ = env.step(data.actions[i])
        np.testing.assert_allclose(following, data.observations[i + 1], rtol=1e-3, atol=1e-3)
        assert reward == pytest.approx(data.rewards[i], abs=1e-3) and not terminated
    for end in data.ends[:40]:
        obs = data.observations[end - 1].astype(np.float64)
        if np.abs(obs[5:]).max() < 10:
            env.set_state(np.append(0.0, obs[:5]), obs[5:])
            assert env.step(data.actions[end - 1])[2] == data.terminals[end - 1]
