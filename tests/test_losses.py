"""Eq. 2, 5, 6, 7 and line 11 of Algorithm 1, against numbers worked out by hand."""

import copy
import math

import pytest
import torch
import train_qalign_dt as stage2

T, F_ = True, False


def batch_of(reward, terminal, valid, rtg=None, obs_dim=2, act_dim=1):
    reward = torch.tensor(reward)
    B, K = reward.shape
    g = torch.Generator().manual_seed(0)
    return stage2.Batch(
        torch.tensor(rtg) if rtg is not None else torch.zeros(B, K), torch.randn(B, K, obs_dim, generator=g),
        torch.rand(B, K, act_dim, generator=g) - 0.5, reward, torch.tensor(terminal), torch.arange(K).expand(B, K).clone(), torch.tensor(valid),
    )  # fmt: skip


# ---- Eq. 2 and the RTG range ----


def test_shift_moves_every_valid_token_by_the_same_amount():
    rtg, valid = torch.tensor([[3.0, 2.5, 1.0]]), torch.tensor([[T, T, T]])
    shifted, applied = stage2.shift_rtg(rtg, valid, torch.tensor([[0.5]]), (-1.0, 4.0))
    assert shifted.tolist() == [[3.5, 3.0, 1.5]] and applied.item() == 0.5


@pytest.mark.parametrize("shift, applied", [(9.0, 1.5), (-9.0, -3.5), (0.0, 0.0)])
def test_range_clamps_the_first_valid_token_and_the_rest_follows(shift, applied):
    rtg, valid = torch.tensor([[0.0, 2.5, 1.0]]), torch.tensor([[F_, T, T]])
    shifted, got = stage2.shift_rtg(rtg, valid, torch.tensor([[shift]]), (-1.0, 4.0))
    assert got.item() == pytest.approx(applied)
    assert shifted.tolist() == [[0.0, pytest.approx(2.5 + applied), pytest.approx(1.0 + applied)]]  # padding stays


def test_sign_is_that_of_the_shift_really_applied():
    """A window that already starts above the range is pulled down even by a positive delta."""
    rtg, valid = torch.tensor([[6.0, 5.0]]), torch.tensor([[T, T]])
    _, applied = stage2.shift_rtg(rtg, valid, torch.tensor([[0.5]]), (-1.0, 4.0))
    assert applied.sign().item() == -1


# ---- Eq. 7 ----


def test_critic_target_by_hand():
    batch = batch_of(
        reward=[[1.0, 2.0, 3.0], [0.0, 5.0, 7.0]],
        terminal=[[F_, F_, T], [F_, F_, F_]],  # first window ends the MDP; the second goes on beyond its end
        valid=[[T, T, T], [F_, T, T]],
    )
    q_next = torch.tensor([[10.0, 20.0, 30.0], [99.0, 40.0, 50.0]])
    y, mask = stage2.critic_target(batch, q_next, 0.99)
    assert mask.tolist() == [[True, True, True], [False, True, False]]
    assert y[mask].tolist() == pytest.approx([1 + 0.99 * 20, 2 + 0.99 * 30, 3, 5 + 0.99 * 50])
    # whatever stands behind a terminal does not count
    early = batch._replace(terminal=torch.tensor([[F_, T, F_], [F_, F_, F_]]))
    assert stage2.critic_target(early, q_next, 0.9)[0][0, :2].tolist() == pytest.approx([1 + 0.9 * 20, 2])


class Constant(torch.nn.Module):
    """A critic that returns Q_1 = bias_1, Q_2 = bias_2 plus the action's sum."""

    def __init__(self, *bias):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(bias).view(-1, 1, 1))

    def forward(self, obs, act):
        return self.bias + act.sum(-1)


class Echo(torch.nn.Module):
    """A policy whose action is its RTG token, so that what it was asked for can be read off the targets."""

    def forward(self, rtg, obs, act, timestep, valid):
        return rtg[..., None], obs


