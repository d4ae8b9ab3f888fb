"""theory/tabular_alignment.py: dynamic programming against enumeration, the theorems' limits, what breaks them."""

import importlib.util
import itertools
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

path = Path(__file__).resolve().parent.parent / "theory" / "tabular_alignment.py"
spec = importlib.util.spec_from_file_location("tabular_alignment", path)
theory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theory)

S, A, R, LEVELS, START, ABOVE = theory.S, theory.A, theory.R, theory.LEVELS, theory.START, theory.ABOVE
UP, RIGHT, DOWN, LEFT = range(4)


def state(time, row, column):
    return time * theory.CELLS + row * theory.WIDTH + column


@pytest.fixture(scope="module")
def world():
    return theory.gridworld()


@pytest.fixture(scope="module")
def data(world):
    return theory.collect(world, theory.behaviour_policy())


@pytest.fixture(scope="module")
def beta(world, data):
    return theory.q_beta(world, data)


@pytest.fixture(scope="module")
def star(world, data):
    return theory.q_star(world, data)


@pytest.fixture(scope="module")
def train(world, data):
    """The first iterations of a run of Algorithm 1."""

    def run(lambda_e, delta_rtg, iterations=60, **options):
        return list(itertools.islice(theory.train(world, data, lambda_e, delta_rtg, **options), iterations))

    return run


@pytest.fixture(scope="module")
def aligned(train):
    """Q and pi with the alignment loss and Delta_RTG above all returns: most tests look at this run."""
    return train(theory.LAMBDA_E, R)[-1]


@pytest.fixture(scope="module")
def turned(train):
    """The same with the sign of Eq. 5 turned."""
    return train(theory.LAMBDA_E, R, sign=-1)[-1]


@pytest.fixture(scope="module")
def episodes(world, data):
    """All that the behaviour policy can do from the start: (probability, states, actions, rewards) per episode."""
    found, unfinished = [], [(1.0, [START], [], [])]
    while unfinished:
        p, states, actions, rewards = unfinished.pop()
        s = states[-1]
        for a in np.flatnonzero(data.support[s]).tolist():
            step = p * data.beta[s, a], actions + [a], rewards + [world.reward[s, a].item()]
            if world.done[s, a]:
                found.append((step[0], states, *step[1:]))
            else:
                unfinished.append((step[0], states + [world.next_state[s, a].item()], *step[1:]))
    return found


# ---- the world and its data ----


def test_moves_by_hand(world):
    s = state(0, 2, 0)
    assert s == START
    assert world.next_state[s].tolist() == [state(1, 1, 0), state(1, 2, 1), state(1, 3, 0), s + theory.CELLS]
    assert world.reward[s].tolist() == [-1] * 4 and not world.done[s].any()
    assert world.reward[state(3, 2, 1), RIGHT] == -5 and world.done[state(3, 2, 1), RIGHT]  # a trap
    assert world.reward[state(3, 1, 4), UP] == 9 and world.done[state(3, 1, 4), UP]  # the big goal
    assert world.reward[state(3, 3, 4), DOWN] == 5 and world.done[state(3, 3, 4), DOWN]  # the small one
    assert world.done[state(theory.HORIZON - 1, 2, 0)].all()  # time is up


def test_data_are_those_of_all_episodes(data, episodes):
    assert sum(e[0] for e in episodes) == pytest.approx(1)
    visits, joint = np.zeros(S), np.zeros((S, R, A))
    for p, states, actions, rewards in episodes:
        rtg = np.cumsum(rewards[::-1])[::-1]
        visits[states] += p
        joint[states, rtg - LEVELS[0], actions] += p
    np.testing.assert_allclose(data.visits, visits, atol=1e-12)
    seen = visits > 0
    np.testing.assert_allclose(data.p_rtg[seen], joint[seen].sum(2) / visits[seen, None], atol=1e-12)
    mass = joint.sum(2, keepdims=True)
    np.testing.assert_allclose(data.p_action[mass[..., 0] > 0], (joint / np.maximum(mass, 1e-300))[mass[..., 0] > 0])
    assert (data.pairs == (joint.sum(1) > 0)).all()
    no_rtg = seen[:, None] & (data.p_rtg == 0)
    assert (data.p_action[no_rtg] == np.broadcast_to(data.beta[:, None], (S, R, A))[no_rtg]).all()


