"""Stage 0: episodes are Gymnasium's own, SAC's losses, what is recorded, resume, refusals, and the two minis."""

import os
import shutil
import signal
import subprocess
import sys
import types
import warnings

import collect_dataset as stage0
import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, call, data_of

import evaluate_alignment as stage3

SMALL = dict(START=48, EVAL_EVERY=96, LOG_EVERY=48, WIDTH=16, BATCH=16, EVAL_EPISODES=2, HORIZON=50, MINI_POOL=3)
ALL = ("random", "medium-replay", "medium", "expert", "medium-expert", "mini")
RUN = "runs/Hopper-v4__collect_dataset__1"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in SMALL.items():
        monkeypatch.setattr(stage0, name, value)


def collect(folder, *qualities, total=288, **flags):
    """A small run on Hopper in `folder`: exit code, stdout, stderr."""
    flags = {"num-envs": 4, "transitions": 200, "total-steps": total} | flags
    flags = {"out-dir": folder / "data", "runs-dir": folder / "runs"} | flags
    return call(stage0, *(x for name, value in flags.items() for x in (f"--{name}", value)), "--qualities", *qualities)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Every quality of a small run, which tests read and never write; and what it printed."""
    folder = tmp_path_factory.mktemp("collected")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(stage0, name, value)
        code, out, err = collect(folder, *ALL)
    assert code == 0, err
    return folder, out


@pytest.fixture
def copy(collected, tmp_path):
    """The finished run in a folder of the test's own."""
    shutil.copytree(collected[0] / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture
def untrained(monkeypatch):
    """A gradient step that does nothing: for what does not depend on the policies."""
    monkeypatch.setattr(stage0.SAC, "step", lambda *_: torch.ones(5))


def read(path):
    with h5py.File(path) as f:
        return {key: f[key][()] for key in f}, dict(f.attrs)


def ends_of(data):
    return np.flatnonzero(data["terminals"] | data["timeouts"]) + 1


def one_line(result, code, *says):
    before, _, message = result[2].partition("error: ")  # before it there may be a progress bar
    assert result[0] == code and message.count("\n") <= 1 + ("\r" in before) and "Traceback" not in before, result
    assert all(str(text) in message.splitlines()[0] for text in says), message


# ---- environments ----


def with_time_limit(env_id):
    with warnings.catch_warnings(action="ignore"):  # v4 is out of date
        return gymnasium.make(env_id)


def assert_is_gymnasiums(rows, env, seed, obs_dim):
    """Rows of one episode against reset(seed) and step through its actions; returns the last observation."""
    obs, _ = env.reset(seed=seed)
    for k, row in enumerate(rows):
        np.testing.assert_array_equal(row["observations"][:obs_dim], np.float32(obs))
        obs, reward, terminated, truncated, _ = env.step(row["actions"])
        assert row["rewards"] == pytest.approx(reward, rel=1e-5, abs=1e-6)
        assert (row["terminals"], row["timeouts"]) == (terminated, truncated and not terminated)
        assert k == len(rows) - 1 or not (terminated or truncated)
    return obs


@pytest.mark.parametrize(
    "env_id, steps, ends",
    [
        ("Hopper-v4", 120, "terminals"),
        ("HalfCheetah-v4", 1005, "timeouts"),
        ("Walker2d-v4", 60, "terminals"),
        ("Ant-v4", 20, "terminals"),
        ("Reacher-v5", 110, "timeouts"),
        ("InvertedPendulum-v5", 40, "terminals"),
    ],
)
def test_rows_are_what_gymnasiums_step_returns(env_id, steps, ends):
    """Episode k starts from reset(seed=first_seed + k), in the order they begin; both kinds of end are kept apart."""
    rng, envs, env = np.random.default_rng(0), stage0.Episodes(env_id, 2, 10**18 + 7), with_time_limit(env_id)
    obs_dim, shape = env.observation_space.shape[0], (2, len(envs.low))
    rows = np.stack([envs.step(rng.uniform(envs.low, envs.high, shape).astype(np.float32)) for _ in range(steps)])
    for i in range(2):
        numbers = list(dict.fromkeys(rows["episode"][:, i].tolist()))
        for k in numbers:
            played = rows[rows["episode"][:, i] == k, i]
            last = assert_is_gymnasiums(played, env, 10**18 + 7 + k, obs_dim)
            assert k == numbers[-1] or played["terminals"][-1] or played["timeouts"][-1]
        if numbers[-1] == envs.number[i]:
            np.testing.assert_array_equal(envs.obs[i, :obs_dim], last)
    assert {key for key in ("terminals", "timeouts") if rows[key].any()} == {ends}
    assert all(len(np.unique(np.nonzero(rows["episode"] == k)[1])) == 1 for k in np.unique(rows["episode"]))
    first_row = [int(np.flatnonzero((rows["episode"] == k).any(axis=1))[0]) for k in range(rows["episode"].max() + 1)]
    assert first_row == sorted(first_row)


@pytest.mark.parametrize("env_id", stage0.BODY_IDS)
def test_rows_of_the_four_bodies_are_bit_for_bit_those_of_stage_3s_simulator(env_id):
    """Ant's padding included."""
    rng, envs, one = np.random.default_rng(0), stage0.Episodes(env_id, 3, 5), np.array([0])
    simulators = [stage3.Simulator(env_id, [seed]) for seed in (5, 6, 7)]
    for _ in range(40):
        rows = envs.step(rng.uniform(-1, 1, (3, len(envs.low))).astype(np.float32))
        for i, simulator in enumerate(simulators):
            np.testing.assert_array_equal(rows["observations"][i], simulator.observe(one)[0].astype(np.float32))
            _, reward, terminated, _ = simulator.step(one, rows["actions"][i : i + 1].astype(np.float64))
            assert rows["rewards"][i] == np.float32(reward[0]) and rows["terminals"][i] == terminated[0]
            if terminated[0]:
                simulators[i] = stage3.Simulator(env_id, [5 + envs.number[i]])
    np.testing.assert_array_equal(envs.obs, np.concatenate([simulator.observe(one) for simulator in simulators]))


@pytest.mark.parametrize("env_id, steps", [("Hopper-v4", 45), ("InvertedPendulum-v5", 23), ("Reacher-v5", 50)])
def test_replay_brings_the_environments_back(env_id, steps):
    """From the recorded rows alone; every later step is then the same. Reacher: all episodes end in the last row."""
    rng, one, two = np.random.default_rng(1), stage0.Episodes(env_id, 4, 99), stage0.Episodes(env_id, 4, 99)
    actions = rng.uniform(one.low, one.high, (steps + 20, 4, len(one.low))).astype(np.float32)
    two.replay(np.stack([one.step(a) for a in actions[:steps]]))
    assert (one.number == two.number).all() and (one.t == two.t).all()
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
        assert (action >= 0.1).all() and (action <= 0.7).all() and action.dtype == np.float32
        self.left -= 1
        return np.asarray(action), 0.0, self.left == 0, False, {}


def test_what_is_recorded_is_what_was_played_in_an_environment_of_other_bounds():
    gymnasium.register("Echo-v0", Echo, max_episode_steps=4)
    rng, one, two = np.random.default_rng(0), stage0.Episodes("Echo-v0", 3, 5), stage0.Episodes("Echo-v0", 3, 5)
    assert one.low.dtype == np.float32 and np.allclose(one.low, 0.1) and np.allclose(one.high, 0.7)
    rows = np.stack([one.step(one.low + (one.high - one.low) * rng.random((3, 2), np.float32)) for _ in range(9)])
    goes_on = ~(rows["terminals"] | rows["timeouts"])[:-1]
    assert (rows["actions"][:-1][goes_on] == rows["observations"][1:][goes_on]).all() and goes_on.any()
    assert rows["terminals"].any() and rows["timeouts"].any() and not (rows["terminals"] & rows["timeouts"]).any()
    two.replay(rows)
    actions = np.full((3, 2), 0.5, np.float32)
    assert (one.step(actions) == two.step(actions)).all()
    gymnasium.registry.pop("Echo-v0")


# ---- SAC ----

LOW, HIGH = np.array([-0.5, -2.0], np.float32), np.array([0.5, 1.0], np.float32)


def sac_and_replay():
    """A learner of 3 observations and 2 actions, and 40 random transitions with every kind of end."""
    rng = np.random.default_rng(0)
    columns = [("observations", "f4", 3), ("actions", "f4", 2), ("rewards", "f4")]
    replay = np.zeros(40, [*columns, ("terminals", "?"), ("timeouts", "?")])
    replay["observations"], replay["actions"] = rng.normal(size=(40, 3)), rng.uniform(LOW, HIGH, (40, 2))
    replay["rewards"], replay["terminals"][::5], replay["timeouts"][1::5] = rng.normal(size=40), True, True
    return stage0.SAC(3, LOW, HIGH, seed=0), replay


def nets_of(sac):
    return {name: part for name, part in sac.saved_state.items() if isinstance(part, torch.nn.Module)}


def test_the_actors_density_is_that_of_a_squashed_gaussian():
    actor, obs = sac_and_replay()[0].actor, torch.randn(64, 3)
    act, log_pi = actor(obs, torch.Generator().manual_seed(3))
    mean, log_std = actor.net(obs).detach().double().chunk(2, dim=-1)
    squashed = ((act.detach() - torch.tensor(HIGH + LOW) / 2) / (torch.tensor(HIGH - LOW) / 2)).double()
    z = (torch.atanh(squashed) - mean) / log_std.exp()
    density = torch.exp(-(z**2) / 2) / (log_std.exp() * (2 * np.pi) ** 0.5) / (1 - squashed**2)
    torch.testing.assert_close(log_pi.detach().double(), density.log().sum(dim=-1), rtol=1e-3, atol=1e-3)
    without_noise = actor.act(obs.double().numpy(), None)
    torch.testing.assert_close(torch.tensor(without_noise), (mean.tanh() * actor.scale + actor.middle).float())
    sampled = actor.act(obs.numpy(), torch.Generator().manual_seed(3))
    assert np.array_equal(sampled, act.detach()) and not np.allclose(sampled, without_noise)
    assert (sampled <= HIGH).all() and (sampled >= LOW).all() and sampled.dtype == np.float32


def test_the_three_losses_by_hand_and_what_each_differentiates(monkeypatch):
    sac, replay = sac_and_replay()
    with torch.no_grad():
        sac.log_alpha.fill_(-1.0)
        for p in sac.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
    names = {id(opt): name for name, opt in sac.opts.items()}
    losses, moved = {}, {}

    def descend(opt, loss):  # changes no weight
        loss.backward()
        losses[names[id(opt)]] = loss.detach()
        moved[names[id(opt)]] = {
            name for name, net in nets_of(sac).items() for p in net.parameters() if p.grad is not None and p.grad.any()
        }
        for net in nets_of(sac).values():
            net.zero_grad()

    monkeypatch.setattr(stage0, "update", descend)
    monkeypatch.setattr(stage0, "ema_update", lambda *_: None)
    sac.generator.manual_seed(5)
    values = sac.step(replay, num_envs=2)

    generator, alpha = torch.Generator().manual_seed(5), np.exp(-1)
    i = torch.randint(38, (16,), generator=generator)
    column = {key: torch.tensor(replay[key].copy())[i] for key in stage0.D4RL_KEYS}
    following = torch.tensor(replay["observations"].copy())[i + 2]
    both = lambda critic, obs, act: [q(torch.cat([obs, act], dim=1))[:, 0] for q in critic]  # noqa: E731
    with torch.no_grad():
        next_act, log_pi = sac.actor(following, generator)
        y = column["rewards"] + 0.99 * (torch.minimum(*both(sac.target_critic, following, next_act)) - alpha * log_pi)
        y[column["terminals"]] = column["rewards"][column["terminals"]]
        q = both(sac.critic, column["observations"], column["actions"])
        counted = ~column["timeouts"]  # whose next observation is not in the buffer
        q_loss = sum(((q_m - y)[counted] ** 2).sum() / 16 for q_m in q)
        act, log_pi = sac.actor(column["observations"], generator)
        actor_loss = (alpha * log_pi - torch.minimum(*both(sac.critic, column["observations"], act))).mean()
    assert column["terminals"].any() and column["timeouts"].any()
    torch.testing.assert_close(losses["critic"], q_loss)
    torch.testing.assert_close(losses["actor"], actor_loss)
    torch.testing.assert_close(losses["alpha"], -alpha * (log_pi.mean() - 2))  # target entropy: -act_dim
    assert values.tolist() == pytest.approx([q_loss.item(), actor_loss.item(), q[0].mean().item(), alpha, 1])
    assert moved == {"critic": {"critic"}, "actor": {"actor"}, "alpha": {"alpha"}}


def test_one_step_moves_every_part_by_its_own_rate():
    """Adam's first step is as long as the learning rate; the target critic then follows by TAU."""
    sac, replay = sac_and_replay()
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets_of(sac).items()}
    sac.step(replay, num_envs=2)
    for name, lr in {"actor": 3e-4, "critic": 1e-3, "alpha": 1e-3}.items():
        moved = max((p - b).abs().max().item() for p, b in zip(sac.saved_state[name].parameters(), before[name]))
        assert moved == pytest.approx(lr, rel=1e-2), name
    for p, target, b in zip(sac.critic.parameters(), sac.target_critic.parameters(), before["target_critic"]):
        torch.testing.assert_close(target, 0.995 * b + 0.005 * p, rtol=0, atol=1e-7)
    q_1, q_2 = sac.critic
    assert not torch.equal(q_1[0].weight, q_2[0].weight)


