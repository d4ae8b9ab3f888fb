"""Minari's datasets: the reader on files in its layout, and on one that the minari package makes."""

import importlib.util
import json
import os
import shutil
import sys

import gymnasium
import h5py
import numpy as np
import pytest
from conftest import TINY1, TINY2, data_of
from test_prepare import play, write_minari

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2

NAME = "tests/hopper/mixed-v0"
WRAPPER = dict(additional_wrappers=[dict(name="OrderEnforcing", entry_point="os:system", kwargs={})])


@pytest.fixture(scope="module")
def episodes():
    """Random actions in Hopper-v5."""
    found = play(gymnasium.make("Hopper-v5", max_episode_steps=15), 12)
    assert any(e[3] for e in found) and any(e[4] for e in found)  # both kinds of end are in it
    return [(*map(np.array, e[:3]), *e[3:]) for e in found]


@pytest.fixture
def folder(tmp_path, monkeypatch, episodes):
    """A dataset in Minari's layout, where Minari keeps it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_minari(NAME, episodes, id="Hopper-v5", max_episode_steps=1000)
    return tmp_path / "minari" / NAME / "data"


def write_metadata(folder, more=(), **spec):
    spec = dict(kwargs={}, max_episode_steps=1000, additional_wrappers=[]) | spec
    metadata = dict(env_spec=json.dumps(spec), total_episodes=12, data_format="hdf5")
    (folder / "metadata.json").write_text(json.dumps(metadata | dict(more)))


def read():
    return data_of(NAME)


def error_of(capsys, name=NAME) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        data_of(name)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    return error


def test_episodes_are_read_in_their_order_without_the_last_observations(folder, episodes):
    data = read()
    assert data.lengths.tolist() == [len(e[2]) for e in episodes]
    assert len(episodes) > 10  # episode_10 is after episode_9
    np.testing.assert_allclose(data.returns, [e[2].sum() for e in episodes], rtol=1e-6)
    for (observations, actions, *_), a, b in zip(episodes, data.starts, data.ends):
        np.testing.assert_array_equal(data.observations[a:b], observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(data.actions[a:b], actions)
    assert data.terminals[data.ends - 1].tolist() == [e[3] for e in episodes]
    assert data.terminals.sum() == sum(e[3] for e in episodes)
    assert data.task.label == f"{NAME} (Minari)" and not data.task.is_d4rl


def test_metadata_decide_the_environment_and_scores_are_raw_returns(folder):
    task = read().task
    assert (task.body, task.quality, task.env_id) == ("hopper", "mixed-v0", "Hopper-v5")
    assert task.score(1234.5) == 1234.5
    assert task.name == NAME and task.rtg_scale == 1000  # the body's
    write_metadata(folder, id="Hopper-v5", more=dict(ref_min_score=-20.0, ref_max_score=180))
    task = read().task
    assert task.score(80.0) == 50


@pytest.mark.parametrize(
    "name",
    ["hopper/../x-v0", "../evil/hopper/x-v0", "/etc/x-v0", "a//x-v0", "./a/x-v0", "a/hopper/b", "a/x-v0/", "a/x\n-v0"],
)
def test_ids_name_nothing_outside_minaris_folder(name, folder, capsys):
    """Nor outside the runs folder: nothing is looked for before."""
    assert "Minari's ids look like" in error_of(capsys, name)


def test_any_other_id_is_looked_for(folder, capsys):
    for name in ("mujoco/ant/expert-v0", "D4RL/pen/human-v2", "x-y/z.1/a_b-v12"):
        assert f"minari download {name}" in error_of(capsys, name)


def test_the_recorded_environment_is_the_one_of_the_rollouts(folder, capsys):
    for matter, kwargs in (({}, {"render_mode": None, "width": 480}), *[({"healthy_reward": 2.0},) * 2]):
        write_metadata(folder, id="Hopper-v5", kwargs=kwargs)
        task = read().task
        assert (task.env_id, task.env_kwargs, task.body) == ("Hopper-v5", matter, "" if matter else "hopper")
        kind = stage3.Environments if matter else stage3.Simulator  # whose reward is the default one
        assert type(stage3.simulate(task, [1])) is kind
    write_metadata(folder, id="Hopper-v4")
    assert read().task.env_id == "Hopper-v4"
    write_metadata(folder, id="Walker2d-v5")
    assert "observations has shape" in error_of(capsys)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}", "no 'env_spec'"),
        ('{"env_spec": null}', "env_spec is null"),
        ('{"env_spec": "{}"}', "no 'id'"),
        ("[]", "list indices"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion" if sys.version_info < (3, 14) else "overflow"),
        ("\udcff", "codec"),
    ],
)
def test_metadata_without_an_environment_is_one_line(folder, capsys, text, says):
    (folder / "metadata.json").write_text(text, errors="surrogateescape")
    assert says in error_of(capsys)


def test_metadata_of_an_older_minari_and_other_formats_get_the_line_that_helps(folder, capsys):
    (folder / "metadata.json").rename(folder / "moved.json")
    assert "No such file" in error_of(capsys)
    with h5py.File(folder / "main_data.hdf5", "a") as f:
        f.attrs["env_spec"] = json.dumps(dict(id="Hopper-v5"))
    error = error_of(capsys)
    assert "an older Minari kept it in the HDF5 file" in error and "newer Minari" in error
    write_metadata(folder, id="Hopper-v5", more=dict(data_format="arrow"))
    (folder / "main_data.hdf5").unlink()
    error = error_of(capsys)
    assert "Arrow" in error and "minari download" not in error  # which would bring the same


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(id="os:system"), "os:system"),
        (dict(id="this_one:Hopper-v5"), "this_one:Hopper-v5"),
        (dict(id="qalign_mazes:os:system"), "os:system"),
        (dict(id="Hopper-v2"), "not one of Gymnasium's"),
        (dict(id="CartPole-v1"), "CartPole-v1"),
        (dict(id="Hand-v9"), "gymnasium_robotics"),
        (dict(id=["Hopper-v5"]), "not plain"),
        (dict(id="a\n\x1b[31mb"), r"a\n\x1b[31mb"),
        (dict(kwargs=[1]), "not plain"),
        (dict(kwargs={"entry_point": "os:system"}), "entry_point"),
        (dict(kwargs={"id": "os:system"}), "'id'"),
        (dict(kwargs={"max_episode_steps": 3}), "max_episode_steps"),
        (dict(kwargs={"reset_noise_scale": "much"}), "does not run with"),
        (dict(max_episode_steps=0), "max_episode_steps 0"),
        (dict(max_episode_steps=True), "max_episode_steps True"),
        (dict(max_episode_steps="many"), "max_episode_steps 'many'"),
        (dict(max_episode_steps=10**30), "max_episode_steps 1000"),
        (
            dict(additional_wrappers=[dict(name="TransformReward", entry_point="os:system", kwargs={})]),
            "TransformReward",
        ),
        (
            dict(additional_wrappers=[dict(name="TimeLimit", entry_point="os:system", kwargs=[1])]),
            "names no environment",
        ),
        (dict(additional_wrappers=["TimeLimit"]), "names no environment"),
    ],
)
def test_metadata_choose_no_code(folder, capsys, tmp_path, monkeypatch, change, says):
    """Neither through an id nor through arguments or wrappers: one line, and a prefix's module is not imported."""
    (tmp_path / "this_one.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("called"))
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)  # as where it is not installed
    spec = dict(id="Hopper-v5", entry_point="os:system", vector_entry_point="os:system", **WRAPPER)
    write_metadata(folder, **spec | change)
    assert says in error_of(capsys) and not (tmp_path / "ran").exists()
    write_metadata(folder, **spec)
    assert read().task.env_id == "Hopper-v5"  # an entry point is never looked at


