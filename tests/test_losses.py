"""Sampling, Eq. 2, 5, 6, 7 and line 11 of Algorithm 1, against numbers worked out by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import task_of

import train_qalign_dt as stage2

T, F_ = True, False
TASK = task_of("hopper-medium-test")


def config(**changes) -> stage2.Config:
    fields = dict(embed_dim=16, n_layer=1, n_head=2, max_timestep=50, critic_width=16)
    fields |= dict(lambda_e=1.0, sigma_e=1.0, delta_rtg=0.0, rtg_range=(-1e6, 1e6), dropout=0.1)
    return stage2.Config(**(fields | changes))


def batch_of(reward, terminal, valid, rtg=None, obs_dim=2, act_dim=1) -> stage2.Batch:
    reward, g = torch.tensor(reward), torch.Generator().manual_seed(0)
    B, K = reward.shape
    return stage2.Batch(
        rtg=torch.zeros(B, K) if rtg is None else torch.tensor(rtg),
        obs=torch.randn(B, K, obs_dim, generator=g),
        act=torch.rand(B, K, act_dim, generator=g) - 0.5,
        timestep=torch.arange(K).expand(B, K).clone(),
        valid=torch.tensor(valid),
        reward=reward,
        terminal=torch.tensor(terminal),
    )


def rtg_window(rtg, valid) -> stage2.Batch:
    return batch_of([[0.0] * len(rtg)], [[F_] * len(rtg)], [valid], rtg=[rtg])


def generator(seed=1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- windows ----


def test_windows_start_at_every_transition_and_end_with_their_episode():
    """Episodes of 3 and 4 steps, K = 3: [i, min(i + K, T)), left-padded."""
    rewards, ends = np.arange(1, 8, dtype=np.float32), np.array([3, 7])
    terminals = rewards == 3
    tensors = dict(observations=torch.ones(7, 11), actions=torch.ones(7, 3), rewards=torch.as_tensor(rewards))
    tensors |= dict(terminals=torch.as_tensor(terminals), ends=torch.as_tensor(ends))
    tensors |= dict(obs_mean=torch.zeros(11), obs_std=torch.ones(11))
    windows = stage2.Windows(stage2.Dataset(tensors | {"task": vars(TASK)}), 3, torch.device("cpu"))
    batch = windows.sample(200, generator())
    rows = {tuple(row) for row in batch.reward.tolist()}
    assert rows == {(1, 2, 3), (0, 2, 3), (0, 0, 3), (4, 5, 6), (5, 6, 7), (0, 6, 7), (0, 0, 7)}
    assert torch.equal(batch.valid, batch.reward > 0) and torch.equal(batch.terminal, batch.reward == 3)
    rtg = {tuple(row) for row in (1000 * batch.rtg).round().tolist()}
    assert rtg == {(6, 5, 3), (0, 5, 3), (0, 0, 3), (22, 18, 13), (18, 13, 7), (0, 13, 7), (0, 0, 7)}


# ---- Eq. 2 and the RTG range ----


def test_shift_moves_every_valid_token_by_the_same_amount():
    batch = rtg_window([3.0, 2.5, 1.0], [T, T, T])
    (rtg, *rest), applied = stage2.shift_rtg(batch, torch.tensor([[0.5]]), (-1.0, 4.0))
    assert rtg.tolist() == [[3.5, 3.0, 1.5]] and applied.tolist() == [[0.5]]
    for x, y in zip(rest, (batch.obs, batch.act, batch.timestep, batch.valid), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shift, applied", [(9.0, 1.5), (-9.0, -3.5), (0.0, 0.0)])
def test_range_clamps_the_first_valid_rtg_and_the_others_follow(shift, applied):
    batch = rtg_window([0.0, 2.5, 1.0], [F_, T, T])
    (rtg, *_), got = stage2.shift_rtg(batch, torch.tensor([[shift]]), (-1.0, 4.0))
    assert got.item() == pytest.approx(applied)
    assert rtg.tolist() == [[0.0, pytest.approx(2.5 + applied), pytest.approx(1.0 + applied)]]  # padding stays


def test_a_window_above_the_range_is_pulled_down_even_by_a_positive_delta():
    _, applied = stage2.shift_rtg(rtg_window([6.0, 5.0], [T, T]), torch.tensor([[0.5]]), (-1.0, 4.0))
    assert applied.item() == pytest.approx(-2.0)


# ---- Eq. 7 ----


def test_critic_target_by_hand():
    batch = batch_of(
        reward=[[1.0, 2.0, 3.0], [0.0, 5.0, 7.0]],
        terminal=[[F_, F_, T], [F_, F_, F_]],  # the first window ends the MDP, the second episode goes on beyond it
        valid=[[T, T, T], [F_, T, T]],
    )
    q_next = torch.tensor([[10.0, 20.0, 30.0], [99.0, 40.0, 50.0]])
    y, mask = stage2.critic_target(batch, q_next, 0.99)
    assert mask.tolist() == [[True, True, True], [False, True, False]]
    assert y[mask].tolist() == pytest.approx([1 + 0.99 * 20, 2 + 0.99 * 30, 3, 5 + 0.99 * 50])
    early = batch._replace(terminal=torch.tensor([[F_, T, F_], [F_, F_, F_]]))  # nothing after a terminal counts
    assert stage2.critic_target(early, q_next, 0.9)[0][0, :2].tolist() == pytest.approx([1 + 0.9 * 20, 2])


class Constant(torch.nn.Module):
    """A critic with Q_m = bias_m + the sum of the action."""

    def __init__(self, *bias):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(bias).view(-1, 1, 1))

    def forward(self, obs, act):
        return self.bias + act.sum(-1)


class Echo(torch.nn.Module):
    """A policy whose action is its RTG token, which the targets therefore show."""

    def forward(self, rtg, obs, act, timestep, valid):
        return rtg[..., None], obs


def test_critic_loss_by_hand():
    """The smaller target at the raised RTG; no padding, no last step without a successor, no value after a terminal."""
    rtg = [[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]
    batch = batch_of([[0.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[F_] * 3, [F_, F_, T]], [[F_, T, T], [T, T, T]], rtg)
    critic, target, policy = Constant(0.0, 1.0), Constant(20.0, 10.0), Echo()
    loss = stage2.critic_loss(critic, target, policy, batch, 0.9, config(delta_rtg=0.5), generator())
    # min_m Q'_m = 10 + a', a' = rtg + Delta_RTG
    y = {(0, 1): 2 + 0.9 * (10 + 1.5), (1, 0): 4 + 0.9 * (10 + 2.5), (1, 1): 5 + 0.9 * (10 + 1.5), (1, 2): 6}
    expected = sum((batch.act[i].item() + bias - y[i]) ** 2 for i in y for bias in (0.0, 1.0)) / len(y)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert critic.bias.grad is not None and target.bias.grad is None


def test_delta_rtg_stays_in_the_range_too():
    batch, heard = rtg_window([3.0, 2.0, 1.0], [T, T, T]), []

    class Listener(Echo):
        def forward(self, rtg, *rest):
            heard.append(rtg)
            return super().forward(rtg, *rest)

    settings = config(delta_rtg=5.0, rtg_range=(-1.0, 4.0))
    stage2.critic_loss(Constant(0.0, 0.0), Constant(0.0, 0.0), Listener(), batch, 0.99, settings, generator())
    assert heard[0].tolist() == [[4.0, 3.0, 2.0]]


def test_noise_enters_the_target_only():
    batch = batch_of([[0.0] * 400], [[F_] * 400], [[T] * 400])
    batch = batch._replace(act=torch.zeros_like(batch.act))
    zero = Constant(0.0, 0.0)
    loss = stage2.critic_loss(zero, zero, Echo(), batch, 0.99, config(q_noise=10.0), generator(0))
    assert loss.item() == pytest.approx(2 * (0.99 * 10) ** 2, rel=0.15)  # two critics, the variance of gamma * noise


# ---- Eq. 5 and 6 ----


def q_values(q1, q2):
    return torch.tensor([[q1], [q2]])  # (2, 1, K)


@pytest.mark.parametrize(
    "kind, sign, expected",
    [
        # Q_delta - Q: critic 1 (-3, 2, -1, 4), critic 2 (-1, 1, 2, 6)
        ("one-sided", 1.0, (1 + 0 + 0 + 0) / 4),  # RTG raised: falls are violations, the smaller of the two counts
        ("one-sided", -1.0, (0 + 1 + 0 + 4) / 4),  # lowered: rises are
        ("one-sided", 0.0, 0.0),  # nothing was shifted
        ("squared", 1.0, (9 + 1 + 0 + 0 + 1 + 0 + 0 + 0) / 2 / 4),  # the mean over the critics
        ("squared", -1.0, (0 + 0 + 4 + 1 + 0 + 4 + 16 + 36) / 2 / 4),
        ("symmetric", 1.0, (3 + 1 - 2 - 1 + 1 - 2 - 4 - 6) / 2 / 4),  # also rewards what is already in order
        ("symmetric", -1.0, (-3 - 1 + 2 + 1 - 1 + 2 + 4 + 6) / 2 / 4),
    ],
)
def test_alignment_loss_by_hand(kind, sign, expected):
    q = q_values([10.0, 10.0, 10.0, 10.0], [20.0, 20.0, 20.0, 20.0])
    q_delta = q + q_values([-3.0, 2.0, -1.0, 4.0], [-1.0, 1.0, 2.0, 6.0])
    loss, violated = stage2.alignment_loss(q_delta, q, torch.tensor([[sign]]), torch.ones(1, 4).bool(), kind)
    assert loss.item() == pytest.approx(expected)
    assert violated.item() == pytest.approx({1.0: 1 / 4, -1.0: 2 / 4, 0.0: 0.0}[sign])  # by both critics


def test_alignment_loss_ignores_padding():
    q_delta = q_values([-100.0, -1.0], [-100.0, -1.0])
    loss, violated = stage2.alignment_loss(
        q_delta, 0 * q_delta, torch.tensor([[1.0]]), torch.tensor([[F_, T]]), "one-sided"
    )
    assert loss.item() == 1.0 and violated.item() == 1.0


def test_alignment_loss_has_no_gradient_in_the_clean_q():
    q, q_delta = (torch.full((2, 1, 1), x, requires_grad=True) for x in (3.0, 1.0))
    stage2.alignment_loss(q_delta, q, torch.ones(1, 1), torch.ones(1, 1).bool(), "symmetric")[0].backward()
    assert q.grad is None and q_delta.grad.tolist() == [[[-0.5]], [[-0.5]]]


def actor_setup(B=8, K=5, **changes):
    torch.manual_seed(0)
    settings = config(**changes)
    policy = stage2.make_policy(TASK, vars(settings), False).eval()  # no dropout, so both passes can be repeated
    critic = stage2.Ensemble(2, TASK.obs_dim + TASK.act_dim, 16)
    for p in policy.parameters():  # a policy that reacts to its RTG
        torch.nn.init.normal_(p, std=0.3)
    batch = batch_of([[0.0] * K] * B, [[F_] * K] * B, [[T] * K] * B, obs_dim=TASK.obs_dim, act_dim=TASK.act_dim)
    return policy, critic, batch, settings


def context(batch):
    return batch.obs, batch.act, batch.timestep, batch.valid


def test_gradient_goes_through_the_perturbed_action_only_and_into_no_weight_of_q():
    policy, critic, batch, settings = actor_setup(alignment="symmetric")  # active everywhere: no gradient can hide
    with torch.no_grad():
        critic.weights[-1].mul_(30)  # L_align is no smaller than L_SL
    stage2.actor_loss(policy, critic, batch, 1.0, settings, generator())[0].backward()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())  # it can still be trained afterwards

    # by hand: L_SL of the clean windows; Q of the perturbed actions; Q of the clean ones as a constant
    reference, delta = copy.deepcopy(policy), torch.randn(8, 1, generator=generator())
    reference.zero_grad()
    a_hat, s_hat = reference(batch.rtg, *context(batch))
    a_delta, _ = reference(batch.rtg + delta, *context(batch))
    p = -delta.sign() * (critic(batch.obs, a_delta) - critic(batch.obs, a_hat).detach())
    (((a_hat - batch.act) ** 2).mean() + ((s_hat - batch.obs) ** 2).mean() + p.mean()).backward()
    for ours, theirs in zip(policy.parameters(), reference.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_alignment_loss_pushes_actions_at_most_max_push_times_as_hard_as_imitation_pulls(scale):
    """Norms over the batch of the two gradients by the actions; too small a push is left as it is."""
    policy, critic, batch, settings = actor_setup(alignment="symmetric", max_push=0.3)
    batch.valid[:4, :2] = False
    with torch.no_grad():
        critic.weights[-1].mul_(scale)
    grads = {}
    for max_push in (0.3, 0.0):
        policy.zero_grad()
        outputs = []

        def keep(module, inputs, output, kept=outputs):
            output[0].retain_grad()
            kept.append(output[0])

        handle = policy.register_forward_hook(keep)
        stage2.actor_loss(policy, critic, batch, 1.0, replace(settings, max_push=max_push), generator())[0].backward()
        handle.remove()
        grads[max_push] = outputs[0].grad.chunk(2)
    (pull, push), (pull_free, push_free) = grads[0.3], grads[0.0]
    torch.testing.assert_close(pull, pull_free)
    limited = scale > 1
    assert (push_free.norm() > pull.norm()) == limited
    assert push.norm().item() == pytest.approx((0.3 * pull if limited else push_free).norm().item(), rel=1e-4)
    torch.testing.assert_close(push / push.norm(), push_free / push_free.norm())
    assert not push[:4, :2].any() and not pull[:4, :2].any()


def test_a_push_of_nothing_stays_nothing():
    """Neither a push nor a pull: the policy answers what was recorded, and no pair is violated."""
    batch = batch_of([[0.0]], [[F_]], [[T]])
    a_delta = torch.ones(1, 1, 1, requires_grad=True)
    moved = a_delta * 1
    stage2.limit_push(moved, batch.act, batch, 0.3)
    (0 * moved).sum().backward()
    assert a_delta.grad.tolist() == [[[0.0]]]


def test_noise_on_actions_is_of_their_error_and_independent_of_each_other():
    """Q is compared at noisy actions: std 0.3 x RMS error over valid steps; the gradient is that at the noisy one."""
    policy, _, batch, settings = actor_setup(B=256, sigma_e=0.0, action_noise=0.3)
    batch.valid[:128, :3] = False
    batch.act[:128, :3] = 9.0  # padding does not count
    seen = []

    class Listener(Constant):
        def forward(self, obs, act):
            seen.append(act)
            return super().forward(obs, act)

    a_hat = policy(batch.rtg, *context(batch))[0].detach()
    error = ((a_hat - batch.act)[batch.valid] ** 2).mean().sqrt()
    stage2.actor_loss(policy, Listener(0.0, 0.0), batch, 1.0, settings, generator())
    (clean, perturbed) = (x.detach() - a_hat for x in seen)  # sigma_e is 0: the same actions but for the noise
    for noise in (clean, perturbed):
        assert noise.std().item() == pytest.approx(0.3 * error.item(), rel=0.05) and abs(noise.mean()) < 0.02
    assert abs(torch.corrcoef(torch.stack([clean.flatten(), perturbed.flatten()]))[0, 1]) < 0.05
    assert seen[1].requires_grad and not seen[0].requires_grad
    other = replace(settings, action_noise=0.0)
    seen.clear()
    stage2.actor_loss(policy, Listener(0.0, 0.0), batch, 1.0, other, generator())
    # the same windows; where in the batch they stand may change the rounding
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)


def test_noise_is_a_margin_in_units_of_actions_whatever_the_slope_of_q():
    """Eq. 5's gradient falls from half to nothing as the answers part by a multiple of the noise, for any dQ/da."""
    batch = batch_of([[0.0]] * 20_000, [[F_]] * 20_000, [[T]] * 20_000)
    act = torch.zeros_like(batch.act)
    batch = batch._replace(act=act)
    for slope in (1.0, 100.0):
        shares = []
        for apart in (0.0, 1.0, 4.0):  # in units of the noise's std
            a_hat = act + 1.0  # RMS error 1
            a_delta = (a_hat + 0.3 * apart).requires_grad_()
            moved, a = stage2.add_noise(a_delta, a_hat, batch, 0.3, generator())
            q_delta, q = (slope * x.squeeze(-1).expand(2, -1, -1) for x in (moved, a))
            stage2.alignment_loss(q_delta, q, torch.ones(len(act), 1), batch.valid, "one-sided")[0].backward()
            shares.append(-a_delta.grad.sum().item() / slope)
        assert shares == pytest.approx([0.5, 0.2398, 0.00234], abs=0.01)  # 1 - Phi(apart / sqrt 2)