def test_a_batch_pairs_each_transition_with_its_environments_next(monkeypatch):
    sac, replay = sac_and_replay()
    replay["observations"] = np.arange(40)[:, None]
    seen, real = [], stage0.q_values
    monkeypatch.setattr(stage0, "q_values", lambda critic, obs, act: seen.append(obs) or real(critic, obs, act))
    for _ in range(30):
        sac.step(replay[:30], num_envs=7)
    following, now = torch.cat(seen[::3]), torch.cat(seen[1::3])
    assert torch.equal(following, now + 7) and (now.min(), following.max()) == (0, 29)


def test_main_makes_one_gradient_step_per_environment_step_after_the_first_and_logs_their_means(tmp_path, monkeypatch):
    sizes = []

    def step(sac, replay, num_envs):
        sizes.append(len(replay))
        return torch.tensor([len(sizes), 0.0, 0.0, 0.5, 1.0])

    monkeypatch.setattr(stage0.SAC, "step", step)
    code, _, err = collect(tmp_path, "random", total=144)
    assert code == 0 and sizes == [step for step in range(52, 145, 4) for _ in range(4)], err
    rows = (tmp_path / RUN / "metrics.csv").read_text().splitlines()
    assert rows == ["step,q_loss,actor_loss,q_mean,alpha", "96,24.5,0,0,0.5", "144,72.5,0,0,0.5"]


