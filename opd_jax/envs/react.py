"""Responses of two lines, a thought and an action (ReAct: Yao et al., 2023, arXiv:2210.03629).

Here are their form, their parser, and a random player, which needs to know nothing else.
"""

import random

from opd_jax.envs.base import Observation
from opd_jax.envs.turns import before_invented_turn, invented_turn

RESPONSE = "Thought: %s\nAction: %s"
TRY = "try this."
INVENTED = invented_turn()


def parse_response(response: str) -> tuple[str, str]:
    """Find the command in a response.

    Args:
      response: the model's whole text. The first line that starts with `Action:`, in upper or lower
        case, holds the command: whatever follows it was written before the model saw the answer.
        Nothing counts from an invented turn (`INVENTED`) on.

    Returns:
      The command and "". Without a command: "" and the reason, `empty` or `no_action`.
    """
    if not response.strip():
        return "", "empty"
    for line in before_invented_turn(response, INVENTED)[0].splitlines():
        line = line.strip()
        if line[:7].lower() == "action:":
            command = line[7:].strip()
            return (command, "") if command else ("", "no_action")
    return "", "no_action"


class Random:
    """Picks a uniformly random admissible command, drawn from `rng`."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def respond(self, observation: Observation) -> str:
        """Return a response with a random admissible command; "" if there is none."""
        commands = observation.admissible
        if not commands:
            return ""
        return RESPONSE % (TRY, commands[int(self.rng.random() * len(commands))])