def test_levels_are_all_returns_and_one_above(data):
    collected = (data.p_rtg[data.visits > 0] > 0).any(0)
    assert collected[:ABOVE].all() and not collected[ABOVE]
    assert (data.visits > 0).sum() >= 20 and (data.support.sum(1) < A).all()  # limited support everywhere


def test_q_beta_and_q_star_are_mean_and_best_return_of_all_episodes(data, episodes, beta, star):
    mass, total, best = np.zeros((S, A)), np.zeros((S, A)), np.full((S, A), -np.inf)
    for p, states, actions, rewards in episodes:
        rtg = np.cumsum(rewards[::-1])[::-1]
        mass[states, actions] += p
        total[states, actions] += p * rtg
        best[states, actions] = np.maximum(best[states, actions], rtg)
    np.testing.assert_allclose(beta[data.pairs], (total / np.maximum(mass, 1e-300))[data.pairs])
    np.testing.assert_allclose(star[data.pairs], best[data.pairs])


# ---- the losses ----


def test_supervised_policy_by_hand():
    joint = np.array([[[0.1, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])  # one state, two RTGs: the second has no data
    beta = np.array([[0.5, 0.2, 0.2, 0.1]])
    np.testing.assert_allclose(theory.supervised_policy(joint, beta), [[[0.25, 0.75, 0, 0], beta[0]]])


@pytest.mark.parametrize("sign", [1, -1])
def test_alignment_gradient_against_eq_5_term_by_term(data, sign):
    """L_Align is linear in the perturbed answer: its gradient is the expected penalty of each perturbed action."""
    rng = np.random.default_rng(0)
    q, pi = rng.normal(size=(S, A)), rng.dirichlet(np.ones(A), size=(S, R))
    gradient = theory.alignment_gradient(q, pi, data.p_rtg, sign)
    for s in (START, state(5, 3, 4)):
        expected = np.zeros((R, A))
        for g, h in itertools.permutations(range(R), 2):  # RTG and RTG + delta
            weights = [math.exp(-0.5 * ((k - g) / theory.SIGMA_E) ** 2) for k in range(R) if k != g]
            p = data.p_rtg[s, g] * math.exp(-0.5 * ((h - g) / theory.SIGMA_E) ** 2) / sum(weights)
            for a, b in itertools.product(range(A), repeat=2):  # a without delta, b with it
                difference = sign * np.sign(h - g) * (q[s, b] - q[s, a])
                expected[h, b] += p * pi[s, g, a] * (difference < 0) * abs(q[s, b] - q[s, a])
        np.testing.assert_allclose(gradient[s], expected, atol=1e-12)


def test_projection_is_the_nearest_allowed_distribution():
    allowed = np.array([True, True, False, True])
    assert theory.project(np.array([0.9, 0.5, 5.0, -3.0]), allowed) == pytest.approx([0.7, 0.3, 0, 0])
    assert theory.project(np.array([0.2, 0.2, 5.0, 0.3]), allowed) == pytest.approx([0.3, 0.3, 0, 0.4])
    assert theory.project(np.array([9.0, 0.5, 5.0, 0.3]), allowed) == pytest.approx([1, 0, 0, 0])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 1, A))
    nearest = theory.project(x, np.ones(A, bool))
    assert nearest.min() >= 0 and nearest.sum(-1) == pytest.approx(1)
    other = rng.dirichlet(np.ones(A), size=(1, 500))
    assert (((x - other) ** 2).sum(-1) >= ((x - nearest) ** 2).sum(-1) - 1e-12).all()


