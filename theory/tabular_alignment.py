"""The theorems of Q-Align DT in a table: no network, no sampling, half a minute. Read this before the networks.

    python theory/tabular_alignment.py

A gridworld, a policy table pi(a | s, RTG), a critic table Q(s, a), and Algorithm 1 in exact expectations. The
return-to-go (RTG) is the reward still to come; a policy conditioned on it can be asked for any return.

    enumerate_policies   Theorem 5.1  policies whose Q never falls as the RTG rises are far fewer
    supervised_policy    L_SL         what a Decision Transformer (DT) learns from endless data: P(a | s, RTG)
    alignment_gradient   Eq. 5        asking for more must not lower Q, asking for less must not raise it
    critic_target        Eq. 7        the critic evaluates the policy at an RTG raised by Delta_RTG
    train                Algorithm 1  Eq. 7 for the critic and Eq. 6 for the policy, in turns
    greedy_probability   Theorem 5.2  asked for more than all returns, the policy is greedy in Q
    distance             Theorem 5.3  Delta_RTG 0 keeps Q close to Q_beta, Delta_RTG above all returns leads it to Q*
    alignment_error      Eq. 8        target against achieved return, for the returns that the data contain

Assumed, and each switched off once in main(): the policy chooses among the data's actions (full support), the critic
takes its targets as they are (exact updates), the policy can tell any two RTGs apart. Not checked: errors from little
data (Lemma 5.1). A DT learnt exactly in a deterministic world returns what it is asked for, if the data contain it:
there L_Align can only cost. It pays above the data, and where RTGs are very hard to tell apart. Returns are raw, gamma
is 1; two critics would stay equal, so there is one; a table knows its state, so L_SL has no state term.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

# S start, t trap, g small goal, G big goal; t, g and G end the episode
GRID = ("...tG", ".....", "S.t..", ".....", ".t..g")
ENTER = {"t": -4, "g": 6, "G": 10}  # on top of -1 per step
MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # at the border the agent stays
WIDTH, CELLS, HORIZON, A = len(GRID[0]), len(GRID) * len(GRID[0]), 10, len(MOVES)
S = HORIZON * CELLS  # a state is (time, cell), numbered time * CELLS + cell: Q and pi may depend on the steps left
START = "".join(GRID).index("S")
LEVELS = np.arange(-HORIZON - 4, 10 - 1 + 2)  # (R,) all returns, -14 to 9, and one level above them
R, ABOVE = len(LEVELS), len(LEVELS) - 1
SIGMA_E, LAMBDA_E, STEP_SIZE, ITERATIONS = 3.0, 0.3, 0.5, 200


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


def behaviour_policy() -> np.ndarray:  # beta (S, A): "up" in the last column only, "right" everywhere else
    last_column = np.arange(S)[:, None] % WIDTH == WIDTH - 1
    return np.where(last_column, [0.55, 0.0, 0.25, 0.2], [0.0, 0.45, 0.35, 0.2])


class Data(NamedTuple):
    """What endless data of the behaviour policy say."""

    beta: np.ndarray  # (S, A)
    support: np.ndarray  # (S, A) beta > 0
    visits: np.ndarray  # (S,) probability that an episode passes through s
    p_rtg: np.ndarray  # (S, R) P(RTG | s)
    p_action: np.ndarray  # (S, R, A) P(a | s, RTG); beta(a | s) where the data have no such RTG
    pairs: np.ndarray  # (S, A) the data contain this state and action


def collect(world: World, beta: np.ndarray) -> Data:
    visits = np.zeros(S)
    visits[START] = 1
    for s in range(S):  # forward in time
        np.add.at(visits, world.next_state[s], visits[s] * beta[s] * ~world.done[s])
    z = np.zeros((S, A, R))  # P(RTG | s, a)
    for s, a in itertools.product(reversed(range(S)), range(A)):  # backward in time: RTG = r + RTG'
        r, following = world.reward[s, a], world.next_state[s, a]
        z[s, a] = LEVELS == r if world.done[s, a] else np.roll(beta[following] @ z[following], r)
    joint = (beta[:, :, None] * z).transpose(0, 2, 1)  # P(RTG, a | s) (S, R, A)
    pairs = (beta > 0) & (visits > 0)[:, None]
    return Data(beta, beta > 0, visits, joint.sum(2), supervised_policy(joint, beta), pairs)


def value_iteration(world: World, average) -> np.ndarray:
    """Q(s, a) = r + V(s'), V = average(Q): the mean under beta gives Q_beta, the maximum over the support Q*."""
    q = np.zeros((S, A))
    for _ in range(HORIZON):
        q = world.reward + ~world.done * average(q)[world.next_state]
    return q


def q_beta(world: World, data: Data) -> np.ndarray:
    return value_iteration(world, lambda q: (data.beta * q).sum(1))


def q_star(world: World, data: Data) -> np.ndarray:  # App. B.3: the best that the data's actions allow
    return value_iteration(world, lambda q: np.where(data.support, q, -np.inf).max(1))


# ---- Algorithm 1 ----


def supervised_policy(joint: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """L_SL = E ||pi(. | s, RTG) - onehot(a)||^2 is least at P(a | s, RTG). Without data, beta. (S, R, A)"""
    mass = joint.sum(2, keepdims=True)
    return np.where(mass > 0, joint / np.where(mass > 0, mass, 1), beta[:, None])


def perturbation() -> np.ndarray:
    """P(RTG + delta | RTG) (R, R): delta ~ N(0, sigma_e^2) on the levels there are, without delta = 0."""
    delta = LEVELS[None, :] - LEVELS[:, None]
    p = np.exp(-0.5 * (delta / SIGMA_E) ** 2) * (delta != 0)
    return p / p.sum(1, keepdims=True)


def alignment_gradient(q, pi, p_rtg, sign=1) -> np.ndarray:
    """Gradient of L_Align (Eq. 5) in pi(a^delta | s, RTG + delta), while a ~ pi(. | s, RTG) is held fixed. (S, R, A)"""
    falls = np.maximum(q[:, :, None] - q[:, None, :], 0)  # (S, a, a^delta) by how much Q falls from a to a^delta
    rises = falls.transpose(0, 2, 1)
    asked_more, asked_less = np.triu(perturbation()), np.tril(perturbation())  # (R, R) delta > 0, delta < 0
    if sign < 0:  # Eq. 5 with its sign turned, to see what it is good for
        asked_more, asked_less = asked_less, asked_more
    pi = p_rtg[:, :, None] * pi  # RTGs are perturbed as often as the data have them
    return asked_more.T @ (pi @ falls) + asked_less.T @ (pi @ rises)


def project(x: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The nearest probabilities: lower a row's numbers by the same amount and cut them at 0, so that they sum to 1."""
    x = np.where(allowed, x, -np.inf)
    ordered = -np.sort(-x, axis=-1)
    amount = (np.cumsum(ordered, -1) - 1) / np.arange(1, A + 1)  # to lower by, if the 1, 2, ... largest stay positive
    return np.maximum(x - amount.max(-1, keepdims=True), 0)


def critic_target(world: World, data: Data, pi, q, delta_rtg: int) -> np.ndarray:
    """Eq. 7: r + E Q(s', a') with RTG' as the data have it at s' and a' ~ pi(. | s', RTG' + Delta_RTG). (S, A)"""
    raised = np.minimum(np.arange(R) + delta_rtg, ABOVE)  # whatever exceeds all returns is the level above
    value = np.einsum("sr,sra,sa->s", data.p_rtg, pi[:, raised], q)
    return world.reward + ~world.done * value[world.next_state]


def train(world, data, lambda_e, delta_rtg, allowed=None, q=None, fit=lambda y: y, ear=None, sign=1):
    """Algorithm 1 in exact expectations; yields (Q, pi) after every iteration.

    The theorems' assumptions are the defaults: `allowed` are the data's actions, `fit` takes the targets as they are,
    `ear` is the identity: pi = ear @ theta has its own numbers for every RTG. `q` is the critic at the start.
    """
    allowed = data.support if allowed is None else allowed  # (S, A)
    q = np.zeros((S, A)) if q is None else q
    ear = np.eye(R) if ear is None else ear  # (R, R)
    theta = data.p_action  # (S, R, A) the policy starts as the DT
    # Each (s, RTG) has its own step size, by how much weight the losses give it: that sets the speed, not the minimum.
    weight = data.p_rtg + data.p_rtg @ perturbation()  # (S, R)
    step = STEP_SIZE / np.maximum(weight @ ear, 1e-12)[:, :, None]
    for _ in range(ITERATIONS):
        pi = ear @ theta
        q = np.where(data.pairs, fit(critic_target(world, data, pi, q, delta_rtg)), q)  # no data, no update
        supervised_gradient = 2 * data.p_rtg[:, :, None] * (pi - data.p_action)
        gradient = supervised_gradient + lambda_e * alignment_gradient(q, pi, data.p_rtg, sign)  # Eq. 6
        theta = project(theta - step * (ear.T @ gradient), allowed[:, None])
        yield q, ear @ theta


def time_blind(y, data: Data) -> np.ndarray:
    """Inexact updates: a critic that does not see the time takes the data's mean of its targets. (S, A)"""
    weight = (data.visits[:, None] * data.beta).reshape(HORIZON, CELLS, A)
    mean = (weight * y.reshape(weight.shape)).sum(0) / np.maximum(weight.sum(0), 1e-300)
    return np.tile(mean, (HORIZON, 1))


def blurred_ear(levels: float) -> np.ndarray:
    """A policy that hears a mean of neighbouring RTGs: what it says at one, it nearly says at the next. (R, R)"""
    ear = np.exp(-0.5 * ((LEVELS[:, None] - LEVELS) / levels) ** 2)
    return ear / ear.sum(1, keepdims=True)


# ---- what is measured ----


def distance(q, reference, data: Data) -> float:
    return float(np.abs(q - reference)[data.pairs].max())


def greedy_probability(q, pi, data: Data) -> np.ndarray:
    """pi(best actions | s, level above all returns) for every state of the data; best: argmax of Q over the support."""
    q = np.where(data.support, q, -np.inf)
    best = q >= q.max(1, keepdims=True) - 1e-9
    return (pi[:, ABOVE] * best).sum(1)[data.visits > 0]


def achieved_return(world: World, pi) -> np.ndarray:
    """Expected return from the start for every target return, which falls by each reward. (R,)"""
    v = np.zeros((S, R))
    for s, a in itertools.product(reversed(range(S)), range(A)):  # backward in time
        r, following = world.reward[s, a], world.next_state[s, a]
        rest = 0 if world.done[s, a] else v[following, np.clip(np.arange(R) - r, 0, ABOVE)]
        v[s] += pi[s, :, a] * (r + rest)
    return v[START]


def alignment_error(achieved: np.ndarray, requested: np.ndarray) -> float:  # Eq. 8; requested: (R,) bool
    return float(np.sqrt(np.mean((achieved - LEVELS)[requested] ** 2)))


def measure(world: World, data: Data, **options):
    """One run of Algorithm 1: numbers after the last iteration, the distances after each, the policy."""
    beta, star, steps = q_beta(world, data), q_star(world, data), list(train(world, data, **options))
    curve = [(distance(q, beta, data), distance(q, star, data)) for q, _ in steps]
    q, pi = steps[-1]
    greedy, achieved = greedy_probability(q, pi, data), achieved_return(world, pi)
    error = alignment_error(achieved, data.p_rtg[START] > 0)
    numbers = [*curve[-1], float((greedy > 0.99).mean()), float(greedy.mean()), error, float(achieved[ABOVE])]
    return numbers, np.array(curve), pi


def enumerate_policies(q: list[list], n_levels: int) -> tuple[int, int]:
    """Deterministic policies (state, level) -> action: all, and those whose Q never falls as the level rises."""
    free = monotone = 0
    for actions in itertools.product(range(len(q[0])), repeat=len(q) * n_levels):
        answers = np.reshape(actions, (len(q), n_levels))
        free += 1
        monotone += bool((np.diff(np.take_along_axis(np.array(q), answers, 1)) >= 0).all())
    return free, monotone


def monotone_count(n_states: int, n_levels: int, n_actions: int) -> int:  # without ties in Q
    return math.comb(n_levels + n_actions - 1, n_levels) ** n_states


def log_bound(n_states: int, n_levels: int, n_actions: int) -> float:
    return n_states * n_levels * (math.log((n_levels + n_actions - 1) / n_levels) + 1)


# ---- the story ----

COUNTED = ([[0, 1, 2]], 3), ([[0, 1, 2, 3]], 5), ([[0, 1, 2, 3]] * 2, 3), ([[0, 0, 1]], 3)  # Q of every state, |G|
HEADER = "|Q-Q_beta|", "|Q-Q*|", "greedy", "pi(best)", "Eq. 8", "achieved"
SHOWN = {"start": (0, 2, 0), "after 2 steps": (2, 3, 1), "after 5 steps": (5, 3, 4)}  # time, row, column
DELTAS = {"0": 0, "one level": 1, "above all": R}
DT, ALIGNED = "DT, Delta_RTG 0", "Q-Align DT, Delta_RTG above all"
BLURRED = "DT, RTG blurred", "Q-Align DT, RTG blurred"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    out = parser.parse_args().out
    for folder in ("raw", "figures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    world = gridworld()
    data = collect(world, behaviour_policy())
    beta, star = q_beta(world, data), q_star(world, data)
    n_states = int((data.visits > 0).sum())
    print(f"{n_states} states (time, cell), {A} actions, returns {LEVELS[0]} to {LEVELS[-2]} and one level above them.")
    print(f"max |Q_beta - Q*| {distance(beta, star, data):.2f}; lambda_e {LAMBDA_E}, sigma_e {SIGMA_E} levels.")

    print("\nTheorem 5.1: policies whose Q never falls as the RTG rises (|G|: RTG levels; the gridworld in logarithms)")
    counts, table = {}, {}
    for q, n_levels in COUNTED:
        size = len(q), n_levels, len(q[0])
        row = counts[f"{size}, Q {q[0]}"] = *enumerate_policies(q, n_levels), monotone_count(*size), log_bound(*size)
        print("  |S|, |G|, |A| {}, Q {}: free {}, monotone {}, formula {}, bound e^{:.1f}".format(size, q[0], *row))
    size = n_states, R, A
    row = counts[f"{size}, log"] = n_states * R * math.log(A), math.log(monotone_count(*size)), log_bound(*size)
    print("  |S|, |G|, |A| {}: free e^{:.0f}, formula e^{:.0f}, bound e^{:.0f}".format(size, *row))

    runs = {
        f"{kind}, Delta_RTG {name}": dict(lambda_e=lambda_e, delta_rtg=delta_rtg)
        for kind, lambda_e in {"DT": 0, "Q-Align DT": LAMBDA_E}.items()
        for name, delta_rtg in DELTAS.items()
    }
    any_action = runs[ALIGNED] | dict(allowed=np.ones((S, A), bool))
    runs |= {  # mostly ALIGNED with one thing changed
        "Q_beta fixed": runs[ALIGNED] | dict(fit=lambda y: beta),
        "Q_beta fixed, lambda_e 30": runs[ALIGNED] | dict(fit=lambda y: beta, lambda_e=30),
        "any action, Q = 0 without data": any_action,
        "any action, Q = -100 without data": any_action | dict(q=np.where(data.support, 0.0, -100.0)),
        "any action, data of all actions": runs[ALIGNED] | dict(data=collect(world, 0.8 * data.beta + 0.2 / A)),
        "critic that does not see the time": runs[ALIGNED] | dict(fit=lambda y: time_blind(y, data)),
        BLURRED[0]: runs[DT] | dict(ear=blurred_ear(4)),
        BLURRED[1]: runs[ALIGNED] | dict(ear=blurred_ear(4)),
        "Eq. 5 with its sign turned": runs[ALIGNED] | dict(sign=-1),
    }
    print(f"\nTheorems 5.2, 5.3, Eq. 8: {ITERATIONS} iterations, DT is lambda_e 0. Asked for more than all returns:")
    print("greedy: share of states where pi(best) > 0.99, by the run's own Q; pi(best): its mean; achieved: return")
    print(f"  {'':36}" + "".join(f"{column:>11}" for column in HEADER))
    curves, policies = {}, {}
    for name, options in runs.items():
        table[name], curves[name], policies[name] = measure(world, **{"data": data} | options)
        print(f"  {name:36}" + "".join(f"{x:11.3f}" for x in table[name]))
    print(f"\n{__doc__[__doc__.index('Assumed') :]}")
    (out / "raw" / "theory.json").write_text(
        json.dumps({"Theorem 5.1": counts, "columns": HEADER, "runs": table}, indent=1)
    )
    draw(world, data, star, curves, policies, table).savefig(out / "figures" / "theory.png", dpi=130)


def draw(world, data, star, curves, policies, table) -> Figure:
    figure = Figure(figsize=(15, 9), layout="constrained")
    (count, without, with_loss), (to_beta, to_star, sweep) = figure.subplots(2, 3)

    n = range(2, 257)  # actions
    count.plot(n, np.log(n), "k", label="all policies: ln |A|")
    count.plot(n, [math.log(monotone_count(1, 10, a)) / 10 for a in n], "C1", label="monotone, |G| = 10")
    count.plot(n, [math.log(monotone_count(1, a, a)) / a for a in n], "C0", label="monotone, |G| = |A|")
    count.plot(n, [log_bound(1, a, a) / a for a in n], "C0:", label="the theorem's bound, |G| = |A|")
    count.set(title="Theorem 5.1: monotone policies are far fewer", xscale="log", xlabel="number of actions |A|")
    count.set(ylabel="ln(number of policies) / (|S| |G|)")

    for axes, name, kind in (without, DT, "DT"), (with_loss, ALIGNED, "Q-Align DT"):
        for i, (state, (time, row, column)) in enumerate(SHOWN.items()):
            s = time * CELLS + row * WIDTH + column
            q = np.where(data.support[s], star[s], -np.inf)
            best = policies[name][s] @ (q >= q.max() - 1e-9)  # (R,)
            axes.plot(LEVELS, best, f"C{i}-o", markevery=list(data.p_rtg[s] > 0), label=state)
        share = (greedy_probability(star, policies[name], data) > 0.99).mean()
        axes.axvspan(LEVELS[ABOVE] - 0.5, LEVELS[ABOVE] + 0.5, color="0.85", label="more than all returns")
        axes.set(title=f"Theorem 5.2, {kind}: asked for more than\nall returns, greedy in Q* in {share:.0%} of states")
        axes.set(xlabel="RTG (dots: RTGs in the data)", ylabel="pi(argmax Q* | s, RTG)", ylim=(-0.05, 1.3))

    for axes, k, text in (to_beta, 0, "0\nkeeps Q close to Q_beta"), (to_star, 1, "above all returns\nleads Q to Q*"):
        for (i, delta), kind in itertools.product(enumerate(DELTAS), ("DT", "Q-Align DT")):
            curve = np.maximum(curves[f"{kind}, Delta_RTG {delta}"][:, k], 1e-4)
            line = f"C{i}:" if kind == "DT" else f"C{i}-"
            axes.plot(range(1, ITERATIONS + 1), curve, line, linewidth=5 - 1.5 * i, label=f"{kind}, Delta_RTG {delta}")
        axes.set(title=f"Theorem 5.3: Delta_RTG {text}", ylabel=f"max {HEADER[k]} (cut at 1e-4)")
        axes.set(xscale="log", yscale="log", xlabel="iteration of Algorithm 1")

    sweep.plot(LEVELS[:-1], LEVELS[:-1], "0.8", linewidth=5, label="achieved = target")
    for name, line in {DT: "k:", ALIGNED: "C2-", BLURRED[0]: "C4:", BLURRED[1]: "C4-"}.items():
        label = f"{name} (error {table[name][4]:.2f})"
        sweep.plot(LEVELS, achieved_return(world, policies[name]), line, marker=".", label=label)
    sweep.set(title="Eq. 8: target and achieved return", xlabel="target return", ylabel="expected return")
    for axes in count, without, with_loss, to_beta, sweep:  # the two distances share a legend
        axes.legend(fontsize=8, ncols=2 if axes in (without, with_loss) else 1)
    return figure


if __name__ == "__main__":
    main()
