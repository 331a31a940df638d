"""A household of which some tasks are malformed. Workers import it in a process without JAX."""

from opd_jax.envs.base import Observation
from opd_jax.envs.household.env import Household


class Faulty(Household):
    """Refuses the tasks in `malformed`, and raises a `KeyError` in the second step of `fails`."""

    waits = False

    def __init__(self, *, malformed: tuple[int, ...], fails: int, max_turns: int):
        super().__init__(size="small", max_turns=max_turns, show_admissible=2)
        self._malformed, self._fails = malformed, fails

    def reset(self, split: str, index: int) -> Observation:
        if index in self._malformed:
            raise ValueError(f"row {index} has no answer")
        self._steps, self._index = 0, index
        return super().reset(split, index)

    def step(self, response: str) -> Observation:
        self._steps += 1
        if self._steps == 2 and self._index == self._fails:
            raise KeyError("title")
        return super().step(response)