# ---- what is recorded ----


def test_levels_by_hand(monkeypatch):
    monkeypatch.setattr(stage0, "START", 3)

    def levels(returns, medium_return=None):
        steps = stage0.choose_policies(returns, medium_return)
        assert steps["random"] == [0] and steps["mini"] == [0, *(k for k in returns if k > 3)]
        assert steps["medium-replay"] == steps["medium"]
        assert steps["medium-expert"] == (steps["medium"] + steps["expert"] if steps["medium"] else [])
        return steps["medium"], steps["expert"]

    assert levels({0: 100, 5: 320, 10: 420, 15: 1000, 20: 990}) == ([10], [15])
    assert levels({0: 987, 5: 620, 10: 1700, 15: 4500}) == ([10], [15])  # Ant: standing still is worth 1,000
    assert levels({0: -45, 5: -40, 10: -30, 15: -6}) == ([10], [15])  # Reacher: a third of -6 is above -6
    assert levels({0: -45, 5: -60, 10: -50}) == ([10], [10])
    assert levels({0: 100, 5: 390, 10: 420}, 380) == ([5], [10])
    assert levels({0: 1000, 5: 390, 10: 420}, 500) == ([], [10])  # the untrained policy is of no other level,
    assert levels({0: 100, 2: 900, 5: 390, 10: 420}, 380) == ([5], [10])  # and so is any before the first gradient step


