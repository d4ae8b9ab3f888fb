"""results/diagnose_alignment.py: the forces behind a policy that follows its return-to-go, or does not."""

import json
import shutil

import diagnose_alignment as diagnosis
import pytest
import torch
import train_qt
from conftest import ENV, argv, data_of, write_hdf5

import evaluate_alignment as stage3
import train_qalign_dt as stage2


@pytest.fixture
def parts(pipeline, hopper_file):
    trained = stage3.load_policy(pipeline.policy, "fp32", torch.device("cpu"))
    args = diagnosis.Args((pipeline.policy,), windows=400)
    return trained, stage3.load_critic(trained), data_of(ENV, hopper_file), args


def without(parts, dropout=False, noise=False):
    """The same parts with one of the two sources of chance, or both, switched off."""
    trained = parts[0]
    for module in trained.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0 if dropout else 0.1
    config = trained.content["config"] | {"action_noise": 0.0 if noise else 0.3}
    return trained._replace(content=trained.content | {"config": config}), *parts[1:]


def test_without_dropout_and_noise_nothing_of_the_loss_is_by_chance(parts):
    torch.manual_seed(0)
    for p in (*parts[0].policy.parameters(), *parts[1].parameters()):  # so that Q moves by more than rounding
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.normal_(parts[0].policy.embed_rtg.weight, std=30.0)  # the data's normalised RTG end at 0.05
    parts[1].weights[-1].data.mul_(1000)
    rows = diagnosis.measure(*without(parts, dropout=True, noise=True))
    for row in rows:  # to rounding
        assert row["align_loss"] == pytest.approx(row["align_loss_exact"], rel=1e-3, abs=1e-2)
        assert abs(row["violated"] - row["violated_exact"]) <= 0.05
        assert row["align_loss"] < 0.1 or abs(row["chance_share"]) < 1e-3
    assert max(row["align_loss"] for row in rows) > 0.1
    rows = diagnosis.measure(*without(parts))
    assert max(abs(row["align_loss"] - row["align_loss_exact"]) for row in rows) > 0.1


@pytest.mark.parametrize("off", ["dropout", "noise"])
def test_a_policy_that_ignores_its_rtg_has_no_slope_and_a_loss_by_chance_only(parts, off):
    torch.nn.init.zeros_(parts[0].policy.embed_rtg.weight)
    rows = diagnosis.measure(*without(parts, **{off: True}))
    nothing = ("q_slope", "q_range", "off_clean", "align_loss_exact")
    assert all(abs(row[name]) < 1e-4 for row in rows for name in nothing)  # to rounding
    assert all(row["align_loss"] > 0 and row["chance_share"] > 0.9 for row in rows)
    steps = [row["timestep"] for row in rows]
    assert len(rows) == 10 and steps == sorted(steps) and steps[0][0] >= 0


def test_slope_range_and_gain_of_a_linear_critic_by_hand(parts):
    """Q = 2 a_0 in both critics, and an action whose first part is the normalised RTG of the last step."""
    trained, _, data, args = parts

    def critic(obs, act):
        return (2 * act[..., 0]).expand(2, *act.shape[:-1])

    class Answer(torch.nn.Module):
        def forward(self, rtg, obs, act, timestep, valid):
            return torch.stack([rtg, 0 * rtg, 0 * rtg], dim=-1), obs

    trained = without((trained,), noise=True)[0]
    rows = diagnosis.measure(trained._replace(policy=Answer()), critic, data, args)
    low, high = trained.content["config"]["rtg_range"]
    for row in rows:
        assert row["q_slope"] == pytest.approx(2.0, rel=1e-3)  # per 1,000 of return, which is 1 normalised
        assert row["align_loss"] == 0 and row["gradient"] == pytest.approx(2.0) and row["cosine"] == pytest.approx(1.0)
        assert 0 < row["q_range"] <= 2 * (high - low) * 1.001 and row["disagree_data"] == row["disagree_highest"] == 0


def test_command_line(pipeline, hopper_file, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "run", stage2.run, raising=False)
    flags = ["--windows", 200]  # the data lie beside the run
    code, out, err = run_main(diagnosis, pipeline.policy, *flags)
    files = [pipeline.folder / f"diagnosis.{kind}" for kind in ("json", "csv", "png")]
    try:
        result = json.loads(files[0].read_text())
        assert code == 0 and all(file.stat().st_size for file in files), err
        assert result["results"][0]["method"] == "Q-Align DT" and len(result["results"][0]["groups"]) == 10
        assert "timesteps" in out and len([line for line in out.splitlines() if " -" in line]) == 10
    finally:
        for file in files:  # the runs of `pipeline` are shared
            file.unlink(missing_ok=True)
    code, _, err = run_main(diagnosis, pipeline.dt, *flags)
    assert code == 2 and "without an alignment loss" in err and err.count("\n") == 1


def test_another_methods_policy_is_one_line(run_main, hopper_file, tmp_path, monkeypatch):
    """QT's has a critic, too."""
    monkeypatch.setattr(diagnosis, "run", stage2.run, raising=False)
    flags = ["--preset", "small", "--total-steps", 2, "--critic", "none", "--device", "cpu"]
    assert run_main(train_qt, *argv(hopper_file, tmp_path, *flags))[0] == 0
    code, _, err = run_main(diagnosis, tmp_path / f"{ENV}__train_qt__1" / "policy.pt")
    assert code == 2 and err.count("\n") == 1 and "of train_qt.py; only policies of train_qalign_dt.py" in err


@pytest.mark.parametrize("flags", [["--windows", 9], ["--windows", 10**30], ["--seed", -1], ["--seed", 10**40]])
def test_flags_out_of_bounds(flags, pipeline, run_main, monkeypatch):
    monkeypatch.setattr(diagnosis, "run", stage2.run, raising=False)
    code, out, err = run_main(diagnosis, pipeline.policy, *flags)
    assert (code, out) == (2, "") and flags[0] in err and "must be between" in " ".join(err.replace("│", " ").split())


def test_an_edited_configuration_is_one_line(pipeline, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "run", stage2.run, raising=False)
    shutil.copytree(pipeline.runs / f"{ENV}__data", tmp_path / f"{ENV}__data")
    (tmp_path / "run").mkdir()
    content = torch.load(pipeline.policy, weights_only=True)
    changes = ({"sigma_e": -1.0}, {"embed_dim": None}, {"rtg_range": (2.0, 1.0)}, {"actor_lr": "x", "n_head": 3})
    for change in (*({"config": content["config"] | one} for one in changes), {"q_scale": 0}, {"q_scale": "x"}):
        torch.save(content | change, tmp_path / "run" / "policy.pt")
        code, _, err = run_main(diagnosis, tmp_path / "run" / "policy.pt")
        assert code == 2 and err.count("\n") == 1 and "not a whole checkpoint" in err, (change, err)


def test_other_data_are_refused(pipeline, hopper_arrays, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "run", stage2.run, raising=False)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    policy = shutil.copy(pipeline.policy, tmp_path / "runs" / "run")
    observations, actions, rewards, *flags = hopper_arrays
    other = write_hdf5(tmp_path / "other.hdf5", observations, actions, rewards + 1, *flags)
    code, _, err = run_main(diagnosis, policy, "--dataset-path", other)
    assert code == 2 and err.count("\n") == 1, err
    assert "hopper_tiny.hdf5, not on" in err and "other.hdf5" in err and "--dataset-path?" in err
    assert sorted(p.name for p in (tmp_path / "runs" / "run").iterdir()) == ["policy.pt"]
