"""Stage 1: targets against tabular cases worked out by hand, and the level Q must reach."""

import json

import numpy as np
import pretrain_q as stage1
import pytest
import torch
from conftest import TINY1, write_hdf5

CPU = torch.device("cpu")
TASK = stage1.parse_env("hopper-medium-test")


def chain(tmp_path, terminal: bool, gamma: float = 0.99):
    """Two episodes: 3 steps with rewards 1, 2, 3, and 2 steps with rewards 4, 5 that end by timeout. The first ends as asked."""
    n = 5
    observations, actions = np.zeros((n, 11), np.float32), np.zeros((n, 3), np.float32)
    observations[:, 0] = np.arange(n)
    terminals = np.array([False, False, terminal, False, False])
    timeouts = np.array([False, False, not terminal, False, True])
    file = write_hdf5(
        tmp_path / "chain.hdf5", observations, actions, np.array([1, 2, 3, 4, 5], np.float32), terminals, timeouts
    )
    return stage1.Transitions(stage1.read_dataset(TASK, (str(file),)), TASK, CPU, gamma)


class Table(torch.nn.Module):
    """Q_m(row) from a table; rows are recognised by their first observation."""

    def __init__(self, data, q1, q2):
        super().__init__()
        self.keys, self.q = data.obs[:, 0], torch.tensor([q1, q2])

    def forward(self, obs, act):
        return self.q[:, torch.cdist(obs[:, :1], self.keys[:, None]).argmin(dim=1)]


def test_discounted_returns_by_hand():
    returns, to_last = stage1.discounted_returns(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([3, 5]), 0.9)
    g = 0.9
    np.testing.assert_allclose(returns, [1 + 2 * g + 3 * g**2, 2 + 3 * g, 3, 4 + 5 * g, 5])
    np.testing.assert_allclose(to_last, [g**2, g, 1, g, 1])


def test_episodes_are_ranked_by_discounted_and_by_plain_return(tmp_path):
    data = chain(tmp_path, terminal=True, gamma=0.5)
    np.testing.assert_allclose(data.episodes, [[1 + 2 * 0.5 + 3 * 0.25, 4 + 5 * 0.5], [6, 9]])
    critic = stage1.DoubleQ(11, 3, 8)
    result = stage1.report(critic, critic, None, data, dict(method="sarsa"))
    assert result["spearman_discounted_vs_plain_return"] == pytest.approx(1)
    timeouts = chain(tmp_path, terminal=False)  # short ones: no return of theirs is known
    result = stage1.report(critic, critic, None, timeouts, dict(method="sarsa"))
    assert result["q_mean"] is result["return_mean"] is result["spearman_q_vs_return"] is None


def test_sarsa_target_by_hand_and_timeouts_left_out(tmp_path):
    data = chain(tmp_path, terminal=True)
    table = Table(data, [10.0, 20.0, 30.0, 40.0, 50.0], [11.0, 19.0, 31.0, 41.0, 49.0])
    usable = torch.cat([data.train, data.held_out]).sort().values
    assert usable.tolist() == [0, 1, 2, 3]  # the timeout's last transition has no a' in the dataset
    y = stage1.sarsa_target(table, data, usable)
    assert y.tolist() == pytest.approx([1 + 0.99 * 19, 2 + 0.99 * 30, 3, 4 + 0.99 * 49])
    y = stage1.sarsa_target(table, chain(tmp_path, terminal=True, gamma=0.5), usable)
    assert y.tolist() == pytest.approx([1 + 0.5 * 19, 2 + 0.5 * 30, 3, 4 + 0.5 * 49])


def test_return_target_bootstraps_timeouts_only(tmp_path):
    g, q = 0.9, [0.0, 0.0, 30.0, 0.0, 50.0]
    data = chain(tmp_path, terminal=True, gamma=g)
    y = stage1.return_target(Table(data, q, q), data, torch.arange(4))
    assert y.tolist() == pytest.approx([1 + 2 * g + 3 * g**2, 2 + 3 * g, 3, 4 + 50 * g])
    data = chain(tmp_path, terminal=False, gamma=g)
    y = stage1.return_target(Table(data, q, q), data, torch.tensor([0, 1, 3]))
    assert y.tolist() == pytest.approx([1 + 2 * g + 30 * g**2, 2 + 30 * g, 4 + 50 * g])


