"""The mazes of D4RL, rebuilt on the current MuJoCo as plain Gymnasium environments, registered when this is imported.

    gymnasium.make("qalign_mazes:AntMaze-umaze-v0")    with this folder on sys.path
    gymnasium.make("qalign_mazes:maze2d-umaze-v1")

AntMaze: antmaze-*-v2 as D4RL evaluates it, an ant that walks to a goal. Maze2D: maze2d-*, a ball that rolls to a goal.
Neither observation holds the goal. Constants are read off Farama-Foundation/D4RL, d4rl/locomotion and d4rl/pointmaze;
both environments step like D4RL's own model (tests/test_antmaze.py, tests/test_maze2d.py).
"""

from pathlib import Path

import gymnasium
import numpy as np

# ---- AntMaze ----

ANT_MAPS = {  # r: start, g: goal, 1: wall; four metres per cell
    "umaze": ("11111", "1r001", "11101", "1g001", "11111"),
    "medium": ("11111111", "1r011001", "10010001", "11000111", "10010001", "10100101", "100010g1", "11111111"),
    "large": ("111111111111", "1r0001000001", "101101010101", "100000010001", "101111011101", "100101000001")
    + ("110101010111", "100100010g01", "111111111111"),
}


class AntMaze(gymnasium.Env):
    """D4RL's antmaze-*-v2 as it is evaluated, on Gymnasium's ant.xml: reward 1 and the end within 0.5 m of the goal.

    The observation (29,) is position and velocity; it does not hold the goal, which is drawn anew in every episode.
    """

    def __init__(self, maze: str):
        import mujoco  # here and below: on import, MuJoCo looks for the OpenGL that MUJOCO_GL names

        spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
        spec.option.timestep = 0.02
        for i, row in enumerate(ANT_MAPS[maze]):
            for j, cell in enumerate(row):
                if cell == "1":
                    wall = dict(type=mujoco.mjtGeom.mjGEOM_BOX, size=(2, 2, 1), contype=1, conaffinity=1)
                    spec.worldbody.add_geom(pos=(4 * j - 4, 4 * i - 4, 1), **wall)
                elif cell == "g":
                    self.goal_cell = np.array([4 * j - 4, 4 * i - 4])
        for geom in spec.geoms:
            geom.solimp[:3] = 0.8, 0.8, 0.01
        for actuator in spec.actuators:
            actuator.gear[0] = 30
        rows, columns = len(ANT_MAPS[maze]), len(ANT_MAPS[maze][0])
        spec.worldbody.add_camera(name="above", pos=(2 * columns - 6, 2 * rows - 6, 5 * max(rows, columns)))
        self.model, self.frame_skip, self.dt = spec.compile(), 5, 0.1  # s per action
        self.data = mujoco.MjData(self.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (8,))

    def reset(self, *, seed=None, options=None):
        import mujoco

        super().reset(seed=seed)
        uniform = self.np_random.uniform
        self.goal = (self.goal_cell + uniform(0, 1, 2) + uniform(0, 0.5, 2)).clip(min=0)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += uniform(-0.1, 0.1, 15)
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(14)
        mujoco.mj_forward(self.model, self.data)
        return np.concatenate([self.data.qpos, self.data.qvel]), {}

    def step(self, action):
        import mujoco

        self.data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return np.concatenate([self.data.qpos, self.data.qvel]), float(reached), reached, False, {}


# ---- Maze2D ----

BALL_MAPS = {  # G: goal, #: wall; one metre per cell, and the first axis, x, counts the rows
    "open": ("#######", "#OOOOO#", "#OOGOO#", "#OOOOO#", "#######"),
    "umaze": ("#####", "#GOO#", "###O#", "#OOO#", "#####"),
    "medium": ("########", "#OO##OO#", "#OO#OOO#", "##OOO###", "#OO#OOO#", "#O#OO#O#", "#OOO#OG#", "########"),
    "large": ("############", "#OOOO#OOOOO#", "#O##O#O#O#O#", "#OOOOOO#OOO#", "#O####O###O#", "#OO#O#OOOOO#")
    + ("##O#O#O#O###", "#OO#OOO#OGO#", "############"),
}

