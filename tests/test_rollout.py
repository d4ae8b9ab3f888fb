"""The simulator against Gymnasium's env.step, both rollouts against a plain loop (Sec. 6.2), scores and Eq. 8."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import data_of, task_of

import evaluate_alignment as stage3
import train_qalign_dt as stage2
import transfer_cheetah_vel as transfer

BODIES = ["hopper", "halfcheetah", "walker2d", "ant"]
TASK, K = task_of("hopper-medium-test"), 5
OBS_MEAN, OBS_STD = torch.linspace(-0.1, 0.1, 11), torch.linspace(0.8, 1.2, 11)


# ---- the simulator ----


@pytest.mark.parametrize("body", BODIES)
def test_simulator_equals_gymnasium(body):
    """Episodes with the same states and actions: all that a step returns, to 1e-10."""
    task, n = task_of(f"{body}-medium-test"), 4
    simulator = stage3.Simulator(task.env_id, range(n))
    envs = [stage3.make_env(task.env_id) for _ in range(n)]
    expected = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)])
    size = expected.shape[1]

    def check_observations(index, expected):
        got = simulator.observe(index)
        np.testing.assert_allclose(got[:, :size], expected, rtol=0, atol=1e-10)
        assert got.shape == (len(index), task.obs_dim) and not got[:, size:].any()

    check_observations(np.arange(n), expected)
    rng, alive, ended = np.random.default_rng(0), np.arange(n), 0
    for _ in range(80):
        actions = rng.uniform(-1, 1, (len(alive), task.act_dim)) * (0.3 if body in ("ant", "halfcheetah") else 1)
        observation, reward, terminated, velocity = simulator.step(alive, actions)
        for row, i in enumerate(alive):
            obs_i, reward_i, terminated_i, _, info = envs[i].step(actions[row])
            np.testing.assert_allclose(observation[row, :size], obs_i, rtol=0, atol=1e-10)
            assert not observation[row, size:].any()
            assert abs(reward[row] - reward_i) < 1e-10 and terminated[row] == terminated_i
            assert abs(velocity[row] - info["x_velocity"]) < 1e-10
        ended += int(terminated.sum())
        alive = alive[~terminated]
        if len(alive) == 0:
            break
    assert ended > 0 or body in ("halfcheetah", "ant")


def test_ant_that_jumps_too_high_is_terminated_as_in_gymnasium():
    simulator, env = stage3.Simulator("Ant-v4", [0]), stage3.make_env("Ant-v4").unwrapped
    env.reset(seed=0)
    simulator.qvel[0, 2] = env.data.qvel[2] = 3.0
    history = []
    for _ in range(12):
        history.append(bool(simulator.step(np.array([0]), np.zeros((1, 8)))[2][0]))
        assert history[-1] == env.step(np.zeros(8))[2]
    assert not history[0] and any(history)


def test_every_environment_that_is_no_body_is_stepped_as_gymnasium_does():
    """Through the simulator's interface: compared with it on one body, and on Pendulum, which has no MuJoCo model."""
    seeds = [3, 4, 5]
    lockstep, plain = (stage3.simulate(replace(TASK, env_kwargs=kwargs), seeds) for kwargs in ({}, {"width": 64}))
    assert type(lockstep) is stage3.Simulator and type(plain) is stage3.Environments
    recorded = replace(task_of("ant-medium-test"), body="", obs_dim=27)  # a Minari set: without D4RL's zeros
    assert stage3.simulate(recorded, [0]).observe([0]).shape == (1, 27)
    rng, alive = np.random.default_rng(1), np.arange(3)
    for _ in range(60):
        np.testing.assert_allclose(plain.observe(alive), lockstep.observe(alive), rtol=0, atol=1e-10)
        np.testing.assert_allclose(plain.qpos[alive], lockstep.qpos[alive], rtol=0, atol=1e-10)
        actions = rng.uniform(-1, 1, (len(alive), 3))
        ours, theirs = plain.step(alive, actions), lockstep.step(alive, actions)
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
        alive = alive[~ours[2]]
        if len(alive) < 2:
            break
    assert len(alive) < 3  # one has fallen
    task = replace(TASK, env_id="Pendulum-v1", body="", obs_dim=3, act_dim=1, horizon=5)
    mean, std = torch.zeros(3), torch.ones(3)
    result = stage3.rollout(trained_for(task, 3, mean, std), [-500.0, 0.0], [0, 7], task.horizon, "test")
    env = gymnasium.make("Pendulum-v1")
    observation, _ = env.reset(seed=7)
    torch.testing.assert_close(result.first_obs[1], torch.as_tensor(observation))
    reward = env.step(2 * result.first_act[1].numpy())[1]  # Pendulum's actions go from -2 to 2
    assert result.rewards[1, 0] == pytest.approx(reward, abs=1e-6)
    assert result.lengths.tolist() == [5, 5] and np.isnan(result.velocities).all() and np.isnan(result.velocity).all()