def test_recorded_episodes_are_the_first_to_begin_not_the_first_to_end(monkeypatch):
    """Of environments whose episodes last 1, 2, 3, 4, 1, 2, ... steps."""

    class Counting:
        def __init__(self, env_id, n, seed, keep_next):
            self.number, self.t, self.obs = np.arange(n), np.zeros(n, int), np.zeros((n, 1))

        def step(self, actions):
            columns = [("episode", "i4"), ("rewards", "f4"), ("terminals", bool), ("timeouts", bool)]
            rows = np.zeros(len(self.t), columns)
            rows["episode"], rows["rewards"] = self.number, self.t
            self.t += 1
            rows["terminals"] = self.t == self.number % 4 + 1
            for i in np.flatnonzero(rows["terminals"]):
                self.number[i], self.t[i] = self.number.max() + 1, 0
            return rows

    class Constant:  # plays 0 in every state; an evaluation gives it no noise, a recording does
        def act(self, obs, generator):
            assert (generator is None) == (step is None)
            return np.zeros((len(obs), 3), np.float32)

    monkeypatch.setattr(stage0, "Episodes", Counting)
    monkeypatch.setattr(stage0, "HORIZON", 4)
    step = 5
    for minimum, whole in ((1, 1), (2, 2), (3, 2), (4, 3), (10, 4), (11, 5), (25, 11)):
        rows = stage0.record(Constant(), stage0.Args(), step, transitions=minimum)
        assert rows["episode"].tolist() == [k for k in range(whole) for _ in range(k % 4 + 1)]
        assert rows["rewards"].tolist() == [t for k in range(whole) for t in range(k % 4 + 1)]
    step = None
    assert stage0.record(Constant(), stage0.Args(), step, episodes=3)["episode"].tolist() == [0, 1, 1, 2, 2, 2]


def test_spread_evenly_takes_from_every_bin_in_turn(monkeypatch):
    monkeypatch.setattr(stage0, "MINI_BINS", 4)
    rng = np.random.default_rng(0)
    returns = np.concatenate([rng.uniform(0, 25, 300), rng.uniform(25, 50, 20), rng.uniform(50, 100, 40), [0.0, 100.0]])
    rng.shuffle(returns)
    rows = np.zeros(2 * len(returns), [("rewards", "f4"), ("terminals", bool), ("timeouts", bool), ("k", "i4")])
    rows["rewards"], rows["k"] = np.repeat(returns / 2, 2), np.repeat(np.arange(len(returns)), 2)
    rows["terminals"][1::4], rows["timeouts"][3::4] = True, True
    chosen = stage0.spread_evenly(rows, 2 * 40 + 1)
    found = stage0.episode_returns(chosen)
    assert len(chosen) == 80 and np.histogram(found, 4, (0, 100))[0].tolist() == [10, 10, 10, 10]
    assert (np.diff(chosen["k"])[1::2] > 0).all() and (np.diff(chosen["k"])[::2] == 0).all()  # whole, in order
    assert len(stage0.spread_evenly(rows, 1)) == 0


def test_steady_episodes_come_first_in_their_bin():
    """Episodes of ten steps with returns 0, 10, ..., 100: for each return one is steady, one sprints and falls."""
    returns = np.repeat(np.arange(0.0, 101, 10), 2)
    rewards = np.repeat(returns[:, None] / 10, 10, axis=1)
    rewards[::2] = np.where(np.arange(10) < 5, 2 * rewards[::2], 0)
    rows = np.zeros(220, [("rewards", "f4"), ("terminals", bool), ("timeouts", bool)])
    rows["rewards"], rows["timeouts"][9::10] = rewards.ravel(), True
    rows = np.concatenate([rows, rows[:1]])
    rows["terminals"][-1] = True  # an episode of one step has no fifths
    found = stage0.spread_evenly(rows, 111, steady=True)["rewards"]
    assert len(found) == 110 and (np.ptp(found.reshape(11, 10), axis=1)[1:] == 0).all()
    assert (np.ptp(stage0.spread_evenly(rows[:220], 110)["rewards"].reshape(11, 10), axis=1) > 0).any()


