"""Lockstep rollouts against Gymnasium's own env.step, and the return-to-go bookkeeping of Sec. 6.2."""

import numpy as np
import pytest
import torch
import train_qalign_dt as stage2

BODIES = ["hopper", "halfcheetah", "walker2d", "ant"]


@pytest.mark.parametrize("body", BODIES)
def test_simulator_equals_gymnasium(body):
    """Five episodes with the same states and actions: observations, rewards, terminations to 1e-10."""
    task, n = stage2.parse_env(f"{body}-medium-test"), 5
    simulator = stage2.Simulator(task.env_id, range(n))
    envs = [stage2.make_env(task.env_id) for _ in range(n)]
    expected = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)])
    size = expected.shape[1]
    np.testing.assert_allclose(simulator.observe(range(n))[:, :size], expected, rtol=0, atol=1e-10)
    rng, alive, ended = np.random.default_rng(0), np.arange(n), 0
    for _ in range(150):
        actions = rng.uniform(-1, 1, (len(alive), task.act_dim))
        if body in ("ant", "halfcheetah"):
            actions *= 0.3
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
    task = stage2.parse_env("ant-medium-test")
    simulator, env = stage2.Simulator(task.env_id, [0]), stage2.make_env(task.env_id)
    env.reset(seed=0)
    for data in (simulator.sims[0], env.data):
        data.qvel[2] = 3.0
    history = []
    for _ in range(12):
        history.append(bool(simulator.step(np.array([0]), np.zeros((1, 8)))[2][0]))
        assert history[-1] == env.step(np.zeros(8))[2]
    assert not history[0] and any(history)


def test_make_env_is_silent_and_leaves_no_file(tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    for body in BODIES:
        stage2.make_env(stage2.parse_env(f"{body}-medium-test").env_id)
    out, err = capfd.readouterr()
    assert out == err == "" and not list(tmp_path.iterdir()) and not [w for w in recwarn if "v4" in str(w.message)]


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = stage2.Policy(11, 3, 16, 2, 2, stage2.HORIZON)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return policy.train()


def test_rollout_equals_one_environment_at_a_time(policy):
    """The same policy, driven by hand through Gymnasium: unpadded contexts, rtg <- rtg - r / 1000."""
    task, K = stage2.parse_env("hopper-medium-test"), 5
    mean, std = torch.linspace(-0.1, 0.1, 11), torch.linspace(0.8, 1.2, 11)
    targets, seeds = [500.0, 3000.0, 3000.0], [0, 0, 7]
    result = stage2.rollout(policy, task, targets, seeds, K, mean, std, keep_qpos=True)
    assert policy.training  # left as it was
    policy.eval()
    for j in range(3):
        env = stage2.make_env(task.env_id)
        observation, _ = env.reset(seed=seeds[j])
        rtg, obs, act, total, steps = [targets[j] / 1000], [], [], 0.0, []
        for t in range(stage2.HORIZON):
            obs.append((torch.as_tensor(observation, dtype=torch.float32) - mean) / std)
            act.append(torch.zeros(3))
            k = slice(max(0, t + 1 - K), t + 1)
            times = torch.arange(t + 1)[k][None]
            with torch.no_grad():
                a, _ = policy(
                    torch.tensor(rtg[k])[None].float(),
                    torch.stack(obs[k])[None],
                    torch.stack(act[k])[None],
                    times,
                    torch.ones_like(times).bool(),
                )
            act[-1] = a[0, -1]
            observation, reward, terminated, _, info = env.step(a[0, -1].numpy().astype(np.float64))
            steps.append((reward, info["x_velocity"], *env.data.qpos))
            total += reward
            rtg.append(rtg[-1] - reward / 1000)
            if terminated:
                break
        assert result.lengths[j] == t + 1 > K
        assert result.returns[j] == pytest.approx(total, abs=1e-3)
        assert result.velocity[j] == pytest.approx(np.mean([v for _, v, *_ in steps]), abs=1e-4)
        per_step = np.column_stack([result.rewards[j], result.velocities[j], result.qpos[j]])
        np.testing.assert_allclose(per_step[: t + 1], steps, rtol=0, atol=1e-3)
        assert np.isnan(per_step[t + 1 :]).all()
        torch.testing.assert_close(result.first_obs[j], obs[0])
        torch.testing.assert_close(result.first_act[j], act[0], rtol=1e-4, atol=1e-5)
    assert result.returns[0] != result.returns[1]  # the target matters


def test_an_episode_is_1000_steps_long_at_most():
    """HalfCheetah never ends by itself, and the timestep embedding has an entry for every step."""
    torch.manual_seed(0)
    cheetah = stage2.Policy(17, 6, 8, 1, 1, stage2.HORIZON)
    result = stage2.rollout(
        cheetah, stage2.parse_env("halfcheetah-medium-test"), [1000.0], [0], 3, torch.zeros(17), torch.ones(17)
    )
    assert result.lengths.tolist() == [1000]


def test_stop_is_heard(policy):
    stop = type("Stop", (), {"requested": True})()
    task = stage2.parse_env("halfcheetah-medium-test")
    cheetah = stage2.Policy(17, 6, 16, 1, 2, stage2.HORIZON)
    assert stage2.rollout(cheetah, task, [1000.0], [0], 5, torch.zeros(17), torch.ones(17), stop=stop) is None