def test_critic_target_by_hand(world, data):
    rng = np.random.default_rng(0)
    q, pi = rng.normal(size=(S, A)), rng.dirichlet(np.ones(A), size=(S, R))
    s, following = START, world.next_state[START, RIGHT]
    for delta_rtg in (0, 1, 3, R):
        expected = world.reward[s, RIGHT]
        for g in range(R):
            expected += data.p_rtg[following, g] * pi[following, min(g + delta_rtg, ABOVE)] @ q[following]
        assert theory.critic_target(world, data, pi, q, delta_rtg)[s, RIGHT] == pytest.approx(expected)
    end = state(theory.HORIZON - 1, 2, 0)
    assert theory.critic_target(world, data, pi, q, 0)[end].tolist() == world.reward[end].tolist()


# ---- Theorem 5.1 ----


@pytest.mark.parametrize(
    "q, n_levels, free, monotone",
    [
        ([[0, 1]], 2, 4, 3),  # 00 01 11
        ([[0, 1, 2]], 2, 9, 6),  # 00 01 02 11 12 22
        ([[2, 0, 1]], 2, 9, 6),  # the order of Q counts, not the action's number
        ([[0, 1], [1, 0]], 2, 16, 9),  # states choose independently
        ([[0, 1]], 4, 16, 5),  # one switch, anywhere
    ],
)
def test_policy_counts_by_hand(q, n_levels, free, monotone):
    assert theory.enumerate_policies(q, n_levels) == (free, monotone)
    size = len(q), n_levels, len(q[0])
    assert theory.monotone_count(*size) == monotone
    assert math.log(monotone) <= theory.log_bound(*size)


def test_enumeration_agrees_with_the_formula_where_it_is_long():
    for n_states, n_levels, n_actions in (1, 6, 3), (2, 3, 3), (3, 2, 3), (1, 4, 5):
        counted = theory.enumerate_policies([list(range(n_actions))] * n_states, n_levels)
        assert counted == (n_actions ** (n_states * n_levels), theory.monotone_count(n_states, n_levels, n_actions))


def test_ties_leave_more_policies_than_the_formula():
    """Theorem 5.1 breaks ties first. Eq. 5 does not: of 0, 0, 1 the policies are 2^3 + 2^2 + 2 + 1."""
    assert theory.enumerate_policies([[0, 0, 1]], 3) == (27, 15) and theory.monotone_count(1, 3, 3) == 10


def test_log_a_vanishes_only_if_g_grows_with_a():
    def per_level(n_levels, n_actions):
        return math.log(theory.monotone_count(1, n_levels, n_actions)) / n_levels

    assert all(per_level(n, n) < math.log(4) for n in (2, 16, 256, 1024))  # the theorem's second statement
    assert per_level(10, 10**6) - per_level(10, 10**5) == pytest.approx(math.log(10), rel=0.01)  # |G| fixed: ln |A|
    assert theory.log_bound(1, 4, 4) > 4 * math.log(4)  # few actions: the bound exceeds the number of all policies
    assert theory.log_bound(1, 6, 6) < 6 * math.log(6)


# ---- Theorem 5.2 ----


def test_greedy_probability_counts_ties_and_the_support_only(data):
    q, pi = np.zeros((S, A)), np.full((S, R, A), 0.0)
    pi[:, ABOVE] = [0.1, 0.2, 0.3, 0.4]
    first = np.flatnonzero(data.visits > 0)[0]
    q[first] = [9, 2, 2, 1]  # "up" is not in the data
    assert theory.greedy_probability(q, pi, data)[0] == pytest.approx(0.5)


def test_above_all_returns_the_policy_is_greedy_only_with_the_alignment_loss(data, train, aligned, turned):
    q, pi = aligned
    assert theory.greedy_probability(q, pi, data).min() > 0.999
    dt = train(0, R, iterations=1)[-1][1]
    assert theory.greedy_probability(q, dt, data).mean() < 0.7  # nothing trains that level
    assert theory.greedy_probability(*turned, data).mean() < 0.3  # Eq. 5 turned: it becomes the worst action


def test_greedy_in_any_fixed_critic(data, beta, train):
    _, pi = train(30, 0, iterations=200, fit=lambda y: beta)[-1]
    assert theory.greedy_probability(beta, pi, data).min() > 0.99