def test_policies_are_kept_every_so_many_steps_without_touching_the_training(tmp_path, collected):
    """More evaluations leave the training as it is; the file says how it was made."""
    folder = tmp_path
    code, _, err = collect(folder, "mini", **{"eval-every=48": "--steady"})
    assert code == 0, err
    steps = [48 * i for i in range(7)]
    assert sorted(int(p.stem.partition("_")[2]) for p in (folder / RUN).glob("policy_*.pt")) == steps
    last = [
        stage0.load_checkpoint(f / RUN / "policy_288.pt", "collect_dataset")["actor"] for f in (folder, collected[0])
    ]
    assert all(torch.equal(x, y) for x, y in zip(*(actor.values() for actor in last)))
    attributes = read(folder / "data/hopper-mini.hdf5")[1]
    assert attributes["eval_every"] == 48 and attributes["steady"]
    code, _, err = collect(folder, "mini", **{"eval-every=96": "--steady"})
    assert code == 2 and "eval_every" in err


def test_every_quality_is_written_and_the_other_stages_read_it_by_its_name(collected):
    folder, out = collected
    evaluations = [line.split(",") for line in (folder / RUN / "evaluations.csv").read_text().split()]
    assert evaluations[0] == ["step", "return"] and [k for k, _ in evaluations[1:]] == ["0", "96", "192", "288"]
    metrics = [line.split(",") for line in (folder / RUN / "metrics.csv").read_text().split()]
    assert metrics[0] == ["step", "q_loss", "actor_loss", "q_mean", "alpha"]
    assert [row[0] for row in metrics[1:]] == ["96", "144", "192", "240", "288"]
    assert 0 < float(metrics[-1][-1]) < 1 and any((folder / RUN / "tensorboard").rglob("events*"))
    assert len(out.splitlines()) == 1 + 2 * len(ALL)
    rows = {}
    for quality in ALL:
        name = "hopper-mini" if quality == "mini" else f"hopper-{quality}-local"
        path = folder / "data" / f"{name}.hdf5"
        data, attributes = read(path)
        N = rows[quality] = len(data["rewards"])
        assert {key: (x.dtype, x.shape) for key, x in data.items()} == {
            "observations": (np.float32, (N, 11)), "actions": (np.float32, (N, 3)), "rewards": (np.float32, (N,)),
            "terminals": (bool, (N,)), "timeouts": (bool, (N,)),
        }  # fmt: skip
        ends = ends_of(data)
        assert ends[-1] == N and not (data["terminals"] & data["timeouts"]).any()
        assert attributes.pop("command").startswith("python data/collect_dataset.py --out-dir")
        steps, returns = attributes.pop("policy_step").tolist(), attributes.pop("policy_return").tolist()
        expected = dict(env_id="Hopper-v4", seed=1, num_envs=4, exp_name="collect_dataset", quality=quality)
        expected |= dict(gymnasium=gymnasium.__version__, mujoco=mujoco.__version__)
        assert attributes == expected | ({} if quality == "medium-replay" else {"transitions": 200})
        assert returns == pytest.approx([float(r) for k in steps for s, r in evaluations[1:] if int(s) == k], rel=1e-4)
        assert {"random": [0], "mini": [0, 96, 192, 288]}.get(quality, steps) == steps
        found = np.add.reduceat(data["rewards"], np.append(0, ends[:-1]))
        assert f"{path.name}: {N:,} transitions, {len(ends):,} episodes, mean return {found.mean():.0f}" in out
        assert " ".join(map(str, np.histogram(found, 10)[0])) in out
        read_back = data_of(name, path)
        assert len(read_back.rewards) == N and (read_back.ends == ends).all()
    assert 200 <= rows["random"] < 400 and rows["mini"] <= 200
    assert rows["medium-expert"] == rows["medium"] + rows["expert"]


@pytest.mark.parametrize("quality", ["random", "expert"])
def test_a_recorded_policy_is_the_one_of_its_step_and_starts_from_its_own_seeds(collected, quality):
    """Episode k of the policy of step s starts from reset(seed=10**18 + (s + 2) 10**9 + k), and acts by sampling."""
    folder, _ = collected
    data, attributes = read(folder / "data" / f"hopper-{quality}-local.hdf5")
    [step] = attributes["policy_step"]
    actor = stage0.Actor(11, -np.ones(3, np.float32), np.ones(3, np.float32))
    actor.load_state_dict(torch.load(folder / RUN / f"policy_{step}.pt", weights_only=True)["actor"])
    first_seed, starts, env = 10**18 + (int(step) + 2) * 10**9, [0, *ends_of(data)], with_time_limit("Hopper-v4")
    assert len(starts) > 4
    for k, (a, b) in enumerate(zip(starts, starts[1:])):
        rows = np.zeros(b - a, [(key, x.dtype, x.shape[1:]) for key, x in data.items()])
        for key, x in data.items():
            rows[key] = x[a:b]
        assert_is_gymnasiums(rows, env, first_seed + k, 11)
    if quality == "expert":  # its evaluation: without noise, from seeds of its own
        envs = stage0.Episodes("Hopper-v4", 2, 10**18 + 10**9)
        rows = np.stack([envs.step(actor.act(envs.obs, None)) for _ in range(400)])
        returns = [rows["rewards"][rows["episode"] == k].sum(dtype=float) for k in range(2)]
        assert attributes["policy_return"] == pytest.approx([np.mean(returns)], rel=1e-6)
    noise = torch.randn((4, 3), generator=torch.Generator().manual_seed(first_seed % 2**63))  # of 4 environments
    mean, log_std = actor.net(torch.tensor(data["observations"][starts[:4]])).chunk(2, dim=-1)
    torch.testing.assert_close(torch.tensor(data["actions"][starts[:4]]), torch.tanh(mean + log_std.exp() * noise))