@pytest.mark.parametrize("ends", [(True, False), (False, True)], ids=["terminated", "truncated"])
def test_an_environments_own_end_ends_the_rollout(ends, monkeypatch):
    class EndsAfterTwo(gymnasium.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            assert self.steps <= 2
            observation, reward, *_, info = self.env.step(action)
            return observation, reward, *(x and self.steps == 2 for x in ends), info

    real, mean, std = stage3.make_env, torch.zeros(3), torch.ones(3)
    for stage in (stage2, stage3):
        monkeypatch.setattr(stage, "make_env", lambda *args: EndsAfterTwo(real(*args)))
    task = replace(TASK, env_id="Pendulum-v1", body="", obs_dim=3, act_dim=1, horizon=5, targets=(1.0,))
    trained = trained_for(task, 3, mean, std)
    assert stage3.rollout(trained, [0.0, 0.0], [0, 0], 5, "test").lengths.tolist() == [2, 2]
    config, data = stage2.Config(context_len=3, eval_rollouts=2), SimpleNamespace(obs_mean=mean, obs_std=std, task=task)
    stage2.evaluate(trained.policy, data, config)  # asks for no third step


def test_make_env_is_silent_and_leaves_no_file(tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    for body in BODIES:
        stage3.make_env(task_of(f"{body}-medium-test").env_id)
    out, err = capfd.readouterr()
    assert out == err == "" and not list(tmp_path.iterdir()) and not [w for w in recwarn if "v4" in str(w.message)]


# ---- rollouts ----


def trained_for(task, context_len=K, obs_mean=OBS_MEAN, obs_std=OBS_STD) -> stage3.Trained:
    """A random policy that reacts to its context, as load_policy returns it."""
    torch.manual_seed(0)
    policy = stage3.Policy(task.obs_dim, task.act_dim, 16, 2, 2, 1000).eval()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    content = dict(config=dict(max_timestep=1000), obs_mean=obs_mean, obs_std=obs_std)
    return stage3.Trained(Path("policy.pt"), task, policy, content, context_len)


@pytest.fixture(scope="module")
def trained():
    return trained_for(TASK)


def plain_episode(policy, target: float, seed: int):
    """One episode, one environment, contexts without padding, rtg <- rtg - r / 1000."""
    env, steps = stage3.make_env(TASK.env_id).unwrapped, []
    observation, _ = env.reset(seed=seed)
    rtg, obs, act = [target / 1000], [], []
    for t in range(1000):
        obs.append((torch.as_tensor(observation, dtype=torch.float32) - OBS_MEAN) / OBS_STD)
        act.append(torch.zeros(3))
        now = slice(max(0, t + 1 - K), t + 1)
        times = torch.arange(t + 1)[now][None]
        context = torch.tensor(rtg[now]).float(), torch.stack(obs[now]), torch.stack(act[now])
        with torch.no_grad():
            a_hat, _ = policy(*(x[None] for x in context), times, torch.ones_like(times).bool())
        act[-1] = a_hat[0, -1]
        observation, reward, terminated, _, info = env.step(act[-1].numpy().astype(np.float64))
        steps.append((reward, info["x_velocity"], *env.data.qpos))
        rtg.append(rtg[-1] - reward / 1000)
        if terminated:
            break
    return np.array(steps), obs[0], act[0]


def test_rollout_equals_a_plain_loop(trained):
    targets, seeds = [500.0, 3000.0, 3000.0], [0, 0, 7]
    result = stage3.rollout(trained, targets, seeds, TASK.horizon, "test", keep_qpos=True)
    for j in range(3):
        steps, first_obs, first_act = plain_episode(trained.policy, targets[j], seeds[j])
        n = len(steps)
        assert result.lengths[j] == n > K
        assert result.returns[j] == pytest.approx(steps[:, 0].sum(), abs=1e-3)
        assert result.velocity[j] == pytest.approx(steps[:, 1].mean(), abs=1e-4)
        per_step = np.column_stack([result.rewards[j], result.velocities[j], result.qpos[j]])
        np.testing.assert_allclose(per_step[:n], steps, rtol=0, atol=1e-3)
        assert np.isnan(per_step[n:]).all() and len(per_step) == TASK.horizon == 1000
        torch.testing.assert_close(result.first_obs[j], first_obs)
        torch.testing.assert_close(result.first_act[j], first_act, rtol=1e-4, atol=1e-5)
    assert result.returns[0] != result.returns[1]  # the target matters


def test_rollout_counts_down_by_a_reward_of_ones_own(trained):
    """A reward of 100 a step: the RTG falls by 0.1, as a target that falls by itself shows."""
    heard, act = [], trained.policy.act

    def listen(rtg, *rest):
        heard.append(rtg[0, -1].item())
        return act(rtg, *rest)

    trained.policy.act = listen
    try:
        result = stage3.rollout(trained, [500.0], [0], 6, "test", lambda velocities, actions: 100 + 0 * velocities)
    finally:
        del trained.policy.act
    assert heard == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-6)
    assert result.returns[0] == 600 and result.lengths[0] == 6


def test_stage_2s_evaluation_equals_stage_3s_rollout(trained):
    """The same mean scores for the same targets and seeds, with dropout off and no random stream touched."""
    targets, config = (400.0, 1500.0, 3000.0), stage2.Config(context_len=K, eval_rollouts=2, seed=3)
    policy = stage2.Policy(11, 3, 16, 2, 2, 1000)
    policy.load_state_dict(trained.policy.state_dict())
    data = SimpleNamespace(obs_mean=OBS_MEAN, obs_std=OBS_STD, task=replace(TASK, targets=targets))
    random_state = torch.get_rng_state()
    scores = stage2.evaluate(policy, data, config)
    assert torch.equal(torch.get_rng_state(), random_state) and policy.training
    seeds = 3 * [1_003_000, 1_003_001]
    returns = stage3.rollout(trained, np.repeat(targets, 2), seeds, TASK.horizon, "test").returns.reshape(3, 2)
    assert scores == pytest.approx((100 * (returns.mean(axis=1) + 20.272305) / (3234.3 + 20.272305)).tolist(), rel=1e-5)
    assert len(set(scores)) == 3 and (returns[:, 0] != returns[:, 1]).all()


def test_eval_context_len_reaches_stage_2s_and_stage_3s_policy(trained, hopper_file):
    """From the checkpoint's configuration; a baseline's has none of it, and its policy sees the whole window."""
    config = dict(embed_dim=16, n_layer=1, n_head=2, max_timestep=1000, conv=True, dropout=0.0)
    for make in (stage2.make_policy, stage3.make_policy, transfer.make_policy):
        assert make(TASK, config, False).recent == 0
        assert make(TASK, config | {"eval_context_len": 3}, False).recent == 3
    data, args = data_of(TASK.name, hopper_file), dict(critic_width=8, embed_dim=16, n_head=2, n_layer=1)
    for given, expected in ((None, 2), (0, 0), (3, 3)):
        given = stage2.Args(env=TASK.name, eval_context_len=given, **args)
        settings = stage2.resolve(given, data, torch.device("cpu"))
        learner = stage2.CoTraining(data.task, stage2.Windows(data, 4, torch.device("cpu")), settings)
        assert learner.policy.recent == learner.eval_policy.recent == expected


@pytest.mark.parametrize("body", ["halfcheetah", "ant"])
def test_stage_2s_evaluation_and_rollout_of_other_bodies(body):
    """Cut at the horizon, which the halfcheetah always reaches; Ant's observation has D4RL's 111 numbers."""
    n = 12
    task = replace(task_of(f"{body}-medium-test"), horizon=n, targets=(1000.0,))
    mean, std = torch.full((task.obs_dim,), 0.1), torch.full((task.obs_dim,), 2.0)
    trained = trained_for(task, 3, mean, std)
    policy = stage2.Policy(task.obs_dim, task.act_dim, 16, 2, 2, 1000)
    policy.load_state_dict(trained.policy.state_dict())
    data = SimpleNamespace(obs_mean=mean, obs_std=std, task=task)
    scores = stage2.evaluate(policy, data, stage2.Config(context_len=3, eval_rollouts=1, seed=1))
    result = stage3.rollout(trained, [1000.0], [1_001_000], n, "test")
    assert result.lengths.tolist() == [n]
    assert scores == pytest.approx(task.score(result.returns).tolist(), rel=1e-4)


def test_an_episode_is_1000_steps_long_at_most():
    """And the timestep embedding has an entry for every step."""
    config, seen = stage2.Config(context_len=1, eval_rollouts=1), []
    policy = stage2.Policy(17, 6, 8, 1, 1, config.max_timestep)

    def stand_still(rtg, obs, act, timestep, valid):
        seen.append(timestep.max().item())
        return torch.zeros(1, 6)

    policy.act = stand_still
    task = replace(task_of("halfcheetah-medium-test"), targets=(1000.0,))
    stage2.evaluate(policy, SimpleNamespace(obs_mean=torch.zeros(17), obs_std=torch.ones(17), task=task), config)
    assert seen == list(range(1000)) and task.horizon == policy.embed_time.num_embeddings == 1000


def test_make_policy_takes_every_size_of_the_configuration():
    config = dict(embed_dim=24, n_layer=3, n_head=4, max_timestep=7, conv=False, dropout=0.2)
    for make in (stage2.make_policy, stage3.make_policy, transfer.make_policy):
        for conv in (False, True):
            policy = make(task_of("hopper-medium-test"), config | {"conv": conv}, False)
            assert (len(policy.blocks), policy.blocks[0].heads, policy.dropout.p) == (3, 4, 0.2)
            assert policy.embed_time.weight.shape == (7, 24) and (policy.blocks[0].conv is not None) == conv


# ---- scores ----


def test_alignment_error_by_hand():
    scores, target_scores = np.array([10.0, 20.0, 30.0]), np.array([10.0, 23.0, 26.0])
    assert stage3.alignment_rmse(scores, target_scores) == pytest.approx(((0 + 9 + 16) / 3) ** 0.5)