def test_without_full_support_an_untrained_q_misleads_the_policy(data, star, train):
    allowed, pessimistic = np.ones((S, A), bool), np.where(data.support, 0.0, -100.0)
    q, pi = train(theory.LAMBDA_E, R, allowed=allowed)[-1]
    assert pi[data.visits > 0, ABOVE][~data.support[data.visits > 0]].max() > 0.5  # actions that no data show
    assert theory.distance(q, star, data) > 1
    q, _ = train(theory.LAMBDA_E, R, allowed=allowed, q=pessimistic)[-1]
    assert theory.distance(q, star, data) < 1e-3  # low values there do what the theorem assumes


def test_full_support_leads_to_the_optimum_over_all_actions(world, data):
    full = theory.collect(world, 0.8 * data.beta + 0.2 / A)
    q, pi = list(itertools.islice(theory.train(world, full, theory.LAMBDA_E, R), 60))[-1]
    assert theory.distance(q, theory.value_iteration(world, lambda q: q.max(1)), full) < 1e-3
    assert theory.achieved_return(world, pi)[ABOVE] == pytest.approx(4)  # two more than the limited support allows


# ---- Theorem 5.3 ----


def test_delta_rtg_0_evaluates_the_behaviour_policy(data, beta, star, train):
    assert theory.distance(train(0, 0, iterations=20)[-1][0], beta, data) < 1e-3
    close = theory.distance(train(theory.LAMBDA_E, 0)[-1][0], beta, data)
    assert 0.1 < close < 0.1 * theory.distance(beta, star, data)  # with the alignment loss "close", not equal


def test_delta_rtg_above_all_returns_leads_to_the_optimum_of_the_support(world, data, star, aligned):
    q, pi = aligned
    assert theory.distance(q, star, data) < 1e-3
    best = np.where(data.support, star, -np.inf)[START].max()
    assert theory.achieved_return(world, pi)[ABOVE] == pytest.approx(best) == 2


def test_one_level_lies_between(data, beta, star, train):
    q, _ = train(theory.LAMBDA_E, 1)[-1]
    assert theory.distance(q, beta, data) > 1 and theory.distance(q, star, data) > 1


def test_without_alignment_a_raised_request_changes_little(data, beta, train):
    assert theory.distance(train(0, R, iterations=20)[-1][0], beta, data) < 1e-3
    assert theory.distance(train(0, 1, iterations=20)[-1][0], beta, data) < 1


def test_with_the_sign_of_eq_5_turned_the_limit_is_missed(world, data, star, turned):
    q, pi = turned
    assert theory.distance(q, star, data) > 5
    assert theory.achieved_return(world, pi)[ABOVE] < data.p_rtg[START] @ LEVELS  # worse than the behaviour policy


def test_q_never_falls_when_it_starts_as_a_policys_value(data, beta, train):
    """Lemma B.3."""
    q = np.array([beta, *(q for q, _ in train(theory.LAMBDA_E, R, q=beta))])
    assert np.diff(q, axis=0)[:, data.pairs].min() > -1e-9
    q = np.array([beta, *(q for q, _ in train(theory.LAMBDA_E, 0, q=beta))])
    assert np.diff(q, axis=0)[:, data.pairs].min() < -0.01  # not so for Delta_RTG 0


def test_without_exact_updates_the_limit_is_missed(data, star, train):
    q, _ = train(theory.LAMBDA_E, R, fit=lambda y: theory.time_blind(y, data))[-1]
    assert theory.distance(q, star, data) > 5


def test_time_blind_takes_the_mean_over_the_visits(data):
    y = np.arange(S)[:, None] // theory.CELLS + np.zeros((S, A))  # the time itself
    mean = theory.time_blind(y, data)
    times = np.arange(theory.HORIZON)
    for row, column in (2, 1), (3, 0):
        s = state(times, row, column)
        expected = (data.visits[s] * times).sum() / data.visits[s].sum()
        assert mean[s, RIGHT] == pytest.approx(expected)