# horizon: steps of an episode; min, max: D4RL's reference returns, of a random and of a scripted policy; a score is
# 100 (return - min) / (max - min). The scripted policy is no expert: it drives straight at the goal, often into a wall
MAZE2D = {
    # open's reference returns are of episodes of 50 steps that start outside the goal's cell: scores reach 726
    "maze2d-open-v0": dict(maze="open", dense=False, horizon=150, min=0.01, max=20.66),
    "maze2d-open-dense-v0": dict(maze="open", dense=True, horizon=150, min=11.17817, max=27.166538620695782),
    "maze2d-umaze-v1": dict(maze="umaze", dense=False, horizon=300, min=23.85, max=161.86),
    "maze2d-umaze-dense-v1": dict(maze="umaze", dense=True, horizon=300, min=68.537689, max=193.66285642381482),
    "maze2d-medium-v1": dict(maze="medium", dense=False, horizon=600, min=13.13, max=277.39),
    "maze2d-medium-dense-v1": dict(maze="medium", dense=True, horizon=600, min=44.264742, max=297.4552547777125),
    "maze2d-large-v1": dict(maze="large", dense=False, horizon=800, min=6.7, max=273.99),
    "maze2d-large-dense-v1": dict(maze="large", dense=True, horizon=800, min=30.569041, max=303.4857382709002),
}
MAX_SPEED = 5.0  # m/s per axis, to which D4RL clips the velocity before a step


def cells(maze: str, kinds: str = "OG") -> list[tuple[int, int]]:
    """The cells (row, column) of these kinds: O free, G the goal, # wall."""
    return [(i, j) for i, row in enumerate(BALL_MAPS[maze]) for j, cell in enumerate(row) if cell in kinds]


def in_maze(maze: str, qpos: np.ndarray) -> np.ndarray:
    """(N,) bool: is the ball's centre in a free cell? qpos (N, 2) in metres, as in the first half of an observation.

    A file of another maze has positions that are in none, unless its free cells are among this maze's (umaze in open).
    """
    walls = np.array([list(row) for row in BALL_MAPS[maze]]) == "#"
    i, j = np.floor(np.asarray(qpos, np.float64).T + 0.7).astype(int)  # cell (i, j) reaches from i - 0.7 to i + 0.3
    return ~walls[i.clip(0, walls.shape[0] - 1), j.clip(0, walls.shape[1] - 1)]  # the outermost cells are walls


def maze2d_model(maze: str):
    """The mujoco.MjModel of D4RL's point_maze: a ball of 4.19 kg, two motors of 100 N, no gravity, steps of 10 ms."""
    import mujoco

    spec, kind = mujoco.MjSpec(), mujoco.mjtGeom
    spec.option.timestep, spec.option.iterations, spec.option.gravity = 0.01, 20, (0, 0, 0)
    for i, j in cells(maze, "#"):
        wall = dict(size=(0.5, 0.5, 0.2), contype=2, conaffinity=1, condim=1, rgba=(0.6, 0.5, 0.4, 1))
        spec.worldbody.add_geom(type=kind.mjGEOM_BOX, pos=(i + 1, j + 1, 0), **wall)
    ball = spec.worldbody.add_body(name="ball", pos=(1.2, 1.2, 0))  # so that qpos (i, j) is 0.2 off the cell's centre
    shape = dict(size=(0.1, 0, 0), density=1000, contype=1, conaffinity=1, condim=1, rgba=(0.2, 0.4, 0.9, 1))
    # MuJoCo 2 took the larger margin of the two geoms, 4.0 adds them: 0.002 on the ball alone is the same contact
    ball.add_geom(type=kind.mjGEOM_SPHERE, margin=0.002, **shape)
    for name, axis in (("x", (1, 0, 0)), ("y", (0, 1, 0))):
        ball.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, damping=[1, 0, 0])
        motor = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        motor.gear[0], motor.ctrllimited, motor.ctrlrange = 100, True, (-1, 1)  # MuJoCo clips the actions
    # for videos only: a floor without contacts, the rewarded disc, and a camera that sees all of it
    (i, j), (rows, columns) = cells(maze, "G")[0], (len(BALL_MAPS[maze]), len(BALL_MAPS[maze][0]))
    floor = dict(pos=(0, 0, -0.2), size=(20, 20, 1), contype=0, conaffinity=0, rgba=(0.9, 0.9, 0.9, 1))
    spec.worldbody.add_geom(type=kind.mjGEOM_PLANE, **floor)
    disc = dict(pos=(i + 1.2, j + 1.2, -0.2), size=(0.5, 0.01, 0), rgba=(0.9, 0.2, 0.2, 0.5))
    spec.worldbody.add_site(name="goal", type=kind.mjGEOM_CYLINDER, **disc)
    centre = ((rows + 1) / 2, (columns + 1) / 2)
    spec.worldbody.add_camera(name="above", pos=(*centre, 1.25 * max(rows, columns)))
    model = spec.compile()
    # what contacts take for 1 / mass of the ball: MuJoCo 2 computed 2/3 of it; with 4.0's own the walls would be softer
    model.body_invweight0[model.body("ball").id, 0] = 2 / 3 / model.body("ball").mass[0]
    return model