def test_harmless_wrappers_stay_and_the_recorded_limit_is_the_rollouts(folder, capsys):
    assert read().task.horizon == 1000  # recorded, though all episodes that end by timeout have 15 steps
    assert "at most" not in capsys.readouterr().out
    names = ("Monitor", "OrderEnforcing", "PassiveEnvChecker")
    wrappers = [dict(name=name, entry_point=f"x:{name}", kwargs=None) for name in names]
    write_metadata(folder, id="Hopper-v5", max_episode_steps=30, additional_wrappers=wrappers)
    assert read().task.horizon == 30 and "episodes of at most 30 steps" in capsys.readouterr().out
    wrappers.append(dict(name="TimeLimit", entry_point="x:TimeLimit", kwargs=dict(max_episode_steps=20)))
    write_metadata(folder, id="Hopper-v5", max_episode_steps=30, additional_wrappers=wrappers)
    assert read().task.horizon == 20
    write_metadata(folder, id="Hopper-v5", max_episode_steps=None)
    assert read().task.horizon == 15 and "episodes of at most 15 steps" in capsys.readouterr().out


def test_a_file_of_minaris_under_an_own_name_is_evaluated_where_it_was_recorded(folder, capsys):
    file = folder / "main_data.hdf5"
    data = data_of("hopper-medium-minari", file)
    said = "recorded in Hopper-v5, and is evaluated there"
    assert data.task.env_id == "Hopper-v5" and said in capsys.readouterr().out
    assert data.task.label == "hopper data, not D4RL: main_data.hdf5" and data.task.score(3234.3) == 100
    with pytest.raises(SystemExit):
        data_of("walker2d-medium-minari", file)
    assert "recorded in Hopper-v5" in capsys.readouterr().err
    data = data_of("mujoco/hopper/other-v0", file)
    assert data.task.label == "hopper data, not D4RL: main_data.hdf5"


