"""The training steps of stages 1 and 2 as a whole: what a CUDA graph needs of them, and torch.compile."""

import shutil
from dataclasses import replace

import pretrain_q as stage1
import pytest
import torch
import train_qalign_dt as stage2
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = dict(embed_dim=16, n_layer=2, n_head=2, context_len=4, batch_size=8, critic_width=16, total_steps=10)


def co_training(hopper_file, compile=False, env="hopper-medium-test", **changes):
    args = replace(stage2.Args(), **SMALL, **changes)
    task = stage2.parse_env(env)
    cfg = stage2.resolve(args, task)
    cfg |= dict(rtg_range=(-1.0, 4.0), max_timestep=stage2.HORIZON, precision=args.precision, q_scale=1.0, gamma=0.99)
    data = stage2.read_dataset(task, (str(hopper_file),))
    windows = stage2.Windows(data, task, cfg["context_len"], torch.device("cpu"))
    return stage2.CoTraining(task, windows, cfg, compile=compile)


def pretraining(hopper_file, compile=False, **changes):
    task = stage1.parse_env("hopper-medium-test")
    cfg = stage1.resolve(replace(stage1.Args(), batch_size=8, critic_width=16, **changes), task)
    data = stage1.Transitions(stage1.read_dataset(task, (str(hopper_file),)), task, torch.device("cpu"), cfg["gamma"])
    return stage1.Pretraining(task, data, cfg, compile)


STEPS = {
    "bf16": lambda file: co_training(file, precision="bf16").step,
    "fp32, noise": lambda file: co_training(file, precision="fp32", q_noise=1.0).step,
    "symmetric": lambda file: co_training(file, precision="fp32", alignment="symmetric").step,
    "fixed critic": lambda file: co_training(file, precision="fp32", update_q=False).step,
    "DT": lambda file: co_training(file, precision="fp32", lambda_e=0.0, conv=False).step,
    "SARSA": lambda file: lambda step=pretraining(file, method="sarsa").step: step(False, True),
    "regression": lambda file: lambda step=pretraining(file, method="sarsa").step: step(True, False),
    "IQL": lambda file: lambda step=pretraining(file, method="iql").step: step(False, True),
}


class Watch(TorchDispatchMode):
    """Collects the operations that cannot be recorded in a CUDA graph: those that read a value on the host, whose result
    has a size that depends on values, or that bring a new tensor from the host. (On a CPU it sees no copies between devices.)"""

    forbidden = {
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2", "lift_fresh",
        "_efficientzerotensor", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "index.Tensor bool",
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.overloadpacket.__name__
        full = f"{name}.{func._overloadname}"
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            full = "index.Tensor bool"
        if name in self.forbidden or full in self.forbidden:
            self.found.append(full)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STEPS)
def test_nothing_in_a_step_waits_for_the_device_and_all_state_stays_in_place(name, hopper_file):
    step = STEPS[name](hopper_file)
    learner = step.__self__ if hasattr(step, "__self__") else step.__defaults__[0].__self__
    for _ in range(2):  # the first makes the optimizer's state
        step()

    def state():
        tensors = {
            f"{part}.{k}": v
            for part, x in learner.parts.items()
            for k, v in x.state_dict().items()
            if "opt" not in part
        }
        for part, x in learner.parts.items():
            if "opt" in part:
                tensors |= {f"{part}.{i}.{k}": v for i, s in x.state_dict()["state"].items() for k, v in s.items()}
                tensors |= {f"{part}.lr": lr for lr in [x.param_groups[0]["lr"]] if torch.is_tensor(lr)}
        return tensors

    before = {k: (v.data_ptr(), v.clone()) for k, v in state().items()}
    if isinstance(learner, stage2.CoTraining):
        learner.schedule(5)
    with Watch() as watch:
        step()
    assert watch.found == [] and watch.count > 100
    after = state()
    assert {k: v.data_ptr() for k, v in after.items()} == {k: pointer for k, (pointer, _) in before.items()}
    moved = {k for k in after if not torch.equal(after[k], before[k][1])}
    assert any(k.startswith(("policy.", "critic.")) for k in moved) and any("exp_avg" in k for k in moved)
    assert not isinstance(learner, stage2.CoTraining) or "actor_opt.lr" in moved