def test_every_factor_of_the_actor_loss():
    """sigma_e scales delta, the range bounds it, the applied shift gives the sign, q_scale divides, lambda_e weighs."""
    changes = dict(sigma_e=3.0, lambda_e=0.5, rtg_range=(-1.0, 0.5))
    policy, critic, batch, settings = actor_setup(alignment="symmetric", **changes)
    critic.weights[-1].data.mul_(1000)  # L_align is not negligible
    batch = batch._replace(rtg=torch.linspace(-1.0, 2.0, 8)[:, None].expand(8, 5).contiguous())
    loss, metrics = stage2.actor_loss(policy, critic, batch, 7.0, settings, generator())
    delta = 3.0 * torch.randn(8, 1, generator=generator())
    applied = (batch.rtg[:, :1] + delta).clamp(-1.0, 0.5) - batch.rtg[:, :1]
    assert (applied.sign() != delta.sign()).any()
    q = critic(batch.obs, policy(batch.rtg, *context(batch))[0])
    q_delta = critic(batch.obs, policy(batch.rtg + applied, *context(batch))[0])
    expected = (-applied.sign() * (q_delta - q) / 7.0).mean().item()
    assert metrics["align_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["q_mean"].item() == pytest.approx(q[0].mean().item(), rel=1e-4)
    supervised = (metrics["action_loss"] + metrics["state_loss"]).item()
    assert loss.item() == pytest.approx(supervised + 0.5 * expected, rel=1e-5)
    assert set(metrics) < set(stage2.METRICS)


def test_clean_and_perturbed_windows_have_dropout_masks_of_their_own():
    policy, _, batch, settings = actor_setup(sigma_e=0.0, action_noise=0.0)
    actions = []

    class Listener(Constant):
        def forward(self, obs, act):
            actions.append(act.detach())
            return super().forward(obs, act)

    for mode in (policy.eval, policy.train):
        mode()
        stage2.actor_loss(policy, Listener(0.0, 0.0), batch, 1.0, settings, generator())
    torch.testing.assert_close(actions[0], actions[1])
    assert (actions[2] - actions[3]).abs().mean() > 0.01


def test_critic_stays_float32_beside_a_bf16_policy(monkeypatch):
    policy, critic, batch, settings = actor_setup()
    policy.bf16 = True
    seen, real = [], stage2.Ensemble.forward

    def forward(self, obs, act):
        q = real(self, obs, act)
        seen.append((act.dtype, q.dtype, torch.is_autocast_enabled("cpu")))
        return q

    monkeypatch.setattr(stage2.Ensemble, "forward", forward)
    stage2.actor_loss(policy, critic, batch, 1.0, settings, generator())
    stage2.critic_loss(critic, critic, policy, batch, 0.99, settings, generator())
    assert len(seen) == 4 and set(seen) == {(torch.float32, torch.float32, False)}


@pytest.mark.parametrize("state_loss", [True, False])
def test_lambda_0_is_the_supervised_loss_without_a_critic(state_loss):
    policy, _, batch, settings = actor_setup(lambda_e=0, state_loss=state_loss)
    loss, metrics = stage2.actor_loss(policy, None, batch, 1.0, settings, generator())
    loss.backward()
    ours = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in policy.parameters()]
    policy.zero_grad()
    a_hat, s_hat = policy(batch.rtg, *context(batch))
    action_loss, rebuilding = ((a_hat - batch.act) ** 2).mean(), ((s_hat - batch.obs) ** 2).mean()
    assert set(metrics) == {"action_loss", "state_loss"}
    assert metrics["action_loss"].item() == pytest.approx(action_loss.item(), rel=1e-5)
    assert metrics["state_loss"].item() == pytest.approx(rebuilding.item(), rel=1e-5)
    expected = action_loss + rebuilding if state_loss else action_loss + 0 * rebuilding
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    for got, p in zip(ours, policy.parameters()):
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)
    assert policy.state_head.weight.grad.any() == state_loss