def test_an_episode_without_a_step_is_passed_over(folder, episodes):
    with h5py.File(folder / "main_data.hdf5", "a") as f:
        for key, n in dict(actions=0, rewards=0, terminations=0, truncations=0, observations=1).items():
            first = f[f"episode_2/{key}"][:n]
            del f[f"episode_2/{key}"]
            f[f"episode_2/{key}"] = first if n else []
    assert read().lengths.tolist() == [len(e[2]) for i, e in enumerate(episodes) if i != 2]


def test_text_for_numbers_is_one_line(folder, capsys):
    with h5py.File(folder / "main_data.hdf5", "a") as f:
        for i in range(12):
            rewards = f[f"episode_{i}/rewards"][()].astype("S8")
            del f[f"episode_{i}/rewards"]
            f[f"episode_{i}/rewards"] = rewards
    assert "no array of numbers 'rewards' in /episode_0" in error_of(capsys)


def damage(f: h5py.File, kind: str) -> None:
    """One episode of a whole file, changed."""
    episode = f["episode_3"]
    old = {key: x[()] for key, x in episode.items()}
    if kind == "no group":
        del f["episode_3"]
        f["episode_3"] = np.zeros(5)
        return
    key, _, kind = kind.partition(" ")
    del episode[key]
    if kind == "short":
        episode[key] = old[key][:-1]
    elif kind == "long":
        episode[key] = np.concatenate([old[key], old[key]])
    elif kind == "group":
        episode.create_group(key)
    elif kind == "scalar":
        episode[key] = 1.0
    elif kind == "empty":
        episode[key] = h5py.Empty("f4")
    elif kind == "virtual":
        layout = h5py.VirtualLayout(old[key].shape, "f8")
        layout[:] = h5py.VirtualSource("nowhere.hdf5", key, old[key].shape)
        episode.create_virtual_dataset(key, layout)
    elif kind == "external":
        episode.create_dataset(key, old[key].shape, "f8", external=[("raw", 0, h5py.h5f.UNLIMITED)])
    elif kind == "link":
        episode[key] = h5py.ExternalLink("other.hdf5", f"/episode_3/{key}")