def test_mini_records_a_multiple_of_what_it_keeps_spread_over_all_policies(collected, monkeypatch):
    pool = []
    monkeypatch.setattr(
        stage0, "record", lambda actor, args, step, transitions: pool.append((step, transitions)) or [0]
    )
    monkeypatch.setattr(stage0, "spread_evenly", lambda rows, transitions, steady: (rows, transitions))
    actor, args = stage0.Actor(11, -np.ones(3, np.float32), np.ones(3, np.float32)), stage0.Args(transitions=250)
    rows, kept = stage0.collect("mini", [0, 96, 192, 288], None, collected[0] / RUN, actor, args)
    assert pool == [(0, 188), (96, 188), (192, 188), (288, 188)] and len(rows) == 4 and kept == 250  # 3 * 250 / 4


def test_medium_replay_is_the_buffer_up_to_the_medium_policy(collected):
    folder, _ = collected
    data, attributes = read(folder / "data/hopper-medium-replay-local.hdf5")
    buffer = np.fromfile(folder / RUN / "replay.bin", stage0.Episodes("Hopper-v4", 1, 0).row)
    assert len(buffer) == 288
    early = buffer[: attributes["policy_step"][0]]
    ended = early["terminals"] | early["timeouts"]
    whole = [early[early["episode"] == k] for k in np.unique(early["episode"][ended])]
    for key in data:
        assert (data[key] == np.concatenate([rows[key] for rows in whole])).all()
    generator = torch.Generator().manual_seed(1)  # the first START steps are uniformly random
    uniform = np.concatenate([torch.rand(4, 3, generator=generator).numpy() for _ in range(12)])
    assert (buffer["actions"][:48] == 2 * uniform - 1).all()


def test_any_environment_of_vectors_is_collected(tmp_path, untrained):
    code, _, err = collect(tmp_path, "random", "medium", total=144, **{"env-id": "InvertedPendulum-v5", "num-envs": 3})
    assert code == 0, err
    data, _ = read(tmp_path / "data/invertedpendulum_v5-random-local.hdf5")
    assert data["observations"].shape[1] == 4 and 1 < np.abs(data["actions"]).max() <= 3  # its bounds
    assert (tmp_path / "data/invertedpendulum_v5-medium-local.hdf5").exists()


# ---- resume ----


