"""The theorems of Q-Align DT in a table: no network, no sampling, half a minute. Read this before the networks.

    python theory/tabular_alignment.py

A small gridworld, a policy table pi(a | s, RTG), a critic table Q(s, a), and Algorithm 1 in exact expectations. Return-to-go (RTG) is the
reward still to come in an episode; a policy conditioned on it can be asked for a return. Who knows value iteration can read on:

    monotone_count, policy_count_bound   Theorem 5.1  policies that never answer a higher request with a lower Q are far fewer
    supervised_policy   L_SL             what a Decision Transformer (DT) learns from endless data: P(a | s, RTG)
    alignment_gradient  Eq. 5            asking for more must not lower Q, asking for less must not raise it
    critic_target       Eq. 7            the critic evaluates the policy's answer to a request raised by Delta_RTG
    train               Algorithm 1      with L_SL + lambda_e L_Align (Eq. 6); Theorem 5.2 (greedy above all returns), Theorem 5.3 (limits of Q)
    alignment_error     Eq. 8            requested against achieved return

Assumed, and each switched off once to see what breaks: the policy chooses among the data's actions only (full support), the tables
take the exact Bellman target (exact updates), and the policy can tell every RTG from every other. Numbers are raw returns, gamma = 1.
Equations and theorems are those of "Return-to-Go Is More Than a Number" (ICML 2026). The two critics of the paper are one here:
with exact updates they would stay equal. L_SL has no state term, since a table knows its state.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

GRID = ("...tG", ".....", "S.t..", ".....", ".t..g")  # S start, t trap, g small goal, G big goal; t, g, G end the episode
ENTER = {"t": -4, "g": 6, "G": 10}  # on top of -1 per step
MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # walls: the agent stays
WIDTH, CELLS, HORIZON, A = len(GRID[0]), len(GRID) * len(GRID[0]), 10, len(MOVES)
S = HORIZON * CELLS  # a state is (time, cell), numbered time * CELLS + cell
START = "".join(GRID).index("S")
LEVELS = np.arange(-HORIZON - 4, 10 - 1 + 2)  # (R,) every return from -14 to 9, and one level above them all
R, ABOVE = len(LEVELS), len(LEVELS) - 1
SIGMA_E, LAMBDA_E, STEP_SIZE, ITERATIONS = 3.0, 0.3, 0.5, 400


# ---- the world and its data ----


class World(NamedTuple):
    next_state: np.ndarray  # (S, A)
    reward: np.ndarray  # (S, A) integers
    done: np.ndarray  # (S, A) the episode ends with this step


def gridworld() -> World:
    next_state, reward, done = np.zeros((S, A), int), np.zeros((S, A), int), np.zeros((S, A), bool)
    for s, (a, (down, right)) in itertools.product(range(S), enumerate(MOVES.values())):
        time, cell = divmod(s, CELLS)
        row = min(max(cell // WIDTH + down, 0), len(GRID) - 1)
        column = min(max(cell % WIDTH + right, 0), WIDTH - 1)
        reward[s, a] = -1 + ENTER.get(GRID[row][column], 0)
        done[s, a] = GRID[row][column] in ENTER or time == HORIZON - 1
        next_state[s, a] = 0 if done[s, a] else (time + 1) * CELLS + row * WIDTH + column
    return World(next_state, reward, done)


def behaviour_policy() -> np.ndarray:  # beta (S, A): no "up" but in the last column, and no "right" there
    last_column = np.arange(S)[:, None] % WIDTH == WIDTH - 1
    return np.where(last_column, [0.55, 0.0, 0.25, 0.2], [0.0, 0.45, 0.35, 0.2])


class Data(NamedTuple):
    """What endless data of the behaviour policy say, by dynamic programming."""

    beta: np.ndarray  # (S, A)
    support: np.ndarray  # (S, A) beta > 0
    visits: np.ndarray  # (S,) probability that an episode passes through s
    p_rtg: np.ndarray  # (S, R) P(RTG | s)
    p_action: np.ndarray  # (S, R, A) P(a | s, RTG); beta(a | s) where the data have no such RTG

    @property
    def pairs(self):  # (S, A) state-action pairs that the data contain
        return self.support & (self.visits > 0)[:, None]


def collect(world: World, beta: np.ndarray) -> Data:
    visits = np.zeros(S)
    visits[START] = 1
    for s in range(S):  # forward in time
        np.add.at(visits, world.next_state[s], visits[s] * beta[s] * ~world.done[s])
    z = np.zeros((S, A, R))  # P(RTG | s, a)
    for s, a in itertools.product(reversed(range(S)), range(A)):  # backward in time
        r, following = world.reward[s, a], world.next_state[s, a]
        z[s, a] = LEVELS == r if world.done[s, a] else np.roll(beta[following] @ z[following], r)  # RTG = r + RTG'
    joint = (beta[:, :, None] * z).transpose(0, 2, 1)  # P(RTG, a | s) (S, R, A)
    return Data(beta, beta > 0, visits, joint.sum(2), supervised_policy(joint, beta))


def value_iteration(world: World, average) -> np.ndarray:
    """Q(s, a) = r + V(s'), V = average(Q): the mean under beta gives Q_beta, the maximum over the support gives Q*."""
    q = np.zeros((S, A))
    for _ in range(HORIZON):
        q = world.reward + ~world.done * average(q)[world.next_state]
    return q


def q_beta(world: World, data: Data) -> np.ndarray:
    return value_iteration(world, lambda q: (data.beta * q).sum(1))


def q_star(world: World, support: np.ndarray) -> np.ndarray:  # App. B.3: the maximum runs over the data's actions
    return value_iteration(world, lambda q: np.where(support, q, -np.inf).max(1))


# ---- the policy: L_SL and Eq. 5 ----


def supervised_policy(joint: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """The minimum of L_SL = E ||pi(. | s, RTG) - onehot(a)||^2 is P(a | s, RTG). No data, no loss: there we put beta."""
    mass = joint.sum(2, keepdims=True)
    return np.where(mass > 0, joint / np.where(mass > 0, mass, 1), beta[:, None])  # (S, R, A)


def perturbation() -> np.ndarray:
    """P(RTG + delta | RTG) (R, R): delta ~ N(0, sigma_e^2) over the levels there are, delta = 0 left out."""
    delta = LEVELS[None, :] - LEVELS[:, None]
    p = np.exp(-0.5 * (delta / SIGMA_E) ** 2) * (delta != 0)
    return p / p.sum(1, keepdims=True)


def alignment_gradient(q, pi, p_rtg, sign=1):
    """Gradient of L_Align (Eq. 5) with respect to pi(a^delta | s, RTG + delta), a ~ pi(. | s, RTG) held fixed (Q^perp). (S, R, A)"""
    falls = np.maximum(q[:, :, None] - q[:, None, :], 0)  # (S, a, a^delta) by how much Q falls from a to a^delta
    rises = falls.transpose(0, 2, 1)
    if sign < 0:  # Eq. 5 with its sign turned, for the tests
        falls, rises = rises, falls
    weight = p_rtg[:, :, None]  # requests as the data make them
    asked_more, asked_less = np.triu(perturbation()), np.tril(perturbation())  # delta > 0, delta < 0
    return asked_more.T @ (weight * (pi @ falls)) + asked_less.T @ (weight * (pi @ rises))


def project(x: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The nearest probabilities: lower all numbers of a row by the same amount, cut at 0, so that they sum to 1."""
    x = np.where(allowed, x, -np.inf)
    ordered = -np.sort(-x, axis=-1)
    surplus = (np.cumsum(ordered, -1) - 1) / np.arange(1, A + 1)  # the amount if the k largest stay positive
    k = (ordered > surplus).sum(-1, keepdims=True)
    return np.maximum(x - np.take_along_axis(surplus, k - 1, -1), 0)


# ---- the critic and Algorithm 1 ----


def critic_target(world: World, data: Data, pi, q, delta_rtg: int) -> np.ndarray:
    """Eq. 7: r + E Q(s', a'), RTG' as the data have it in s', a' ~ pi(. | s', RTG' + Delta_RTG). (S, A)"""
    raised = np.minimum(np.arange(R) + delta_rtg, ABOVE)  # a request above all returns is the level above
    value = np.einsum("sr,sra,sa->s", data.p_rtg, pi[:, raised], q)
    return world.reward + ~world.done * value[world.next_state]


def exact(y: np.ndarray) -> np.ndarray:
    return y


def train(world, data, lambda_e, delta_rtg, allowed=None, q=None, fit=lambda y: y, ear=None, sign=1):
    """Algorithm 1 in exact expectations, L_SL + lambda_e L_Align (Eq. 6). Yields (Q, pi) after every iteration.

    What the theorems assume is the default: the policy chooses among the data's actions (allowed), the critic takes its targets as they
    are (fit), and the policy has free numbers for every RTG: pi = ear @ theta with ear the identity.
    """
    allowed = data.support if allowed is None else allowed  # (S, A)
    q = np.zeros((S, A)) if q is None else q
    ear = np.eye(R) if ear is None else ear  # (R, R)
    theta = data.p_action  # the policy starts as the DT
    weight = data.p_rtg + data.p_rtg @ perturbation()  # (S, R) how much data L_SL and L_Align have for this row of the table
    # Every row is a problem of its own: its step size changes how fast it is solved, not what solves it.
    step = STEP_SIZE / np.maximum(weight @ ear, 1e-12)[:, :, None]
    for _ in range(ITERATIONS):
        pi = ear @ theta  # (S, R, A)
        q = np.where(data.pairs, fit(critic_target(world, data, pi, q, delta_rtg)), q)  # pairs without data are never updated
        gradient = 2 * data.p_rtg[:, :, None] * (pi - data.p_action)
        if lambda_e > 0:
            gradient = gradient + lambda_e * alignment_gradient(q, pi, data.p_rtg, sign)
        theta = project(theta - step * (ear.T @ gradient), allowed[:, None])
        yield q, ear @ theta


def time_blind(data: Data):
    """Inexact updates: a critic that does not see the time fits one Q per (cell, action) to its targets, by least squares over the data."""
    weight = (data.visits[:, None] * data.beta).reshape(HORIZON, CELLS, A)

    def fit(y):
        mean = (weight * y.reshape(weight.shape)).sum(0) / np.maximum(weight.sum(0), 1e-300)
        return np.tile(mean, (HORIZON, 1))  # (S, A)

    return fit


def blurred_ear(levels: float) -> np.ndarray:
    """A policy that hears a Gaussian mean of neighbouring RTGs: what it learns at one level it also says at the next. (R, R)"""
    ear = np.exp(-0.5 * ((LEVELS[:, None] - LEVELS) / levels) ** 2)
    return ear / ear.sum(1, keepdims=True)


# ---- what is measured ----


def distance(q, reference, data: Data) -> float:
    return float(np.abs(q - reference)[data.pairs].max())


def greedy_probability(q, pi, data: Data) -> np.ndarray:
    """How much of pi(. | s, level above all returns) is on the support's argmax of Q, for every state that the data visit."""
    q = np.where(data.support, q, -np.inf)
    best = q >= q.max(1, keepdims=True) - 1e-9
    return (pi[:, ABOVE] * best).sum(1)[data.visits > 0]


def falls_share(q, pi, data: Data) -> float:
    """Share of neighbouring RTGs of the data at which the mean Q of the answer falls as the request rises."""
    mean_q = (pi @ q[:, :, None])[:, :, 0]  # (S, R)
    falls = [np.diff(mean_q[s, data.p_rtg[s] > 0]) < -1e-9 for s in np.flatnonzero(data.visits)]
    return float(np.concatenate(falls).mean())


def achieved_return(world: World, pi) -> np.ndarray:
    """Expected return of an episode for every request, the request counted down by each reward. (R,)"""
    v = np.zeros((S, R))
    for s, a in itertools.product(reversed(range(S)), range(A)):  # backward in time
        r, following = world.reward[s, a], world.next_state[s, a]
        rest = 0 if world.done[s, a] else v[following, np.clip(np.arange(R) - r, 0, ABOVE)]
        v[s] += pi[s, :, a] * (r + rest)
    return v[START]


def alignment_error(achieved, asked: np.ndarray) -> float:
    """Eq. 8 over the requests `asked` (R,) bool."""
    return float(np.sqrt(np.mean((achieved - LEVELS)[asked] ** 2)))


# ---- Theorem 5.1 ----


def enumerate_policies(q, n_levels: int) -> tuple[int, int]:
    """All deterministic policies (state, level) -> action, and those whose Q never falls as the level rises. q: one list per state."""
    free = monotone = 0
    for actions in itertools.product(range(len(q[0])), repeat=len(q) * n_levels):
        rows = [actions[i * n_levels : (i + 1) * n_levels] for i in range(len(q))]
        free += 1
        monotone += all(q_s[a] <= q_s[b] for q_s, row in zip(q, rows) for a, b in zip(row, row[1:]))
    return free, monotone


def monotone_count(n_states: int, n_levels: int, n_actions: int) -> int:
    return math.comb(n_levels + n_actions - 1, n_levels) ** n_states


def policy_count_bound(n_states: int, n_levels: int, n_actions: int) -> float:  # on the logarithm
    return n_states * n_levels * (math.log((n_levels + n_actions - 1) / n_levels) + 1)


# ---- the story ----

COUNTED = (([0, 1, 2],), 3), (([0, 1, 2, 3],), 5), (([0, 1, 2],) * 2, 3), (([0, 1, 2, 3],) * 2, 3), (([0, 0, 1],), 3)  # Q, |G|
SHOWN = {"start": (0, 2, 0), "after 2 steps": (2, 3, 1), "after 5 steps": (5, 3, 4)}  # time, row, column
DELTAS = {"0": 0, "one level": 1, "above all returns": R}


def theorem_5_1() -> dict:
    print("\nTheorem 5.1: deterministic policies whose Q never falls as the request rises (counted one by one)")
    counts = {}
    for q, n_levels in COUNTED:
        size = len(q), n_levels, len(q[0])
        free, monotone = enumerate_policies(q, n_levels)
        formula, bound = monotone_count(*size), math.exp(policy_count_bound(*size))
        counts[f"|S|, |G|, |A| = {size}, Q = {q[0]}"] = [free, monotone, formula, bound]
        print(f"  |S|, |G|, |A| = {size}, Q = {q[0]}: {monotone} of {free}; formula {formula}, bound {bound:.0f}")
    print("  The last line has a tie: the formula holds only after ties are broken, which the theorem does and Eq. 5 does not.")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    out = parser.parse_args().out

    world = gridworld()
    data = collect(world, behaviour_policy())
    everything = collect(world, 0.8 * data.beta + 0.2 / A)  # the same behaviour with full support
    beta, star = q_beta(world, data), q_star(world, data.support)
    asked = np.append(data.p_rtg[START, :-1] > 0, False)  # (R,) returns that whole episodes of the data have
    numbers = {"distance of Q_beta and Q*": distance(beta, star, data)}
    print(f"{(data.visits > 0).sum()} states (time, cell), {A} actions, returns {LEVELS[0]} to {LEVELS[-2]} and a level above them.")
    print(f"Episodes of the data: {LEVELS[asked][0]} to {LEVELS[asked][-1]}, on average {data.p_rtg[START] @ LEVELS:.2f}.")
    print(f"lambda_e {LAMBDA_E}, sigma_e {SIGMA_E} levels, {ITERATIONS} iterations. max |Q_beta - Q*| {distance(beta, star, data):.2f}")

    numbers["Theorem 5.1"] = theorem_5_1()

    print("\nTheorem 5.3: the distance of Q to Q_beta and to Q* after the last iteration")
    runs, curves = {}, {}
    for (name, delta_rtg), lambda_e in itertools.product(DELTAS.items(), (0, LAMBDA_E)):
        steps = list(train(world, data, lambda_e, delta_rtg))
        runs[name, lambda_e] = steps[-1]
        curves[name, lambda_e] = curve = np.array([[distance(q, ref, data) for ref in (beta, star)] for q, _ in steps])
        print(f"  Delta_RTG {name:17} lambda_e {lambda_e:3}: max |Q - Q_beta| {curve[-1, 0]:7.4f}  max |Q - Q*| {curve[-1, 1]:7.4f}")
