"""Stand-ins: environments that follow a script, and a policy that does the same in every state."""

from types import SimpleNamespace

import numpy as np
import torch

NO = 99  # never succeeds


class ScriptedEnvs:
    """Environment ``i`` succeeds at its decision ``success[i]`` (from 1), or is cut off after ``limit``."""

    def __init__(self, success, limit):
        self.success, self.limit, self.num_envs = np.array(success), limit, len(success)
        self.instructions = [f"task {i}" for i in range(self.num_envs)]
        self.action_space = SimpleNamespace(shape=(self.num_envs, 2, 7))
        self.unwrapped, self.actions = self, []
        self.t, self.steps = 0, np.zeros(self.num_envs, int)
        self.terminated = self.truncated = np.zeros(self.num_envs, bool)

    def observe(self):
        image = np.full((self.num_envs, 8, 8, 3), self.t, np.uint8)
        return {"image": image, "state": np.arange(self.num_envs * 8, dtype=np.float32).reshape(-1, 8)}

    def pay(self):
        """Rewards (N,) of the current decision."""
        return 10.0 * self.t + np.arange(self.num_envs)

    def reset(self, seed=None, options=None):
        """Those that are not reset stay as they ended."""
        self.t, self.asked = 0, {"seed": seed} | (options or {})
        others = ~self.asked.get("reset_mask", np.ones(self.num_envs, bool))
        self.terminated, self.truncated = self.terminated & others, self.truncated & others
        self.frozen, self.steps = others, self.steps * others
        return self.observe(), {}

    def step(self, actions):
        self.t += 1
        self.actions.append(actions.copy())
        self.steps = self.steps + 2 * ~self.frozen
        self.terminated = self.terminated | (~self.frozen & (self.success == self.t))
        reward = np.where(self.frozen, 0.0, self.pay())  # as the environments' contract has it
        self.truncated = ~self.terminated & (self.t >= self.limit)
        self.frozen = self.terminated | self.truncated
        info = {"diverged": np.zeros(self.num_envs, bool), "stage": np.full(self.num_envs, 3 + self.t)}
        return self.observe(), reward, self.terminated.copy(), self.truncated.copy(), info


class RoundEnvs(ScriptedEnvs):
    """Every reset begins the next of ``rounds``: who succeeds at which decision; 1 is paid for it.

    The state of environment ``i`` in round ``r`` (from 1) begins with ``100 r + i``.
    """

    def __init__(self, *rounds, limit=3):
        super().__init__(rounds[0], limit)
        self.rounds, self.round, self.seeds, self.counts = rounds, 0, [], []

    def observe(self):
        obs = super().observe()
        obs["state"][:, 0] = 100 * self.round + np.arange(self.num_envs)
        return obs

    def pay(self):
        return 1.0 * (self.success == self.t)

    def reset(self, seed=None, options=None):
        success = self.rounds[self.round]
        self.round += 1
        self.success = np.array([*success, *[NO] * (self.num_envs - len(success))])
        self.seeds.append(seed[: len(success)])
        self.counts.append(int(options["reset_mask"].sum()))
        return super().reset(seed, options)


class OnesPolicy:
    """Acts 1 in everything; its tokens are the number of its call, its log-probabilities minus that."""

    def __init__(self):
        self.asked, self.shapes, self.draws, self.training = [], [], [], True

    def eval(self):
        self.training = False

    def sample(self, obs, instructions, temperature, generators=None):
        self.asked.append((instructions, obs["state"][:, 0].tolist(), temperature))
        self.shapes.append(obs["image"].shape)
        self.draws.append(torch.rand(()).item())
        tokens = torch.full((len(instructions), 14), len(self.asked))
        return np.ones((len(instructions), 2, 7), np.float32), tokens, -tokens.double()