def test_value_loss_by_hand(tmp_path):
    data = chain(tmp_path, terminal=True)
    table = Table(data, [10.0, 20.0, 0.0, 0.0, 0.0], [12.0, 19.0, 0.0, 0.0, 0.0])
    value = lambda obs: torch.tensor([[8.0, 20.0]])  # noqa: E731  u = 10 - 8 = 2 and 19 - 20 = -1
    loss = stage1.value_loss(value, table, data, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((0.8 * 4 + 0.2 * 1) / 2)


def test_iql_target_by_hand(tmp_path):
    data = chain(tmp_path, terminal=True, gamma=0.9)
    y = stage1.iql_target(lambda obs: torch.full((1, len(obs)), 7.0), data, torch.tensor([0, 2, 3]))
    assert y.tolist() == pytest.approx([1 + 0.9 * 7, 3, 4 + 0.9 * 7])


@pytest.mark.parametrize("extra", [["--warm-start-steps", 0, "--tau", 0.2], ["--warm-start-steps", 300, "--tau", 0.05]])
def test_sarsa_reaches_the_true_values_of_a_terminal_chain(tmp_path, run_main, extra):
    """Ten copies of the chain 1, 2, 3 -> end: Q must become the discounted return of each state."""
    n = 10
    observations = np.zeros((3 * n, 11), np.float32)
    observations[:, 0] = np.tile([0, 1, 2], n)
    end = np.tile([False, False, True], n)
    file = write_hdf5(
        tmp_path / "c.hdf5",
        observations,
        np.zeros((3 * n, 3), np.float32),
        np.tile([1.0, 2.0, 3.0], n).astype(np.float32),
        end,
        end & False,
    )
    argv = ["--env", "hopper-medium-test", "--dataset-path", file, "--runs-dir", tmp_path / "runs", "--device", "cpu"]
    code, out, err = run_main(
        stage1, *argv, "--critic-width", 32, "--batch-size", 32, "--lr", 0.003, "--total-steps", 600, *extra
    )
    assert code == 0, err
    checkpoint = torch.load(tmp_path / "runs/hopper-medium-test__pretrain_q__1/critic.pt", weights_only=True)
    critic = stage1.DoubleQ(11, 3, 32)
    critic.load_state_dict(checkpoint["critic"])
    obs = (torch.as_tensor(observations[:3]) - checkpoint["obs_mean"]) / checkpoint["obs_std"]
    q = critic(obs, torch.zeros(3, 3))
    expected = torch.tensor([1 + 2 * 0.99 + 3 * 0.99**2, 2 + 3 * 0.99, 3.0])
    torch.testing.assert_close(q, expected.expand(2, 3), rtol=0.03, atol=0.1)
    report = json.loads((tmp_path / "runs/hopper-medium-test__pretrain_q__1/report.json").read_text())
    assert report["q_mean"] == pytest.approx(report["return_mean"], rel=0.03) and report["spearman_q_vs_return"] > 0.9
    assert ("regress" in out) == ("300" in map(str, extra))


def test_short_runs_start_by_regression_and_long_ones_do_not():
    resolve = lambda **kw: stage1.resolve(stage1.Args(**kw), TASK)["warm_start_steps"]  # noqa: E731
    assert resolve() == 0 and resolve(total_steps=20_000) == 18_000 and resolve(total_steps=20_000, tau=0.1) == 0


def test_iql_runs_on_antmaze_and_stays_in_the_range_of_shifted_rewards(tmp_path, run_main, antmaze_file):
    argv = [
        "--env",
        "antmaze-umaze-test",
        "--dataset-path",
        antmaze_file,
        "--runs-dir",
        tmp_path,
        *TINY1,
        "--total-steps",
        400,
        "--lr",
        0.003,
        "--tau",
        0.05,
    ]
    code, out, err = run_main(stage1, *argv)
    assert code == 0, err
    report = json.loads((tmp_path / "antmaze-umaze-test__pretrain_q__1/report.json").read_text())
    assert report["config"]["method"] == "iql" and -100 < report["q_mean"] < 0 and report["q_abs_mean"] > 1
    assert report["spearman_q_vs_return"] > 0.3  # nearer to the goal is better


def test_float32_critic_keeps_the_sign_of_small_differences(tmp_path, run_main, hopper_file):
    """The alignment signal: sign of Q(a_delta) - Q(a), against the same critic in float64, at the level Q has in Hopper."""
    argv = ["--env", "hopper-medium-test", "--dataset-path", hopper_file, "--runs-dir", tmp_path, "--device", "cpu"]
    code, _, err = run_main(stage1, *argv, "--total-steps", 300, "--lr", 0.001)
    assert code == 0, err
    checkpoint = torch.load(tmp_path / "hopper-medium-test__pretrain_q__1/critic.pt", weights_only=True)
    critic = stage1.DoubleQ(11, 3, 256)
    critic.load_state_dict(checkpoint["critic"])
    with torch.no_grad():
        critic.biases[-1] += 250.0  # a large number, of which the difference is small
        g = torch.Generator().manual_seed(0)
        obs, act = torch.randn(200_000, 11, generator=g), torch.rand(200_000, 3, generator=g) * 2 - 1
        near = (act + 0.02 * torch.randn(act.shape, generator=g)).clamp(-1, 1)
        d32 = critic(obs, near) - critic(obs, act)
        critic.double()
        q64 = critic(obs.double(), act.double())
        d64 = critic(obs.double(), near.double()) - q64
    counted = d64.abs() > 1e-5 * q64.abs()
    assert counted.sum() > 100_000
    assert (d32.sign() == d64.sign())[counted].double().mean() >= 0.999