# ---- Eq. 8 ----


def test_alignment_error_by_hand():
    achieved, requested = LEVELS + np.where(LEVELS == 0, 3.0, 0.0), (LEVELS == 0) | (LEVELS == 1)
    assert theory.alignment_error(achieved, requested) == pytest.approx(math.sqrt(9 / 2))


def test_achieved_return_against_a_forward_pass(world, aligned):
    _, pi = aligned
    backward = theory.achieved_return(world, pi)
    for request in range(R):
        now, total = {(START, request): 1.0}, 0.0
        while now:
            following = defaultdict(float)
            for (s, level), p in now.items():
                for a in np.flatnonzero(pi[s, level]).tolist():
                    r = world.reward[s, a].item()
                    total += p * pi[s, level, a] * r
                    if not world.done[s, a]:
                        left = min(max(level - r, 0), ABOVE)
                        following[world.next_state[s, a].item(), left] += p * pi[s, level, a]
            now = following
        assert backward[request] == pytest.approx(total)


def test_an_exact_dt_returns_what_it_is_asked_for(world, data, aligned):
    """In a deterministic world and with endless data alignment can only cost; what it adds lies outside the data."""
    known = data.p_rtg[START] > 0
    dt, ours = theory.achieved_return(world, data.p_action), theory.achieved_return(world, aligned[1])
    assert theory.alignment_error(dt, known) == pytest.approx(0, abs=1e-9)
    assert 0.1 < theory.alignment_error(ours, known) < 1.5
    assert dt[ABOVE] == pytest.approx(data.p_rtg[START] @ LEVELS) and ours[ABOVE] == pytest.approx(2)


def test_a_dt_that_cannot_tell_requests_apart_gains_from_alignment(world, data, train):
    ear, known = theory.blurred_ear(4), data.p_rtg[START] > 0
    assert ear.sum(1) == pytest.approx(1)
    errors = [
        theory.alignment_error(theory.achieved_return(world, train(lambda_e, R, 150, ear=ear)[-1][1]), known)
        for lambda_e in (0, theory.LAMBDA_E)
    ]
    assert errors[1] < errors[0] - 0.3 and errors[1] > 1


def test_the_blurred_dt_minimises_l_sl(data, train):
    """Against plain projected gradient descent on one state alone."""
    ear, s = theory.blurred_ear(4), state(2, 3, 1)
    weight, theta = data.p_rtg[s][:, None], data.p_action[s]

    def l_sl(answer):
        return (weight * (answer - data.p_action[s]) ** 2).sum()

    before = l_sl(ear @ theta)
    for _ in range(2000):
        theta = theory.project(theta - ear.T @ (weight * (ear @ theta - data.p_action[s])), data.support[s])
    _, pi = train(0, 0, 150, ear=ear)[-1]
    assert l_sl(pi[s]) == pytest.approx(l_sl(ear @ theta), rel=0.01) and l_sl(pi[s]) < 0.7 * before


# ---- the command ----


def test_main_writes_numbers_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "ITERATIONS", 20)
    monkeypatch.setattr(sys, "argv", ["tabular_alignment.py", "--out", str(tmp_path / "new")])
    theory.main()
    assert (tmp_path / "new" / "figures" / "theory.png").stat().st_size > 50_000
    numbers = json.loads((tmp_path / "new" / "raw" / "theory.json").read_text())
    assert len(numbers["runs"]) == 15 and all(len(row) == len(numbers["columns"]) for row in numbers["runs"].values())
    assert numbers["runs"][theory.ALIGNED][1] < 1e-3 and numbers["runs"][theory.DT][0] < 1e-3
    printed = capsys.readouterr().out
    assert all(name in printed for name in numbers["runs"]) and "free 27, monotone 10" in printed


def test_a_run_repeats_itself(world, data):
    runs = [list(itertools.islice(theory.train(world, data, theory.LAMBDA_E, R), 5))[-1] for _ in range(2)]
    assert all((x == y).all() for x, y in zip(*runs))