def test_critic_loss_takes_the_smaller_target_of_the_raised_request():
    batch = batch_of(reward=[[1.0, 2.0, 3.0]], terminal=[[F_, F_, F_]], valid=[[T, T, T]], rtg=[[3.0, 2.0, 1.0]])
    cfg = dict(delta_rtg=0.5, rtg_range=(-math.inf, math.inf), q_noise=0.0, gamma=0.9)
    critic, target = Constant(0.0, 1.0), Constant(20.0, 10.0)
    loss = stage2.critic_loss(critic, target, Echo(), batch, cfg, torch.Generator())
    y = [1 + 0.9 * (10 + 2.5), 2 + 0.9 * (10 + 1.5)]  # min_m Q'_m = 10 + a', a' = rtg + Delta_RTG
    a = batch.act[0, :2, 0].tolist()
    expected = sum((a[i] + m - y[i]) ** 2 for i in range(2) for m in (0.0, 1.0)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert critic.bias.grad is not None and target.bias.grad is None


def test_noise_enters_the_target_only():
    batch = batch_of(reward=[[0.0] * 400], terminal=[[F_] * 400], valid=[[T] * 400])
    cfg = dict(delta_rtg=0.0, rtg_range=(-math.inf, math.inf), q_noise=10.0, gamma=0.99)
    critic = Constant(0.0, 0.0)
    batch = batch._replace(act=torch.zeros_like(batch.act))
    loss = stage2.critic_loss(critic, Constant(0.0, 0.0), Echo(), batch, cfg, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(2 * (0.99 * 10) ** 2, rel=0.15)  # two critics, the variance of gamma * noise


# ---- Eq. 5 and 6 ----


def q_values(q1, q2):
    return torch.tensor([[q1], [q2]])  # (2, 1, K)


@pytest.mark.parametrize(
    "kind, sign, expected",
    [
        # Q_delta - Q: critic 1 (-3, 2, -1, 4), critic 2 (-1, 1, 2, 6)
        ("one-sided", 1.0, (1 + 0 + 0 + 0) / 4),  # raised: falls are violations, the smaller of the two counts
        ("one-sided", -1.0, (0 + 1 + 0 + 4) / 4),  # lowered: rises are
        ("one-sided", 0.0, 0.0),  # nothing was shifted
        ("squared", 1.0, (1 + 0 + 0 + 0) / 4),
        ("squared", -1.0, (0 + 1 + 0 + 16) / 4),
        ("symmetric", 1.0, (1 - 2 - 2 - 6) / 4),  # also rewards what is already in order
    ],
)
def test_alignment_loss_by_hand(kind, sign, expected):
    q = q_values([10.0, 10.0, 10.0, 10.0], [20.0, 20.0, 20.0, 20.0])
    q_delta = q + q_values([-3.0, 2.0, -1.0, 4.0], [-1.0, 1.0, 2.0, 6.0])
    loss, violated = stage2.alignment_loss(q_delta, q, torch.tensor([[sign]]), torch.ones(1, 4, dtype=torch.bool), kind)
    assert loss.item() == pytest.approx(expected)
    assert violated.item() == pytest.approx({1.0: 1 / 4, -1.0: 2 / 4, 0.0: 0.0}[sign])


def test_alignment_loss_ignores_padding():
    q = q_values([0.0, 0.0], [0.0, 0.0])
    q_delta = q_values([-100.0, -1.0], [-100.0, -1.0])
    loss, _ = stage2.alignment_loss(q_delta, q, torch.tensor([[1.0]]), torch.tensor([[False, True]]), "one-sided")
    assert loss.item() == 1.0


def actor_setup(**changes):
    torch.manual_seed(0)
    task = stage2.parse_env("hopper-medium-test")
    cfg = dict(
        embed_dim=16, n_layer=1, n_head=2, max_timestep=50, conv=True, lambda_e=1.0, sigma_e=1.0, rtg_range=(-math.inf, math.inf),
        alignment="one-sided", half_normal=False, q_scale=1.0,
    ) | changes  # fmt: skip
    policy = stage2.make_policy(task, cfg, False).eval()  # eval: no dropout, so both passes can be repeated
    critic = stage2.DoubleQ(task.obs_dim, task.act_dim, 16)
    with torch.no_grad():  # strong enough a reaction to the action for violations to occur
        critic.weights[0].mul_(4)
    batch = batch_of([[0.0] * 5] * 8, [[F_] * 5] * 8, [[T] * 5] * 8, obs_dim=task.obs_dim, act_dim=task.act_dim)
    return policy, critic, batch, cfg


def test_gradient_goes_through_the_perturbed_action_only_and_into_no_weight_of_q():
    policy, critic, batch, cfg = actor_setup(alignment="symmetric")  # active everywhere: a gradient cannot hide
    stage2.actor_loss(policy, critic, batch, cfg, torch.Generator().manual_seed(1))[0].backward()
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.requires_grad for p in critic.parameters())  # and the critic can still be trained afterwards

    # the same by hand: L_SL from the clean window; Q of the perturbed actions with Q frozen; Q of the clean ones a constant
    reference = copy.deepcopy(policy)
    reference.zero_grad()
    delta = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
    rest = (batch.obs, batch.act, batch.timestep, batch.valid)
    a_hat, s_hat = reference(batch.rtg, *rest)
    a_delta, _ = reference(batch.rtg + delta, *rest)
    p = -delta.sign() * (critic(batch.obs, a_delta) - critic(batch.obs, a_hat).detach())
    loss = ((a_hat - batch.act) ** 2).mean() + ((s_hat - batch.obs) ** 2).mean() + p.amin(0).mean()
    loss.backward()
    for ours, theirs in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_every_factor_of_the_actor_loss(monkeypatch):
    """sigma_e scales delta, the range bounds it, the sign is the applied shift's, q_scale divides Q, lambda_e weighs the rest."""
    policy, critic, batch, cfg = actor_setup(
        sigma_e=3.0, lambda_e=0.5, q_scale=7.0, rtg_range=(-1.0, 0.5), alignment="symmetric"
    )
    for p in policy.parameters():  # a policy that reacts to its RTG
        torch.nn.init.normal_(p, std=0.3)
    critic.weights[-1].data.mul_(1000)  # and a critic that L_align is not negligible with
    batch = batch._replace(rtg=torch.linspace(-1.0, 2.0, 8)[:, None].expand(8, 5).contiguous())
    loss, action_loss, state_loss, align, _, q_mean = stage2.actor_loss(
        policy, critic, batch, cfg, torch.Generator().manual_seed(1)
    )
    delta = 3.0 * torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
    applied = (batch.rtg[:, :1] + delta).clamp(-1.0, 0.5) - batch.rtg[:, :1]
    assert (applied.sign() != delta.sign()).any()
    rest = (batch.obs, batch.act, batch.timestep, batch.valid)
    q = critic(batch.obs, policy(batch.rtg, *rest)[0])
    q_delta = critic(batch.obs, policy(batch.rtg + applied, *rest)[0])
    expected = (-applied.sign() * (q_delta - q) / 7.0).amin(0).mean()
    assert align.item() == pytest.approx(expected.item(), rel=1e-4) and q_mean.item() == pytest.approx(
        q[0].mean().item(), rel=1e-4
    )
    assert loss.item() == pytest.approx((action_loss + state_loss + 0.5 * expected).item(), rel=1e-5)


def test_delta_rtg_stays_in_the_range_too():
    batch = batch_of(reward=[[1.0, 2.0, 3.0]], terminal=[[F_, F_, F_]], valid=[[T, T, T]], rtg=[[3.0, 2.0, 1.0]])
    asked = []

    class Listens(Echo):
        def forward(self, rtg, *rest):
            asked.append(rtg)
            return super().forward(rtg, *rest)

    cfg = dict(delta_rtg=5.0, rtg_range=(-1.0, 4.0), q_noise=0.0, gamma=0.99)
    stage2.critic_loss(Constant(0.0, 0.0), Constant(0.0, 0.0), Listens(), batch, cfg, torch.Generator())
    assert asked[0].tolist() == [[4.0, 3.0, 2.0]]


def test_critic_stays_float32_beside_a_bf16_policy(monkeypatch):
    policy, critic, batch, cfg = actor_setup()
    policy.bf16 = True
    seen, real = [], stage2.DoubleQ.forward

    def forward(self, obs, act):
        q = real(self, obs, act)
        seen.append((act.dtype, q.dtype, torch.is_autocast_enabled("cpu")))
        return q

    monkeypatch.setattr(stage2.DoubleQ, "forward", forward)
    stage2.actor_loss(policy, critic, batch, cfg, torch.Generator())
    cfg |= dict(delta_rtg=0.5, q_noise=0.0, gamma=0.99)
    stage2.critic_loss(critic, critic, policy, batch, cfg, torch.Generator())
    assert len(seen) == 4 and set(seen) == {(torch.float32, torch.float32, False)}


def test_lambda_0_is_the_supervised_loss_without_a_critic():
    policy, _, batch, cfg = actor_setup(lambda_e=0)
    loss, action_loss, state_loss, align, violated, _ = stage2.actor_loss(policy, None, batch, cfg, torch.Generator())
    a_hat, s_hat = policy(batch.rtg, batch.obs, batch.act, batch.timestep, batch.valid)
    assert action_loss.item() == pytest.approx(((a_hat - batch.act) ** 2).mean().item(), rel=1e-5)
    assert state_loss.item() == pytest.approx(((s_hat - batch.obs) ** 2).mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx(action_loss.item() + state_loss.item(), rel=1e-6) and align == violated == 0


def test_supervised_loss_means_over_valid_steps_and_dimensions():
    batch = batch_of([[0.0, 0.0]], [[F_, F_]], [[F_, T]])
    a_hat, s_hat = batch.act + 3.0, batch.obs + torch.tensor([1.0, 2.0])
    a_hat[:, 0] += 1e6
    action_loss, state_loss = stage2.supervised_loss(a_hat, s_hat, batch)
    assert action_loss.item() == pytest.approx(9.0, rel=1e-5) and state_loss.item() == pytest.approx(
        (1 + 4) / 2, rel=1e-5
    )


def test_half_normal_asks_for_more_only(monkeypatch):
    policy, critic, batch, cfg = actor_setup(half_normal=True)
    signs = []
    real = stage2.alignment_loss
    monkeypatch.setattr(
        stage2, "alignment_loss", lambda q_delta, q, sign, *rest: signs.append(sign) or real(q_delta, q, sign, *rest)
    )
    stage2.actor_loss(policy, critic, batch, cfg, torch.Generator().manual_seed(1))
    stage2.actor_loss(policy, critic, batch, cfg | {"half_normal": False}, torch.Generator().manual_seed(1))
    assert (signs[0] > 0).all() and (signs[1] < 0).any() and signs[0].shape == (8, 1)  # one delta per window


def test_training_on_the_alignment_loss_puts_pairs_in_order():
    """Trained for a critic that likes large actions, then for its opposite: the share of violated pairs must fall both times."""
    policy, _, batch, cfg = actor_setup(lambda_e=10.0, sigma_e=1.0)
    opt = torch.optim.Adam(policy.parameters(), lr=3e-3)

    class Sum(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, obs, act):
            return (self.sign * act.sum(-1)).expand(2, *act.shape[:-1])

    for sign in (1.0, -1.0):
        history = []
        for i in range(150):
            loss, *_, violated, _ = stage2.actor_loss(policy, Sum(sign), batch, cfg, torch.Generator().manual_seed(i))
            history.append(violated.item())
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert history[0] > 0.3 and max(history[-5:]) < 0.1, history
        assert sign == 1.0 or history[0] > 0.9  # it had learned the opposite order


# ---- the critic ----


def test_mish_is_torchs_own_with_its_derivative():
    x = torch.linspace(-60, 60, 100_001, requires_grad=True)
    ours, theirs = stage2.CPUMish.apply(x), torch.nn.functional.mish(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(stage2.CPUMish.apply, (torch.randn(50, dtype=torch.float64, requires_grad=True),))


def test_critic_is_two_separate_networks_of_nn_linear_and_nn_mish():
    torch.manual_seed(0)
    critic, obs, act = stage2.DoubleQ(4, 2, 64), torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    for m, q in enumerate(critic(obs, act)):
        x = torch.cat([obs, act], dim=-1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
            x = torch.nn.functional.linear(x, weight[m].T, bias[m, 0])
            x = torch.nn.functional.mish(x) if i < 3 else x
        torch.testing.assert_close(q, x.squeeze(-1), rtol=1e-5, atol=1e-6)
    for i, p in [(i, p) for i, layer in enumerate(zip(critic.weights, critic.biases)) for p in layer]:
        bound = critic.weights[i].shape[1] ** -0.5  # nn.Linear's: uniform in +- 1 / sqrt(inputs)
        assert p.abs().max() <= bound and (p.numel() < 100 or p.std().item() == pytest.approx(bound / 3**0.5, rel=0.1))
        assert not torch.equal(p[0], p[1])


def test_ema_update():
    target, online = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = [0.9 * t + 0.1 * o for t, o in zip(copy.deepcopy(target).parameters(), online.parameters())]
    stage2.ema_update(target, online, 0.1)
    for got, want in zip(target.parameters(), expected):
        torch.testing.assert_close(got, want)