def test_the_watch_sees_what_a_cuda_graph_cannot_record():
    x = torch.randn(5)
    for bad in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x + torch.tensor(1.0),
        lambda: bool(x[0] > 0),
    ):
        with Watch() as watch:
            bad()
        assert watch.found


@pytest.mark.parametrize("regress, target", [(True, stage1.return_target), (False, stage1.sarsa_target)])
def test_stage_1_regresses_on_returns_or_takes_sarsas_target(regress, target, hopper_file):
    learner = pretraining(hopper_file, method="sarsa")
    i = torch.randint(len(learner.data.train), (8,), generator=torch.Generator().manual_seed(learner.cfg["seed"]))
    rows = learner.data.train[i]
    expected, _ = stage1.td_loss(learner.critic, learner.data, rows, target(learner.target_critic, learner.data, rows))
    assert learner.step(regress, False)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_schedule_falls_from_the_learning_rates_to_0_along_a_cosine(hopper_file):
    learner = co_training(hopper_file, precision="fp32", actor_lr=1e-3, critic_lr=2e-3)
    for step, factor in ((0, 1.0), (5, 0.5), (10, 0.0)):
        assert learner.schedule(step) == pytest.approx(1e-3 * factor, abs=1e-12)
        assert learner.actor_opt.param_groups[0]["lr"].item() == pytest.approx(1e-3 * factor, abs=1e-9)
        assert learner.critic_opt.param_groups[0]["lr"].item() == pytest.approx(2e-3 * factor, abs=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_steps_agree_with_eager_ones(hopper_file):
    """Float32, without dropout, whose random numbers differ: losses and norms to 1e-3, weights after two steps to 1e-4."""
    results = []
    for compile in (False, True):
        learner = co_training(hopper_file, compile, precision="fp32")
        learner.policy.eval()
        learner.schedule(0)
        results.append((torch.stack([learner.step() for _ in range(2)]), learner))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-5)
    for part in ("policy", "critic", "target_policy", "target_critic"):
        for eager, compiled in zip(*(getattr(learner, part).parameters() for _, learner in results)):
            torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    learner = results[1][1]
    learner.policy.train()  # with dropout the numbers are others, but of the same size
    torch.testing.assert_close(learner.step()[:3], results[0][0][1][:3], rtol=0.5, atol=0.1)

    losses = []
    for compile in (False, True):
        pretrainer = pretraining(hopper_file, compile, method="sarsa")
        losses.append(torch.stack([pretrainer.step(False, True) for _ in range(2)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_compile_without_a_compiler_is_one_line(hopper_file, tmp_path, run_main, monkeypatch):
    for stage in (stage1, stage2):
        monkeypatch.setattr(stage.shutil, "which", lambda name: None)
        argv = [
            "--env",
            "hopper-medium-test",
            "--dataset-path",
            hopper_file,
            "--runs-dir",
            tmp_path,
            "--device",
            "cpu",
            "--compile",
        ]
        code, _, err = run_main(stage, *argv)
        assert code == 2 and "--compile: torch.compile finds no C++ compiler" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_cuda_graph_warms_up_records_and_replays_each_argument_apart(monkeypatch):
    """Its bookkeeping, with a stand-in for torch.cuda that records calls."""
    events = []

    class Graph:
        def register_generator_state(self, generator):
            events.append("register")

        def replay(self):
            events.append("replay")

    class Context:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            events.append(self.what)

        def __exit__(self, *_):
            pass

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: Context("eager"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Context("record"))
    step = stage2.CudaGraph(lambda flag: events.append(flag) or len(events), torch.Generator())
    results = [step(True) for _ in range(5)]
    assert events == ["eager", True] * 3 + ["register", "record", True, "replay", "replay"] and results[3] == results[4]
    events.clear()
    for _ in range(4):
        step(False)
    step(True)
    assert events == ["eager", False] * 3 + ["register", "record", False, "replay", "replay"]