@pytest.mark.parametrize(
    "kind, says",
    [
        ("no group", "'actions' in /episode_3"),
        ("actions missing", "'actions' in /episode_3"),
        ("actions long", "episode_3: "),
        ("actions scalar", "episode_3: "),
        ("rewards short", "episode_3: "),
        ("rewards long", "episode_3: "),
        ("rewards group", "'rewards' in /episode_3"),
        ("rewards virtual", "'rewards' in /episode_3"),
        ("rewards external", "'rewards' lies in another file"),
        ("rewards link", "'episode_3/rewards' lies in another file"),
        ("truncations short", "episode_3: "),
        ("terminations empty", "'terminations' in /episode_3"),
        ("terminations scalar", "episode_3: "),
        ("observations long", "episode_3: "),
        ("observations scalar", ""),
        ("observations group", "observations are a dict"),
    ],
)
def test_a_damaged_episode_is_one_line(folder, capsys, kind, says):
    """A virtual array without its source reads as zeros, an array in another file as whatever is there: neither is."""
    (folder / "raw").write_bytes(bytes(10_000))
    shutil.copy(folder / "main_data.hdf5", folder / "other.hdf5")
    with h5py.File(folder / "main_data.hdf5", "a") as f:
        damage(f, kind)
    error = error_of(capsys)
    assert says in error and "main_data.hdf5" in error


def test_observations_may_end_with_the_last_action(folder, episodes):
    """T of them: nothing is lost, because the last one after an episode is used by nobody."""
    with h5py.File(folder / "main_data.hdf5", "a") as f:
        damage(f, "observations short")
    assert read().lengths.tolist() == [len(e[2]) for e in episodes]


def test_episodes_may_be_missing(folder, episodes):
    with h5py.File(folder / "main_data.hdf5", "a") as f:
        del f["episode_3"], f["episode_10"]
    assert read().lengths.tolist() == [len(e[2]) for i, e in enumerate(episodes) if i not in (3, 10)]


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_the_simulator_equals_gymnasiums_v5(env_id):
    simulator, env = stage3.Simulator(env_id, [3]), gymnasium.make(env_id)
    np.testing.assert_allclose(simulator.observe([0])[0], env.reset(seed=3)[0], rtol=0, atol=1e-10)
    rng = np.random.default_rng(0)
    for _ in range(60):
        action = rng.uniform(-1, 1, env.action_space.shape)
        observation, reward, ended, velocity = (x[0] for x in simulator.step(np.array([0]), action[None]))
        expected, reward_i, terminated, _, info = env.step(action)
        np.testing.assert_allclose(observation, expected, rtol=0, atol=1e-10)
        assert abs(reward - reward_i) < 1e-10 and ended == terminated
        assert abs(velocity - info["x_velocity"]) < 1e-10
        if terminated:
            break
    assert terminated or env_id == "HalfCheetah-v5"  # the last reward of a fall, which v4 pays 1 more for, was compared


def test_from_a_minari_dataset_to_the_sweep(folder, tmp_path, run_main):
    flags = ["--env", NAME, "--runs-dir", tmp_path]
    assert run_main(stage1, *flags, *TINY1)[0] == 0
    code, _, err = run_main(stage2, *flags, *TINY2)
    assert code == 0, err
    code, out, err = run_main(stage3, *flags, "--rollouts", 1)
    run = tmp_path / "tests--hopper--mixed-v0__train_qalign_dt__1"
    result = json.loads((run / "alignment.json").read_text())
    assert code == 0 and f"{NAME} (Minari)" in out, err
    assert all(row["score_mean"] == pytest.approx(row["return_mean"]) for row in result["sweep"])


