"""A small agent for a small household, around a model that compiles fast."""

from dataclasses import replace
from typing import Any

from models import one_layer

from opd_jax.agent.agent import Agent, Decoding
from opd_jax.agent.chat import ChatFormat
from opd_jax.envs.household import tokenizer as household_tokenizer
from opd_jax.envs.household.env import Household

DECODING = Decoding(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    turn_tokens=12,
    context_tokens=256,
    extend_widths=(32,),
    prefill_rows=2,
    chunk=12,
    join_after=0,
    int8_cache=False,
    history_turns=0,
)


def household_agent(**decoding: Any) -> Agent:
    tokenizer = household_tokenizer.build(phrases=["Judge this turn."])
    return Agent(
        model=one_layer(len(tokenizer)),
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(tokenizer),
        decoding=replace(DECODING, **decoding),
    )


def with_decoding(agent: Agent, **changes: Any) -> Agent:
    return replace(agent, decoding=replace(agent.decoding, **changes))


def household(*, max_turns: int) -> Household:
    return Household(size="small", max_turns=max_turns, show_admissible=2)
