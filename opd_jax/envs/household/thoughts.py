"""Every text of the thoughts of the household's players.

A thought derives the command step by step: what is in hand or wanted, its state, whether it is
here, whether the likely place is in the room. Each step names its subject before its result, so
every word is easy to predict from the text before it.
"""

from opd_jax.envs.react import TRY

# %s is a type, or a name with its number. A thought begins with the aim ...
FIND = "find %s. "
FIND_ANOTHER = "one placed. find another %s. "
HAVE = "i have %s. "
IT_IS = "it is %s. "
IT_IS_NOT = "it is not %s. "
# ... and goes on with the plan. Likely places are tested one by one.
NOT_THERE = "%s is not there. "
NONE_HERE = "none here. %s%s is next."
IS_CLOSED = "%s is closed. open it."
TAKE = "%s is here. take it."
FETCH = "%s is in %s. get it."
USE_LAMP = "%s is here. use it."
GO_ON = "go to %s."
TREAT = "i am at %s. %s it."
PLACE = "i am at %s. place it."
PUT_DOWN = "put it down."
NOTHING_LEFT = "nothing to do. look."
PASS_CLOSED = "%s is closed. skip it."
# Thoughts of the players with bad habits.
DONE_TAKE = "%s is placed. take it."
DONE_GO = "%s is placed. go to %s."
IDLE_LOOK = "look."
IDLE_INVENTORY = "check my hand."
IDLE_EXAMINE = "check %s."
IDLE_REVISIT = "go back to %s."

_AIMS = (FIND, FIND_ANOTHER, HAVE, HAVE + IT_IS, HAVE + IT_IS_NOT, HAVE + FIND)
_PLANS = (
    *(NONE_HERE.replace("%s%s", f"{tested}%s") for tested in ("", 2 * NOT_THERE)),
    *(IS_CLOSED, TAKE, FETCH, USE_LAMP, GO_ON, TREAT, PLACE, PUT_DOWN, NOTHING_LEFT, PASS_CLOSED),
)
# Every thought, for the tokenizer; `RESPONSE` surrounds it.
THOUGHTS = (
    *(aim + plan for aim in _AIMS for plan in _PLANS),
    *(DONE_TAKE, DONE_GO, IDLE_LOOK, IDLE_INVENTORY, IDLE_EXAMINE, IDLE_REVISIT, TRY),
)