class Maze2D(gymnasium.Env):
    """D4RL's maze2d-*: a ball in a maze, rewarded near the goal, which never moves. An episode has no end of its own.

    Observation (4,): x, y in metres, velocities in m/s. Action (2,): the motors' forces in 100 N. Reward after the
    step: 1 within 0.5 m of the goal, otherwise 0; dense: exp(-distance in metres).
    """

    def __init__(self, maze: str, dense: bool = False):
        import mujoco

        self.maze, self.dense, self.model, self.frame_skip, self.dt = maze, dense, maze2d_model(maze), 1, 0.01
        self.data = mujoco.MjData(self.model)
        self.goal = np.array(cells(maze, "G")[0], np.float64)  # (2,)
        self.starts = np.array(cells(maze, "O") + cells(maze, "G"))  # (cells, 2)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def draw_place(self) -> np.ndarray:
        """(2,) near the middle of a cell that is not a wall: where an episode begins, and where collectors drive to."""
        return self.starts[self.np_random.choice(len(self.starts))] + self.np_random.uniform(-0.1, 0.1, 2)

    def reward(self, xy: np.ndarray) -> np.ndarray:
        """(...,) reward of being at xy (..., 2)."""
        distance = np.linalg.norm(xy - self.goal, axis=-1)
        return np.exp(-distance) if self.dense else (distance <= 0.5).astype(np.float64)

    def reset(self, *, seed=None, options=None):
        import mujoco

        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.draw_place()
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        mujoco.mj_forward(self.model, self.data)
        return np.concatenate([self.data.qpos, self.data.qvel]), {}

    def advance(self, action) -> None:
        """The physics of a step. The velocity is clipped before it, so that observed speeds reach 5.23 m/s."""
        import mujoco

        self.data.qvel.clip(-MAX_SPEED, MAX_SPEED, out=self.data.qvel)
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data)

    def step(self, action):
        self.advance(action)
        return np.concatenate([self.data.qpos, self.data.qvel]), float(self.reward(self.data.qpos)), False, False, {}


# ---- their names ----

common = dict(disable_env_checker=True, order_enforce=False)
for maze in ANT_MAPS:
    horizon = 700 if maze == "umaze" else 1000
    kwargs = dict(maze=maze)
    gymnasium.register(f"AntMaze-{maze}-v0", "qalign_mazes:AntMaze", max_episode_steps=horizon, kwargs=kwargs, **common)
for name, row in MAZE2D.items():
    kwargs = dict(maze=row["maze"], dense=row["dense"])
    gymnasium.register(name, "qalign_mazes:Maze2D", max_episode_steps=row["horizon"], kwargs=kwargs, **common)
