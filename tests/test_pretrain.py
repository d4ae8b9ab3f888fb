"""Stage 1: targets against tabular cases worked out by hand, and the level that Q must reach."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY1, argv, data_of, task_of, write_hdf5

import pretrain_q as stage1

CPU = torch.device("cpu")
TASK = task_of("hopper-medium-test")


def chain(terminal: bool, gamma: float = 0.99) -> stage1.Transitions:
    """Two episodes: rewards 1, 2, 3, which ends as asked, and rewards 4, 5, which ends by timeout."""
    content = dict(observations=torch.zeros(5, 11), actions=torch.zeros(5, 3), rewards=torch.arange(1.0, 6.0))
    content["observations"][:, 0] = torch.arange(5)
    content |= dict(terminals=torch.tensor([False, False, terminal, False, False]), ends=torch.tensor([3, 5]))
    content |= dict(obs_mean=torch.zeros(11), obs_std=torch.ones(11), task=vars(TASK))
    return stage1.Transitions(stage1.Dataset(content), CPU, gamma)


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


def test_sarsa_target_by_hand_and_timeouts_left_out():
    data = chain(terminal=True)
    table = Table(data, [10.0, 20.0, 30.0, 40.0, 50.0], [11.0, 19.0, 31.0, 41.0, 49.0])
    assert data.usable.tolist() == [0, 1, 2, 3]  # the timeout's last transition has no a' in the dataset
    assert chain(terminal=False).usable.tolist() == [0, 1, 3]
    for gamma in (0.99, 0.5):
        y = stage1.sarsa_target(table, chain(terminal=True, gamma=gamma), data.usable)
        assert y.tolist() == pytest.approx([1 + gamma * 19, 2 + gamma * 30, 3, 4 + gamma * 49])


def test_a_terminal_in_the_very_last_row_has_no_successor():
    data = chain(terminal=True)
    data.terminal[4] = True
    y = stage1.sarsa_target(Table(data, [9.0] * 5, [9.0] * 5), data, torch.tensor([4]))
    assert y.tolist() == [5.0]


def test_return_target_bootstraps_timeouts_only():
    g, q = 0.9, [0.0, 0.0, 30.0, 0.0, 50.0]
    data = chain(terminal=True, gamma=g)
    y = stage1.return_target(Table(data, q, [99.0] * 5), data, torch.arange(4))
    assert y.tolist() == pytest.approx([1 + 2 * g + 3 * g**2, 2 + 3 * g, 3, 4 + 50 * g])
    data = chain(terminal=False, gamma=g)
    y = stage1.return_target(Table(data, [99.0] * 5, q), data, torch.tensor([0, 1, 3]))
    assert y.tolist() == pytest.approx([1 + 2 * g + 30 * g**2, 2 + 30 * g, 4 + 50 * g])


def test_td_loss_sums_over_the_critics_by_hand():
    data = chain(terminal=True)
    critic = Table(data, [1.0, 2.0, 0.0, 0.0, 0.0], [3.0, 6.0, 0.0, 0.0, 0.0])
    loss, q_mean = stage1.td_loss(critic, data, torch.tensor([0, 1]), torch.tensor([2.0, 4.0]))
    assert loss.item() == pytest.approx((1 + 4) / 2 + (1 + 4) / 2) and q_mean.item() == 1.5


def test_value_loss_by_hand():
    data = chain(terminal=True)
    table = Table(data, [10.0, 20.0, 0.0, 0.0, 0.0], [12.0, 19.0, 0.0, 0.0, 0.0])
    value = torch.tensor([[8.0, 20.0]], requires_grad=True)  # u = 10 - 8 = 2 and 19 - 20 = -1
    loss = stage1.value_loss(lambda obs: value, table, data, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((0.8 * 4 + 0.2 * 1) / 2)
    loss.backward()
    assert value.grad.tolist() == [pytest.approx([-0.8 * 2 * 2 / 2, 0.2 * 2 * 1 / 2])]


def test_iql_target_by_hand():
    data = chain(terminal=True, gamma=0.9)
    y = stage1.iql_target(lambda obs: torch.full((1, len(obs)), 7.0), data, torch.tensor([0, 2, 3]))
    assert y.tolist() == pytest.approx([1 + 0.9 * 7, 3, 4 + 0.9 * 7])


def test_episodes_are_ranked_by_discounted_and_by_plain_return():
    data, critic = chain(terminal=True, gamma=0.5), stage1.Ensemble(2, 14, 8)
    np.testing.assert_allclose(data.episode_returns, [[1 + 2 * 0.5 + 3 * 0.25, 4 + 5 * 0.5], [6, 9]])
    result = stage1.report(SimpleNamespace(critic=critic, data=data))
    assert result["spearman_discounted_vs_plain_return"] == pytest.approx(1)
    assert result["return_mean"] == pytest.approx((2.75 + 3.5 + 3) / 3)  # of the transitions whose return is known


def test_that_no_return_is_known_is_said(tmp_path, run_main, hopper_arrays):
    columns = (*hopper_arrays[:3], 0 * hopper_arrays[3], hopper_arrays[3] | hopper_arrays[4])
    file = write_hdf5(tmp_path / "x.hdf5", *columns)
    code, out, err = run_main(stage1, *argv(file, tmp_path / "runs", *TINY1))
    assert code == 0 and "Q is not checked" in out and "mean Q" not in out, err


def test_report_where_no_return_is_known():
    data, critic = chain(terminal=False), stage1.Ensemble(2, 14, 8)  # short episodes that end by timeout
    result = stage1.report(SimpleNamespace(critic=critic, data=data))
    assert result["q_mean"] is result["return_mean"] is result["spearman_q_vs_return"] is None
    q = critic(data.obs, data.act).amin(dim=0)
    assert result["q_abs_mean"] == pytest.approx(q.abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("warm_start_steps, tau", [(0, 0.4), (150, 0.1)])
def test_sarsa_reaches_the_true_values_of_a_terminal_chain(warm_start_steps, tau, tmp_path, run_main, monkeypatch):
    """Ten copies of the chain 1, 2, 3 -> end: Q must become the discounted return of each state."""
    monkeypatch.setattr(stage1, "TAU", tau)
    observations, end = np.zeros((30, 11), np.float32), np.tile([False, False, True], 10)
    observations[:, 0] = np.tile([0, 1, 2], 10)
    rewards, actions = np.tile([1.0, 2.0, 3.0], 10).astype(np.float32), np.zeros((30, 3), np.float32)
    file = write_hdf5(tmp_path / "chain.hdf5", observations, actions, rewards, end, end & False)
    argv = ["--env", TASK.name, "--dataset-path", file, "--runs-dir", tmp_path, "--device", "cpu", "--lr", 0.003]
    argv += ["--critic-width", 32, "--batch-size", 32, "--total-steps", 300, "--warm-start-steps", warm_start_steps]
    code, out, err = run_main(stage1, *argv)
    assert code == 0, err
    assert ("regress on discounted returns" in out) == (warm_start_steps > 0)
    folder = tmp_path / f"{TASK.name}__pretrain_q__1"
    critic = stage1.Ensemble(2, 14, 32)
    critic.load_state_dict(torch.load(folder / "critic.pt", weights_only=True)["critic"])
    data = data_of(TASK.name, file)
    q = critic((torch.as_tensor(observations[:3]) - data.obs_mean) / data.obs_std, torch.zeros(3, 3))
    expected = torch.tensor([1 + 2 * 0.99 + 3 * 0.99**2, 2 + 3 * 0.99, 3.0])
    torch.testing.assert_close(q, expected.expand(2, 3), rtol=0.03, atol=0.1)
    report = json.loads((folder / "report.json").read_text())
    assert report["q_mean"] == pytest.approx(report["return_mean"], rel=0.03)
    assert report["return_mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert report["spearman_q_vs_return"] > 0.9


def test_short_runs_start_by_regression_and_long_ones_do_not(monkeypatch):
    def warm_start_steps(**changes):
        return stage1.resolve(stage1.Args(**changes), TASK, CPU).warm_start_steps

    assert warm_start_steps() == 0 and warm_start_steps(total_steps=20_000) == 18_000
    assert warm_start_steps(total_steps=20_000, warm_start_steps=5) == 5
    assert warm_start_steps(total_steps=20_000, method="iql") == 0
    monkeypatch.setattr(stage1, "TAU", 0.1)  # a target that follows sooner
    assert warm_start_steps(total_steps=20_000) == 0


def test_iql_runs_on_antmaze_and_stays_in_the_range_of_shifted_rewards(tmp_path, run_main, antmaze_file, monkeypatch):
    monkeypatch.setattr(stage1, "TAU", 0.1)
    argv = ["--env", "antmaze-umaze-test", "--dataset-path", antmaze_file, "--runs-dir", tmp_path, "--device", "cpu"]
    argv += ["--critic-width", 16, "--batch-size", 32, "--total-steps", 300, "--lr", 0.005]
    code, _, err = run_main(stage1, *argv)
    assert code == 0, err
    report = json.loads((tmp_path / "antmaze-umaze-test__pretrain_q__1/report.json").read_text())
    assert report["config"]["method"] == "iql" and -100 < report["q_mean"] < 0 and report["q_abs_mean"] > 1
    assert report["spearman_q_vs_return"] > 0.3  # nearer to the goal is better


def test_float32_critic_keeps_the_sign_of_small_differences():
    """Eq. 5's signal, the sign of Q(a_delta) - Q(a), against float64, at the level that Q has in Hopper."""
    torch.manual_seed(0)
    critic, n = stage1.Ensemble(2, 14, 64), 20_000
    with torch.no_grad():
        critic.weights[-1] *= 100
        critic.biases[-1] += 250  # a large number, of which the difference is small
        obs, act = torch.randn(n, 11), torch.rand(n, 3) * 2 - 1
        near = (act + 0.02 * torch.randn(n, 3)).clamp(-1, 1)
        d32 = critic(obs, near) - critic(obs, act)
        critic.double()
        q64 = critic(obs.double(), act.double())
        d64 = critic(obs.double(), near.double()) - q64
    counted = d64.abs() > 1e-5 * q64.abs()
    assert counted.sum() > n and d64[counted].abs().median() < 1e-3 * q64.mean()  # of 2 n; all of them small
    assert (d32.sign() == d64.sign())[counted].double().mean() >= 0.999