def test_only_a_decision_transformer_goes_without_the_state_loss(run_main):
    code, _, err = run_main(stage2, "--no-state-loss", "--lambda-e", "0.3")
    assert code == 2 and "Decision" in err
    with pytest.raises(ValueError, match="add --lambda-e 0"):
        stage2.Args(state_loss=False)
    assert not stage2.Args(state_loss=False, lambda_e=0).state_loss


def test_supervised_loss_means_over_valid_steps_and_dimensions():
    batch = batch_of([[0.0, 0.0]], [[F_, F_]], [[F_, T]])
    a_hat, s_hat = batch.act + 3.0, batch.obs + torch.tensor([1.0, 2.0])
    a_hat[:, 0] += 1e6
    action_loss, state_loss = stage2.supervised_loss(a_hat, s_hat, batch)
    assert action_loss.item() == pytest.approx(9.0, rel=1e-5)
    assert state_loss.item() == pytest.approx((1 + 4) / 2, rel=1e-5)


@pytest.mark.parametrize("half_normal", [True, False])
def test_delta_is_one_per_window_and_positive_only_if_half_normal(half_normal, monkeypatch):
    signs, real = [], stage2.alignment_loss
    monkeypatch.setattr(stage2, "alignment_loss", lambda *args: signs.append(args[2]) or real(*args))
    policy, critic, batch, settings = actor_setup(half_normal=half_normal)
    stage2.actor_loss(policy, critic, batch, 1.0, settings, generator())
    assert signs[0].shape == (8, 1) and (signs[0] > 0).all() == half_normal