@pytest.mark.oracle
def test_a_dataset_that_minari_makes(tmp_path, monkeypatch, episodes):
    minari = pytest.importorskip("minari", reason="pip install -r tests/requirements-oracle.txt")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffers = []
    for i, (observations, actions, rewards, terminated, truncated) in enumerate(episodes):
        flags = dict(terminations=[False] * (len(rewards) - 1) + [terminated])
        flags |= dict(truncations=[False] * (len(rewards) - 1) + [truncated])
        columns = dict(observations=list(observations), actions=list(actions), rewards=list(rewards))
        buffers.append(EpisodeBuffer(id=i, seed=i, **columns, **flags))
    env = gymnasium.make("Hopper-v5")
    minari.create_dataset_from_buffers(NAME, buffers, env=env, data_format="hdf5")
    data = read()
    assert data.lengths.tolist() == [len(e[2]) for e in episodes]
    np.testing.assert_allclose(data.returns, [e[2].sum() for e in episodes], rtol=1e-6)


# ---- stage 0's way back ----


@pytest.fixture
def sac(tmp_path, monkeypatch):
    """Stage 0 on Hopper-v5 with tiny sizes, and the command line of a run."""
    import collect_dataset as stage0

    small = dict(START=48, EVAL_EVERY=96, LOG_EVERY=48, WIDTH=16, BATCH=16, EVAL_EPISODES=2, HORIZON=50)
    for name, value in small.items():
        monkeypatch.setattr(stage0, name, value)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    flags = ["--env-id", "Hopper-v5", "--format", "minari", "--num-envs", 4, "--total-steps", 192, "--transitions", 100]
    return stage0, [*flags, "--qualities", "random", "--runs-dir", tmp_path]


def test_without_minari_its_format_is_refused_before_the_training(sac, run_main, monkeypatch):
    stage0, flags = sac
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run_main(stage0, *flags)
    assert code == 2 and "pip install 'minari[hdf5]'" in err and err.count("\n") == 1


@pytest.mark.oracle
def test_minari_loads_what_stage_0_writes_and_we_read_it_by_its_id(sac, run_main):
    minari = pytest.importorskip("minari", reason="pip install -r tests/requirements-oracle.txt")
    stage0, flags = sac
    code, out, err = run_main(stage0, *flags)
    assert code == 0 and "transitions" in out, err
    name = "local/hopper/random-v0"
    theirs, ours = minari.load_dataset(name), data_of(name)
    assert theirs.spec.env_spec.id == "Hopper-v5" and theirs.total_steps == len(ours.rewards) >= 100
    for episode, a, b in zip(theirs.iterate_episodes(), ours.starts, ours.ends):
        assert len(episode.observations) == len(episode.rewards) + 1 == b - a + 1
        np.testing.assert_array_equal(episode.observations[:-1], ours.observations[a:b])
        np.testing.assert_allclose(episode.rewards, ours.rewards[a:b])
        assert bool(episode.terminations[-1]) == bool(ours.terminals[b - 1])
        state = episode.observations[-2].astype(np.float64)  # the last observation is what Gymnasium steps to
        env = theirs.recover_environment().unwrapped
        env.reset(seed=0)
        env.set_state(np.append(0.0, state[:5]), state[5:])
        following = env.step(episode.actions[-1])[0]
        if np.abs(state[5:]).max() < 10:  # a clipped velocity is not the state's
            np.testing.assert_allclose(episode.observations[-1], following, rtol=1e-3, atol=1e-3)
    code, out, _ = run_main(stage0, *flags)
    assert code == 0 and "is there already" in out
    code, _, err = run_main(stage0, *flags, "--transitions", 50)
    assert code == 2 and "was made otherwise" in err
    assert os.listdir(os.environ["MINARI_DATASETS_PATH"]) == ["local"]


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4"])
def test_minaris_format_is_not_for_v4(sac, run_main, env_id, monkeypatch):
    stage0, flags = sac
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    code, _, err = run_main(stage0, *flags, "--env-id", env_id)
    assert code == 2 and f"name {env_id[:-1]}5" in err and err.count("\n") == 1
