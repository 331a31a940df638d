"""ScienceWorld's prompts: the agent's role, the commands, one demonstration, each turn's message.

The fields (task, observation, inventory), the two-line reply and the single demonstration follow
the paper; the wording is ours. The demonstration is a real episode of a training task, which a test
plays. Thoughts and commands are written by hand; the observations are the engine's.
"""

from opd_jax.envs.react import RESPONSE
from opd_jax.envs.scienceworld.jvm import INVENTORY

TELEPORT = "teleportAction"

ROLE = """\
You are in a house with a garden and carry out a task of elementary science, one command at a time.
Reply in two lines:
Thought: what you know and what you do next
Action: one command"""

COMMANDS = """\
Commands, with X and Y for things as they are called in what you see: look around; look at X; \
look in X; inventory; task; open X; close X; go to X%s; pick up X; put down X; move X to Y; \
pour X in Y; dunk X in Y; mix X; activate X; deactivate X; use X on Y; read X; eat X; flush X; \
connect X to Y and disconnect X (electrically); focus on X; wait (ten moments); wait1 (one moment).
To focus on a thing says that it is the one the task asks for: do it when the task tells you to, \
and only then, since focusing on a wrong one fails the task.
If a command fits several things, you are shown them with numbers: the next action is a number."""
TELEPORT_COMMAND = "; teleport to X (any room)"

EXAMPLE = "Here is an example of a whole episode.\n\n%s\n\nNow your own task begins."
TASK = "Task: %s\n"
TURN = "Observation: %s\nInventory: %s"
EMPTY_HANDED = "nothing"

DEMONSTRATION_TASK = ("find-living-thing", 0)
DEMONSTRATION_GOAL = (
    "find a(n) living thing. First, focus on the thing. Then, move it to the red box in the "
    "kitchen."
)
# Observation and inventory, then the thought and the command that follow.
DEMONSTRATION = (
    (
        """\
This room is called the hallway. In it, you see:
	the agent
	a substance called air
	a picture
You also see:
	A door to the art studio (that is closed)
	A door to the bedroom (that is closed)
	A door to the greenhouse (that is closed)
	A door to the kitchen (that is closed)
	A door to the living room (that is closed)
	A door to the workshop (that is closed)""",
        "an orange",
        "Nothing here is alive. Animals and plants are outside, and the kitchen is on the way.",
        "open door to kitchen",
    ),
    (
        "The door is now open.",
        "an orange",
        "I can go through.",
        "go to kitchen",
    ),
    (
        "You move to the kitchen.",
        "an orange",
        "The red box is in this room. First I need a living thing from outside.",
        "open door to outside",
    ),
    (
        "The door is now open.",
        "an orange",
        "I can go out.",
        "go to outside",
    ),
    (
        "You move to the outside.",
        "an orange",
        "I have to see what lives here.",
        "look around",
    ),
    (
        """\
This outside location is called the outside. Here you see:
	the agent
	a substance called air
	an axe
	a blue jay egg
	a butterfly egg
	a dove egg
	a fire pit (containing nothing)
	a fountain (containing a substance called water)
	the ground
	a substance called wood
You also see:
	A door to the foundry (that is closed)
	A door to the greenhouse (that is closed)
	A door to the kitchen (that is open)""",
        "an orange",
        "An axe or a fountain is not alive, but a dove egg is. The task says to focus on it first.",
        "focus on dove egg",
    ),
    (
        "You focus on the dove egg.",
        "an orange",
        "Now it has to go to the red box, so I take it along.",
        "pick up dove egg",
    ),
    (
        "You move the dove to the inventory.",
        "a dove egg; an orange",
        "I carry the egg. The door to the kitchen is still open.",
        "go to kitchen",
    ),
    (
        "You move to the kitchen.",
        "a dove egg; an orange",
        "The last step is to put the egg into the red box.",
        "move dove egg to red box",
    ),
)  # fmt: skip


def held(inventory: str) -> list[str]:
    """The things that the engine's inventory lists."""
    lines = [line.strip() for line in inventory.removeprefix(INVENTORY).splitlines()]
    return [line for line in lines if line]


def carried(inventory: str) -> str:
    """The engine's inventory on one line."""
    return "; ".join(held(inventory)) or EMPTY_HANDED


def turn_message(text: str, inventory: str) -> str:
    """The message of a turn from the engine's texts; in the first turn `TASK` comes before it."""
    return TURN % (text, carried(inventory))


def system_message(simplifications: str) -> str:
    """The system message; it offers teleporting only if `simplifications` allow it."""
    names = simplifications.split(",")
    teleport = TELEPORT_COMMAND if {"easy", TELEPORT} & set(names) else ""
    turns = [
        TURN % (text, inventory) + "\n\n" + RESPONSE % (thought, command)
        for text, inventory, thought, command in DEMONSTRATION
    ]
    example = EXAMPLE % (TASK % DEMONSTRATION_GOAL + "\n\n".join(turns))
    return "\n\n".join([ROLE, COMMANDS % teleport, example])
