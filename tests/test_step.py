"""The training steps of stages 1 and 2 as a whole: what they move, what a CUDA graph needs of them, torch.compile."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY2, argv, data_of
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain_q as stage1
import train_qalign_dt as stage2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(hopper_file):
    return data_of("hopper-medium-test", hopper_file)


def co_training(data, device=CPU, **changes) -> stage2.CoTraining:
    fields = dict(embed_dim=16, n_layer=2, n_head=2, context_len=4, batch_size=8, critic_width=16, total_steps=10)
    fields |= dict(actor_lr=1e-3, lambda_e=0.3, sigma_e=1.0, delta_rtg=0.5, max_push=0.3, rtg_range=(-1.0, 4.0))
    fields |= dict(dropout=0.1, action_noise=0.3, eval_context_len=0)
    config = stage2.Config(**(fields | changes))
    return stage2.CoTraining(data.task, stage2.Windows(data, config.context_len, device), config)


def pretraining(data, **changes) -> stage1.Pretraining:
    fields = dict(method="sarsa", total_steps=10, warm_start_steps=0, batch_size=8, critic_width=16, lr=1e-3)
    args = stage1.Args(**(fields | changes))
    return stage1.Pretraining(data.task, stage1.Transitions(data, CPU, args.gamma), args)


def weights(learner) -> dict[str, torch.Tensor]:
    """Every parameter of a learner, cloned, as one flat vector per network."""
    nets = {name: part for name, part in learner.saved_state.items() if isinstance(part, torch.nn.Module)}
    return {name: torch.cat([p.detach().flatten() for p in net.parameters()]) for name, net in nets.items()}


def test_the_seed_decides_weights_windows_and_dropout(data):
    for make in (co_training, pretraining):
        runs = []
        for seed in (1, 1, 2):
            learner = make(data, seed=seed)
            drawn = torch.randn(3, generator=learner.generator), torch.randn(3)
            runs.append((*weights(learner).values(), *drawn))
        for one, again, other in zip(*runs):
            assert torch.equal(one, again) and not torch.equal(one, other)


# ---- one step of Algorithm 1 ----


def test_a_dt_sees_the_windows_of_a_q_align_dt_of_its_seed(data):
    drawn = []
    for changes in ({"update_q": False}, {"lambda_e": 0.0}):
        learner = co_training(data, action_noise=0.0, **changes)
        learner.step()
        drawn.append(learner.windows.sample(8, learner.generator).rtg)
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "changes, moved",
    [
        ({}, {"policy", "critic", "target_policy", "target_critic"}),
        ({"update_q": False}, {"policy"}),
        ({"lambda_e": 0.0, "conv": False, "state_loss": False}, {"policy"}),
    ],
    ids=["co-training", "fixed critic", "DT"],
)
def test_what_a_step_moves_and_that_targets_follow_by_tau(changes, moved, data):
    learner = co_training(data, **changes)
    learner.set_learning_rates(0)
    before = weights(learner)
    assert all(torch.equal(before[f"target_{name}"], before[name]) for name in ("policy", "critic"))
    learner.step()
    learner.step()
    after = weights(learner)
    assert {name for name in after if not torch.equal(after[name], before[name])} == moved
    learner.step()
    last = weights(learner)
    for name in {"policy", "critic"} if len(moved) == 4 else ():
        expected = after[f"target_{name}"] + 0.005 * (last[name] - after[f"target_{name}"])
        torch.testing.assert_close(last[f"target_{name}"], expected, rtol=0, atol=1e-7)
        assert (last[name] - after[f"target_{name}"]).abs().max() > 2e-4  # so 0.005 of it is well above the tolerance


def test_the_policy_is_trained_against_the_critic_just_updated(data):
    """Lines 5 to 10, through the metrics: q_loss of the critic before its update, q_mean of the one after."""
    learner = co_training(data, action_noise=0.0)
    learner.policy.eval()  # no dropout, so the step can be repeated
    learner.set_learning_rates(0)
    policy, critic = copy.deepcopy(learner.policy), copy.deepcopy(learner.critic)
    metrics = dict(zip(stage2.METRICS, learner.step().tolist(), strict=True))
    generator = torch.Generator().manual_seed(learner.config.seed)
    batch = learner.windows.sample(8, generator)
    q_loss = stage2.critic_loss(critic, critic, policy, batch, learner.gamma, learner.config, generator)
    assert metrics["q_loss"] == pytest.approx(q_loss.item(), rel=1e-4)
    with torch.no_grad():
        a_hat, _ = policy(*batch.inputs)
        old, new = (stage2.masked_mean(q(batch.obs, a_hat)[0], batch.valid).item() for q in (critic, learner.critic))
    assert metrics["q_mean"] == pytest.approx(new, rel=1e-5) and abs(old - new) > 1e-3 * abs(new)


def test_dropout_is_on_in_the_policy_and_off_in_its_target(data):
    for rate in (0.1, 0.0):
        learner = co_training(data, dropout=rate)
        assert learner.policy.training and not learner.target_policy.training
        rates = {module.p for module in learner.policy.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {rate}


def test_the_gradient_norm_is_clipped_at_15():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = torch.optim.SGD([p], lr=1.0)
    assert stage2.descend(opt, (30 * p).sum()).item() == pytest.approx(60)  # the norm before clipping
    assert p.detach().norm().item() == pytest.approx(15, rel=1e-4)


def test_learning_rates_fall_to_0_along_a_cosine(data):
    learner = co_training(data, actor_lr=1e-3)
    for step, factor in ((0, 1.0), (5, 0.5), (10, 0.0)):
        assert learner.set_learning_rates(step) == pytest.approx(1e-3 * factor, abs=1e-12)
        assert learner.actor_opt.param_groups[0]["lr"].item() == pytest.approx(1e-3 * factor, abs=1e-9)
        assert learner.critic_opt.param_groups[0]["lr"].item() == pytest.approx(3e-4 * factor, abs=1e-9)
    learner = co_training(data, actor_lr=1e-3, average=0.1)  # the actor's stays
    assert learner.set_learning_rates(5) == 1e-3 and learner.set_learning_rates(10) == 1e-3
    rates = [opt.param_groups[0]["lr"].item() for opt in (learner.actor_opt, learner.critic_opt)]
    assert rates == pytest.approx([1e-3, 0.0], abs=1e-9)


def test_the_average_is_of_all_weights_so_far_then_forgets_at_its_rate(data):
    learner = co_training(data, average=0.3, lambda_e=0.0)
    learner.set_learning_rates(0)
    seen = []
    for step in range(1, 6):
        learner.step()
        learner.update_average(step)
        seen.append(weights(learner)["policy"])
        if step <= 3:
            torch.testing.assert_close(weights(learner)["average"], torch.stack(seen).mean(dim=0))
    expected = 0.7 * (0.7 * torch.stack(seen[:3]).mean(dim=0) + 0.3 * seen[3]) + 0.3 * seen[4]
    torch.testing.assert_close(weights(learner)["average"], expected)
    assert (seen[4] - expected).abs().max() > 1e-3


def test_what_is_evaluated_and_saved_is_the_policy_or_its_average(data):
    plain, averaged = co_training(data), co_training(data, average=0.1)
    assert plain.eval_policy is plain.policy and averaged.eval_policy is averaged.saved_state["average"]
    plain.update_average(1)  # nothing
    assert "average" not in plain.saved_state and not averaged.eval_policy.training
    config = stage2.Config(eval_rollouts=1, context_len=4)
    for learner in plain, averaged:
        stage2.evaluate(learner.eval_policy, data, config)
        assert learner.policy.training and learner.eval_policy.training == (learner is plain)


# ---- one step of stage 1 ----


def test_stage_1_regresses_on_returns_first_then_takes_sarsas_target(data):
    for warm_start_steps, target in ((1, stage1.return_target), (0, stage1.sarsa_target)):
        learner = pretraining(data, warm_start_steps=warm_start_steps)
        usable, generator = learner.data.usable, torch.Generator().manual_seed(learner.args.seed)
        rows = usable[torch.randint(len(usable), (8,), generator=generator)]
        y = target(learner.target_critic, learner.data, rows)
        expected, _ = stage1.td_loss(learner.critic, learner.data, rows, y)
        assert learner.step(0)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_step_of_iql(data):
    learner = pretraining(data, method="iql")
    with torch.no_grad():
        for p in learner.target_critic.parameters():
            p.add_(0.1)
    usable, generator = learner.data.usable, torch.Generator().manual_seed(learner.args.seed)
    rows = usable[torch.randint(len(usable), (8,), generator=generator)]
    y = stage1.iql_target(learner.value, learner.data, rows)
    q_loss = stage1.td_loss(learner.critic, learner.data, rows, y)[0].item()
    v_loss = stage1.value_loss(learner.value, learner.target_critic, learner.data, rows).item()
    assert learner.step(0)[[0, 2]].tolist() == pytest.approx([q_loss, v_loss], rel=1e-5)


def test_stage_1_moves_its_target_by_tau_every_second_step(data):
    learner = pretraining(data)
    for step in range(3):
        before = weights(learner)
        learner.step(step)
        after = weights(learner)
        assert not torch.equal(after["critic"], before["critic"])
        follow = 0.005 * (after["critic"] - before["target_critic"]) if step % 2 == 0 else 0.0
        torch.testing.assert_close(after["target_critic"], before["target_critic"] + follow, rtol=0, atol=1e-7)
        assert torch.equal(after["target_critic"], before["target_critic"]) == (step % 2 == 1)


# ---- what a CUDA graph needs ----


class Watch(TorchDispatchMode):
    """Collects operations that a CUDA graph cannot record.

    They read a value on the host, have a result whose size depends on values, or bring a new tensor from the host.
    (On a CPU it sees no copies between devices.)
    """

    forbidden = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}
    forbidden |= {"unique_dim", "unique_consecutive", "lift_fresh", "_efficientzerotensor", "repeat_interleave.Tensor"}

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in self.forbidden or f"{name}.{func._overloadname}" in self.forbidden:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def state_of(learner) -> dict[str, torch.Tensor]:
    """Every tensor that a step may change."""
    tensors = {}
    for name, part in learner.saved_state.items():
        if isinstance(part, torch.nn.Module):
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
            continue
        for i, state in part.state_dict()["state"].items():
            tensors |= {f"{name}.{i}.{key}": value for key, value in state.items()}
    return tensors


VARIANTS = {
    "bf16, noise": (co_training, dict(bf16=True, q_noise=1.0)),
    "symmetric": (co_training, dict(alignment="symmetric")),
    "fixed critic": (co_training, dict(update_q=False, alignment="squared")),
    "DT": (co_training, dict(lambda_e=0.0, conv=False, state_loss=False)),
    "SARSA": (pretraining, {}),
    "regression": (pretraining, dict(warm_start_steps=10)),
    "IQL": (pretraining, dict(method="iql")),
}


@pytest.mark.parametrize("make, changes", VARIANTS.values(), ids=VARIANTS)
def test_a_step_never_waits_for_the_device_and_keeps_its_state_in_place(make, changes, data):
    learner = make(data, **changes)
    if make is co_training:
        learner.set_learning_rates(0)
    argument = () if make is co_training else (2,)
    learner.step(*argument)  # makes the optimisers' state
    before = {name: (x.data_ptr(), x.clone()) for name, x in state_of(learner).items()}
    with Watch() as watch:
        learner.step(*argument)
    assert watch.found == [] and watch.count > 50
    after = state_of(learner)
    assert {name: x.data_ptr() for name, x in after.items()} == {name: pointer for name, (pointer, _) in before.items()}
    moved = {name for name, x in after.items() if not torch.equal(x, before[name][1])}
    assert any(name.startswith(("policy.", "critic.")) for name in moved) and any("exp_avg" in name for name in moved)


def test_new_learning_rates_stay_in_place_too(data):
    learner = co_training(data)
    before = [opt.param_groups[0]["lr"].data_ptr() for opt in (learner.actor_opt, learner.critic_opt)]
    learner.set_learning_rates(5)
    assert before == [opt.param_groups[0]["lr"].data_ptr() for opt in (learner.actor_opt, learner.critic_opt)]


def test_a_run_resumes_with_learning_rates_on_a_device(data):
    """A checkpoint is read onto the CPU. (The device here is meta, which every machine has.)"""
    learner = co_training(data)
    learner.step()
    for opt in (learner.actor_opt, learner.critic_opt):
        opt.param_groups[0]["lr"] = torch.zeros((), device="meta")
    content = {name: part.state_dict() for name, part in learner.saved_state.items()}
    content = copy.deepcopy(content) | dict(progress=vars(stage2.Progress(step=1)), sums=torch.ones(3))
    for name in ("actor_opt", "critic_opt"):
        content[name]["param_groups"][0]["lr"] = torch.zeros(())
    content["random"] = (learner.generator.get_state(), torch.get_rng_state(), torch.zeros(0))
    sums = torch.zeros(3)
    assert stage2.restore(content, ROOT, learner, sums, 10, stage2.Progress).step == 1 and sums.tolist() == [1, 1, 1]
    assert learner.actor_opt.param_groups[0]["lr"].device.type == "meta"


def test_the_watch_sees_what_a_cuda_graph_cannot_record():
    x = torch.randn(5)
    bad = [lambda: x.sum().item(), lambda: x[x > 0], x.nonzero, lambda: x + torch.tensor(1.0), lambda: bool(x[0] > 0)]
    for call in bad:
        with Watch() as watch:
            call()
        assert watch.found


def test_cuda_graph_warms_up_records_and_replays(monkeypatch):
    """Its bookkeeping, with a stand-in for torch.cuda that records calls."""
    events = []

    class Context:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            events.append(self.what)

        def __exit__(self, *_):
            pass

    def stream():
        return SimpleNamespace(wait_stream=lambda other: None)

    def cuda_graph():
        return SimpleNamespace(
            register_generator_state=lambda generator: events.append("register"),
            replay=lambda: events.append("replay"),
        )

    for name, fake in dict(Stream=stream, current_stream=stream, CUDAGraph=cuda_graph).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: Context("eager"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Context("record"))
    learner = SimpleNamespace(step=lambda: events.append("step") or len(events), generator=torch.Generator())
    step = stage2.cuda_graph(learner)
    assert events == []  # a resumed run restores its state in between
    results = [step() for _ in range(5)]
    assert events == ["eager", "step"] * 3 + ["register", "record", "step", "replay", "replay"]
    assert results[:3] == [2, 4, 6] and results[3] == results[4] == 9  # the recorded result, which a replay overwrites


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_cuda_graph_steps_equal_eager_ones(bf16, data):
    """Same losses and weights over three warm-up and five replayed steps, dropout and learning rates included."""
    losses, results = [], []
    for graph in (False, True):
        learner = co_training(data, stage2.pick_device("cuda"), bf16=bf16)
        step = stage2.cuda_graph(learner) if graph else learner.step
        history = []
        for i in range(8):
            learner.set_learning_rates(i)
            history.append(step().clone())
        losses.append(torch.stack(history))
        results.append(weights(learner))
    tolerance = dict(rtol=2e-2, atol=1e-3) if bf16 else dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses[1], losses[0], **tolerance)
    assert not torch.allclose(losses[0][6], losses[0][7], **tolerance)  # other windows, other dropout
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=0, atol=1e-3 if bf16 else 1e-5)


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_restored_learner_goes_on_as_the_old_one(device, data, tmp_path):
    """On CUDA with the graph of the step, whose random streams and learning rates are on the device."""

    def begin():
        learner = co_training(data, stage2.pick_device(device), average=0.1)
        return learner, stage2.cuda_graph(learner) if device == "cuda" else learner.step

    def go(learner, step, first, last):
        values = []
        for i in range(first, last):
            learner.set_learning_rates(i)
            values.append(step().clone())
            learner.update_average(i + 1)
        return torch.stack(values)

    old, step = begin()
    sums = go(old, step, 0, 6).sum(dim=0)
    stage2.save_resume(tmp_path, dict(stage=stage2.STAGE, config={}), old, sums, stage2.Progress(step=6))
    expected, expected_weights = go(old, step, 6, 10), weights(old)
    new, step = begin()
    content, restored = stage2.load_checkpoint(tmp_path / "resume.pt", stage2.STAGE), torch.zeros_like(sums)
    assert stage2.restore(content, tmp_path, new, restored, 10, stage2.Progress).step == 6 and restored.equal(sums)
    tolerance = dict(rtol=0, atol=0) if device == "cpu" else dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(go(new, step, 6, 10), expected, **tolerance)
    for name, x in weights(new).items():
        torch.testing.assert_close(x, expected_weights[name], **tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make, changes", list(VARIANTS.values())[:4], ids=list(VARIANTS)[:4])
def test_cuda_reports_no_synchronisation_in_a_step(make, changes, data):
    learner = make(data, stage2.pick_device("cuda"), **changes)
    learner.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- torch.compile ----


@pytest.mark.slow
def test_compile_without_a_compiler_is_one_line(hopper_file, tmp_path):
    command = [sys.executable, ROOT / "train_qalign_dt.py", *argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0)]
    surroundings = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run([*command, "--compile"], env=surroundings, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "No working C++ compiler" in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr and [path.name for path in tmp_path.rglob("*.pt")] == ["dataset.pt"]


@pytest.mark.slow
def test_compiled_steps_agree_with_eager_ones(data):
    """Without dropout, whose random numbers differ: losses and norms to 1e-3, weights after two steps to 1e-4."""
    losses, results = [], []
    for compile_nets in (False, True):
        learner = co_training(data, n_layer=1, compile=compile_nets)
        learner.policy.eval()
        learner.set_learning_rates(0)
        losses.append(torch.stack([learner.step() for _ in range(2)]))
        results.append(weights(learner))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=0, atol=1e-4)
    assert type(learner.compiled["policy"]) is not type(learner.policy)
    learner.policy.train()  # with dropout the numbers are others, but of the same size
    torch.testing.assert_close(learner.step()[:3], losses[0][1][:3], rtol=0.5, atol=0.1)