def resume_pt(folder):
    return torch.load(folder / RUN / "resume.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


KILLED = """
import os, sys
sys.path[0] = {folder!r}
import collect_dataset as c
vars(c).update({constants!r})
real, calls = c.SAC.step, []
def step(*args):
    calls.append(1)
    return real(*args) if len(calls) < 120 else os.kill(os.getpid(), {signal})
c.SAC.step = step
c.run(c.main)
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The run of `collected`, killed at step 168 (script and stage 2 copied away), then interrupted, short and long."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "data").mkdir()
    script = shutil.copy(stage0.__file__, folder / "data")
    shutil.copy(ROOT / "train_qalign_dt.py", folder)
    code = KILLED.format(folder=str(folder / "data"), constants=SMALL, signal=int(signal.SIGKILL))
    flags = ["--num-envs", "4", "--transitions", "200", "--qualities", "random", "--total-steps"]
    (folder / "killed.py").write_text(code)
    child = Forked([sys.executable, folder / "killed.py", *flags, "288"], cwd=folder, stderr=subprocess.PIPE)
    killed = (
        child.communicate()[1],
        child.returncode,
        resume_pt(folder)["progress"]["step"],
        list((folder / "data").glob("*.hdf5")),
    )
    with open(folder / RUN / "replay.bin", "ab") as f:
        f.write(b"rows that a killed process wrote after its last checkpoint, half of one")
    real = stage0.save_resume

    def ctrl_c(*args):
        if args[-1].step == 192:  # the progress
            raise KeyboardInterrupt
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SMALL | {"__file__": script}).items():
            patch.setattr(stage0, name, value)
        patch.chdir(folder)
        patch.setattr(stage0, "save_resume", ctrl_c)
        stopped = call(stage0, *flags, 288), resume_pt(folder), (folder / RUN / "evaluations.csv").read_text()
        patch.setattr(stage0, "save_resume", real)
        short, long = call(stage0, *flags, 192), call(stage0, "--qualities", *ALL, *flags[:4], "--total-steps", 288)
    return types.SimpleNamespace(folder=folder, killed=killed, stopped=stopped, short=short, long=long)


def test_a_killed_run_resumes_at_its_last_checkpoint(interrupted):
    err, code, step, datasets = interrupted.killed
    assert (code, step, datasets) == (-signal.SIGKILL, 96, []), err
    assert "step 96 of 288" in interrupted.stopped[0][1]


def test_ctrl_c_loses_what_is_newer_than_the_checkpoint_and_says_so(interrupted):
    """Here an evaluation, which is made again, and listed once."""
    result, state, evaluations = interrupted.stopped
    one_line(result, 130, "interrupted", "resume.pt is the last good state", "the same command continues")
    assert state["progress"]["step"] == 96 and evaluations.splitlines()[-1].startswith("192,")
    assert interrupted.short[0] == 0 and "step 96 of 192" in interrupted.short[1]


def test_a_finished_run_continues_where_total_steps_is_raised(interrupted):
    code, out, err = interrupted.long
    assert code == 0 and "step 192 of 288" in out and "hopper-random-local.hdf5 is there already" in out, err


def test_a_run_in_pieces_is_the_same_run(collected, interrupted):
    """Networks, optimisers, random streams, counters, replay buffer, logs and datasets, bit for bit."""
    one, two = collected[0], interrupted.folder
    assert equal(resume_pt(one), resume_pt(two))
    for file in ("replay.bin", "metrics.csv", "evaluations.csv"):
        assert (one / RUN / file).read_bytes() == (two / RUN / file).read_bytes(), file
    for path in (one / "data").iterdir():  # by default datasets go to the script's folder
        (a, _), (b, _) = read(path), read(two / "data" / path.name)
        assert all((a[key] == b[key]).all() for key in a), path.name


def test_less_steps_choose_among_the_first_policies_and_nothing_is_overwritten(copy):
    code, out, err = collect(copy, "mini", total=192)
    path = copy / "data/hopper-mini.hdf5"
    assert code == 0 and read(path)[1]["policy_step"].tolist() == [0, 96, 192], err
    before = path.read_bytes()
    one_line(collect(copy, "mini"), 2, "was made otherwise (policy_step [0, 96, 192] there, [0, 96, 192, 288] here")
    assert path.read_bytes() == before


def test_a_nan_stops_the_training_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    calls = []

    def step(*_):
        calls.append(1)
        return torch.tensor([1.0, 1.0, 1.0, 1.0 if len(calls) < 60 else float("nan"), 1.0])

    monkeypatch.setattr(stage0.SAC, "step", step)
    result = collect(tmp_path, "random")
    one_line(result, 1, "NaN", "resume.pt is the last good state")
    assert "the same command continues" not in result[2]  # to the same NaN
    assert resume_pt(tmp_path)["progress"]["step"] == 96 and len(calls) == 96  # seen at step 144, with the next row
    assert "nan" not in (tmp_path / RUN / "metrics.csv").read_text()


# ---- refusals ----


@pytest.mark.parametrize("damage", ["cut short", "one bit", "missing"])
def test_a_damaged_replay_file_is_recognised(copy, damage):
    path = copy / RUN / "replay.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "one bit":
        path.write_bytes(content)
    elif damage == "cut short":
        os.truncate(path, len(content) - 1)
    else:
        path.unlink()
    one_line(collect(copy, "mini"), 2, "replay.bin: damaged", "288 transitions", "remove")
    assert not list((copy / "data").iterdir())


def test_a_run_folder_of_other_content_is_refused(copy):
    one_line(collect(copy, "mini", **{"num-envs": 8}), 2, "resume.pt is of another run (num_envs 4 there, 8 here)")
    with stage0.claim(copy / RUN):
        one_line(collect(copy, "mini"), 2, "another process is writing this run")
    (copy / RUN / "policy_0.pt").write_bytes(b"not a policy")
    one_line(collect(copy, "random"), 2, "policy_0.pt: damaged")


def test_a_medium_return_that_is_never_reached_says_so_and_keeps_the_rest(copy):
    result = collect(copy, *ALL, **{"medium-return": 3000})
    files = [f"hopper-{quality}-local.hdf5" for quality in ("medium-replay", "medium", "medium-expert")]
    one_line(result, 1, *(f"{file}: no policy reached --medium-return 3000" for file in files))
    names = {"hopper-random-local.hdf5", "hopper-expert-local.hdf5", "hopper-mini.hdf5"}
    assert {path.name for path in (copy / "data").iterdir()} == names


def test_bad_arguments(tmp_path, collected, monkeypatch):
    folder, _ = collected
    monkeypatch.setattr(stage0, "claim", None)  # would raise if it were called
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/hopper-random-local.hdf5").write_text("not HDF5")
    gymnasium.register("Endless-v0", "gymnasium.envs.mujoco.hopper_v4:HopperEnv")
    cases = [
        ({"env-id": "Hoper-v4"}, 2, "Hoper"),
        ({"env-id": "CartPole-v1"}, 2, "needs vectors, bounded actions and a time limit; has"),
        ({"env-id": "CarRacing-v3"}, 2, "--env-id CarRacing-v3"),
        ({"env-id": "Endless-v0"}, 2, "None"),
        ({"out-dir": tmp_path / "file"}, 1, "File exists"),
        ({"out-dir": "/proc/none"}, 1, "/proc/none"),
        ({"out-dir": tmp_path / "elsewhere"}, 2, "was made otherwise (env_id None there, Hopper-v4 here)"),
        ({"out-dir": folder / "data", "seed": 2}, 2, "was made otherwise (seed 1 there, 2 here)"),
        ({"out-dir": folder / "data", "transitions": 300}, 2, "was made otherwise (transitions 200 there, 300 here)"),
    ]
    for flags, code, says in cases:
        one_line(collect(tmp_path, "random", **flags), code, says)
    gymnasium.registry.pop("Endless-v0")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # a folder that cannot be written to: root writes everywhere
        one_line(collect(tmp_path, "random"), 2, "--out-dir", "cannot write there")
    of_tyro = "--total-steps 95, --transitions 0, --num-envs 0, --num-envs 49, --seed -1, --qualities, --exp-name ../x"
    for flags in [*of_tyro.split(", "), "--medium-return nan", "--total-steps 200 --eval-every 201"]:
        code, out, err = call(stage0, "--out-dir", tmp_path / "new", *flags.split())
        assert (code, out) == (2, "") and flags.split()[0] in err and "Traceback" not in err, (flags, err)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "elsewhere", "data"}


def test_a_buffer_larger_than_memory_is_one_line(tmp_path, monkeypatch):
    def zeros(*_):
        raise MemoryError("Unable to allocate 65.2 GiB")

    episodes = stage0.Episodes("Hopper-v4", 8, 10**18)
    monkeypatch.setattr(stage0, "Episodes", lambda *_, **__: episodes)
    monkeypatch.setattr(np, "zeros", zeros)
    one_line(collect(tmp_path, "random"), 1, "Unable to allocate 65.2 GiB")


def test_steps_that_the_environments_do_not_divide_and_files_without_an_episode(tmp_path, untrained):
    """7 environments pass 192 steps at 196: that policy counts. Reacher's 50 steps do not fit into 98 / 7."""
    code, _, err = collect(tmp_path, "mini", total=192, **{"num-envs": 7})
    assert code == 0 and read(tmp_path / "data/hopper-mini.hdf5")[1]["policy_step"].tolist() == [0, 98, 196], err
    flags = {"env-id": "Reacher-v5", "num-envs": 7, "transitions": 10}
    result = collect(tmp_path, "medium-replay", "mini", "expert", total=144, **flags)
    one_line(result, 1, "reacher_v5-medium-replay-local.hdf5: no whole", "reacher_v5-mini.hdf5: no whole episode")
    assert [path.name for path in (tmp_path / "data").glob("reacher*")] == ["reacher_v5-expert-local.hdf5"]


def test_a_file_that_another_process_wrote_meanwhile_is_kept_and_a_killed_ones_remains_go(tmp_path, capfd):
    path, rows = tmp_path / "x.hdf5", np.zeros(3, stage0.Episodes("Hopper-v4", 1, 0).row)
    rows["terminals"][-1] = True
    path.write_text("theirs")
    with pytest.raises(SystemExit):
        stage0.write_hdf5(path, rows, {})
    assert path.read_text() == "theirs" and "another process has written it" in capfd.readouterr().err
    path.rename(tmp_path / "x.hdf5.123.tmp")
    stage0.write_hdf5(path, rows, {})
    assert list(tmp_path.iterdir()) == [path]


# ---- the two minis that come with the code ----


@pytest.mark.parametrize("body", ["hopper", "halfcheetah"])
def test_the_minis_are_what_their_readme_says(body):
    path, readme = ROOT / "data" / f"{body}-mini.hdf5", (ROOT / "data/README.md").read_text()
    data, attributes = read(path)
    assert path.stat().st_size < 7 * 2**20 and attributes["env_id"] in stage0.BODY_IDS
    [row] = [line.split("|") for line in readme.splitlines() if line.startswith(f"| `{path.name}`")]
    flags = row[2].partition("collect_dataset.py")[2].strip(" `")
    assert attributes["command"].partition("collect_dataset.py ")[2].startswith(flags)
    ends = ends_of(data)
    returns = np.add.reduceat(data["rewards"], np.append(0, ends[:-1]), dtype=np.float64)
    assert (row[3].strip(), row[4].strip()) == (f"{len(data['rewards']):,}", str(len(ends)))
    assert row[5].strip() == f"{returns.min():,.0f} to {returns.max():,.0f}"
    assert f"| {body}-mini | {' | '.join(map(str, np.histogram(returns, 10)[0]))} |" in readme
    read_back = data_of(path.stem)
    assert len(read_back.rewards) == len(data["rewards"]) == ends[-1] and not read_back.task.is_d4rl
    assert (
        np.abs(data["actions"]).max() <= 1 and returns.max() - returns.min() > 3000
    )  # nothing was clipped by the reader


def test_rows_of_hopper_mini_are_steps_of_gymnasiums_hopper():
    """Put Gymnasium's own environment into the recorded state (x is not in it, and nothing depends on x), and step."""
    data, _ = read(ROOT / "data/hopper-mini.hdf5")
    inside, ends = np.ones(len(data["rewards"]), bool), ends_of(data)
    inside[ends - 1] = False
    inside[np.abs(data["observations"][:, 5:]).max(axis=1) >= 10] = False  # a clipped velocity is not the state's
    env = stage0.make_env("Hopper-v4")
    env.reset(seed=0)
    for i in np.random.default_rng(0).choice(np.flatnonzero(inside), 200, replace=False):
        obs = data["observations"][i].astype(np.float64)
        env.set_state(np.append(0.0, obs[:5]), obs[5:])
        following, reward, terminated, _, _ = env.step(data["actions"][i])
        np.testing.assert_allclose(following, data["observations"][i + 1], rtol=1e-3, atol=1e-3)
        assert reward == pytest.approx(data["rewards"][i], abs=1e-3) and not terminated
    for end in ends[:40]:
        obs = data["observations"][end - 1].astype(np.float64)
        if np.abs(obs[5:]).max() < 10:
            env.set_state(np.append(0.0, obs[:5]), obs[5:])
            assert env.step(data["actions"][end - 1])[2] == data["terminals"][end - 1]