def test_training_on_the_alignment_loss_puts_pairs_in_order():
    """With a critic that likes large actions, then with its opposite: each time fewer pairs are out of order."""
    policy, _, batch, settings = actor_setup(B=16, K=2, lambda_e=10.0)
    opt = torch.optim.Adam(policy.parameters(), lr=3e-3)

    class Sum(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, obs, act):
            return (self.sign * act.sum(-1)).expand(2, *act.shape[:-1])

    for sign in (1.0, -1.0):
        history = []
        for i in range(50):
            loss, metrics = stage2.actor_loss(policy, Sum(sign), batch, 1.0, settings, generator(i))
            history.append(metrics["violated"].item())
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert history[0] > 0.3 and np.mean(history[-10:]) < 0.1, history
        assert sign == 1.0 or history[0] > 0.9  # it had learned the opposite order


# ---- the critic, and line 11 ----


def test_critic_is_two_separate_networks_of_nn_linear_and_mish():
    torch.manual_seed(0)
    critic, obs, act = stage2.Ensemble(2, 6, 64), torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    for m, q in enumerate(critic(obs, act)):
        x = torch.cat([obs, act], dim=-1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = torch.nn.functional.linear(x, weight[m].T, bias[m, 0])
            x = torch.nn.functional.mish(x) if i < 3 else x
        torch.testing.assert_close(q, x.squeeze(-1), rtol=1e-5, atol=1e-6)
    assert [tuple(w.shape) for w in critic.weights] == [(2, 6, 64), (2, 64, 64), (2, 64, 64), (2, 64, 1)]
    for i, p in [(i, p) for i, layer in enumerate(zip(critic.weights, critic.biases)) for p in layer]:
        bound = critic.weights[i].shape[1] ** -0.5  # nn.Linear's: uniform in +- 1 / sqrt(inputs)
        assert p.abs().max() <= bound and (p.numel() < 100 or p.std().item() == pytest.approx(bound / 3**0.5, rel=0.1))
        assert not torch.equal(p[0], p[1])


def test_ema_update():
    target, online = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = [0.9 * t + 0.1 * o for t, o in zip(copy.deepcopy(target).parameters(), online.parameters())]
    stage2.ema_update(target, online, 0.1)
    for got, want in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want)
