"""What players propose at a turn, against the environment's own labels."""

import random
from collections import Counter
from functools import partial

from opd_jax.agent.conversation import Conversation
from opd_jax.envs.base import Env
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.household.habits import Careless, Clumsy, Mistaken
from opd_jax.envs.react import Random
from opd_jax.experience.demonstrations import play_out
from opd_jax.experience.proposals import proposals

HABITS = dict(skip_step=0.5, list_order=0.5, ignore_closed=0.5, idle=0.3, forget=0.5)


def make_env() -> Household:
    return Household(size="small", max_turns=30, show_admissible=0)


def players():
    made = [lambda task, first, rng, kind=kind: kind(task, first, rng=rng) for kind in KINDS]
    return [*made, *[lambda task, first, rng: Random(rng)] * 5]


KINDS = (Expert, partial(Careless, **HABITS), Clumsy, Mistaken)


def episode(index: int) -> Conversation:
    made = partial(Careless, **HABITS)
    return play_out(
        make_env(),
        "train",
        index,
        player=lambda task, first, rng: made(task, first, rng=rng),
        rng=random.Random(index),
    )


def oracle(env: Env, played: Conversation, turn: int, response: str) -> str:
    """The label when the response is given instead of the episode's own."""
    env.reset("train", played.index)
    for earlier in played.turns[:turn]:
        env.step(earlier.response)
    return env.step(response).oracle


def propose(played: Conversation, turn: int, count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return proposals(make_env(), played, turn, players=players(), count=count, rng=rng)


def test_a_proposal_has_the_label_that_it_would_get_there() -> None:
    labels: Counter = Counter()
    for index in range(10):
        played = episode(index)
        for turn in range(len(played.turns)):
            found = propose(played, turn, 6)
            assert len({response for response, _ in found}) == len(found) <= 6
            for response, label in found:
                assert response != played.turns[turn].response
                assert label == oracle(make_env(), played, turn, response) != ""
                labels[label] += 1
    assert set(labels) == {"SKIP", "WEAK", "STRONG"}


def test_labels_take_turns_and_a_seed_repeats_them() -> None:
    played = episode(0)
    many, few = propose(played, 2, 100), propose(played, 2, 2)
    assert Counter(label for _, label in many).keys() == {label for _, label in few}
    assert len(few) == 2
    assert propose(played, 2, 100) == many
    assert {*propose(played, 2, 100, seed=1)} != {*many}
