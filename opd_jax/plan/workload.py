"""How much one update does at most, and how a config is laid over a slice.

Texts are not known before a run, so lengths are the largest that the config allows: each episode
takes all its turns and fills its context.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config import validate


@dataclass(frozen=True)
class Workload:
    """Shapes of an update's arrays, and how often programs run in it.

    Attributes:
      rows: episodes of a batch; of demonstrations by players, rows of the longest.
      turns: of an episode, K.
      slots: of a row of the cache, at its largest.
      slots_read: by a token that is sampled, the mean; the cache grows by `rollout.cache_step`.
      sequence: tokens of a row that is trained on, padded, T.
      response: the student's tokens of a row, padded, R.
      sampled: tokens sampled in an episode.
      question: tokens of a question to the judge, padded; the mean.
      longest_question: the same of the longest response.
      short_question: of one asked behind the conversation, without the response.
    """

    rows: int
    turns: int
    slots: int
    slots_read: float
    sequence: int
    response: int
    sampled: int
    question: int
    longest_question: int
    short_question: int


def workload(config: FrozenConfigDict) -> Workload:
    """The largest update of a config.

    The first message of an episode takes one call of the widest of `rollout.extend_widths`, each
    later one a call of the narrowest, and the rest of the context is sampled, up to
    `rollout.turn_tokens` a turn. A question to the judge is the first message and a response.
    """
    rollout, train = config.rollout, config.train
    turns, slots = config.env.max_turns, rollout.context_tokens
    given = rollout.extend_widths[-1] + (turns - 1) * rollout.extend_widths[0]
    sampled = max(min(slots - given, turns * rollout.turn_tokens), turns)
    sequence = _up(slots, train.length_multiple)
    first, multiple = rollout.extend_widths[-1], config.judge.length_multiple
    return Workload(
        rows=_rows(config, sequence),
        turns=turns,
        slots=slots,
        slots_read=_mean_slots(config, slots),
        sequence=sequence,
        response=min(_up(sampled, train.response_multiple), sequence),
        sampled=sampled,
        question=_up(first + sampled // turns, multiple),
        longest_question=_up(first + min(rollout.turn_tokens, sampled), multiple),
        short_question=_up(first, multiple),
    )


def _mean_slots(config: FrozenConfigDict, slots: int) -> float:
    """Of the cache, over a context that grows evenly from a first message until it is full."""
    rollout = config.rollout
    ends = range(rollout.extend_widths[-1] + rollout.chunk, slots + 1, rollout.chunk)
    sizes = [min(_up(end, rollout.cache_step), slots) for end in ends]
    return sum(sizes) / len(sizes) if sizes else slots


def _rows(config: FrozenConfigDict, sequence: int) -> int:
    if config.data.source != "players":
        return config.rollout.batch
    ways = config.train.micro_batches * config.mesh.data * config.mesh.fsdp
    rows = config.data.tokens_per_batch // (sequence * ways) * ways
    if not rows:
        raise ValueError(
            f"`data.tokens_per_batch` = {config.data.tokens_per_batch}: expected at least "
            f"{sequence * ways}, {ways} rows of {sequence} tokens, the longest that "
            "`rollout.context_tokens` allows, padded"
        )
    return rows


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def lay_over(
    config: FrozenConfigDict, *, chips: int, given: Collection[str]
) -> tuple[FrozenConfigDict, list[str]]:
    """The config on a slice of so many chips, validated, and what was changed for it, in words.

    Where the mesh has another number of devices, `mesh.fsdp` is set to fill the slice. Where
    micro-batches then have fewer rows than the mesh splits them over, there are as many fewer of
    them.

    Args:
      given: fields set on the command line; these are not changed.

    Raises:
      ValueError: the slice cannot be filled, or as in `config.validate`.
    """
    changed = ConfigDict(config.to_dict())
    mesh, notes = changed.mesh, []
    others = mesh.data * mesh.tensor
    if others * mesh.fsdp != chips:
        if chips % others or "mesh.fsdp" in given:
            raise ValueError(
                f"`mesh.data` × `mesh.fsdp` × `mesh.tensor` = {mesh.data} × {mesh.fsdp} × "
                f"{mesh.tensor} must multiply to the {chips} chips of the slice; change the mesh "
                "or the slice"
            )
        notes.append(f"`mesh.fsdp` {mesh.fsdp} -> {chips // others}, to fill {chips} chips")
        mesh.fsdp = chips // others
    ways, rows = mesh.data * mesh.fsdp, changed.rollout.batch
    parts = changed.train.micro_batches
    fits = [n for n in range(1, parts + 1) if rows % (n * ways) == 0]
    episodes = changed.data.source != "players"
    if episodes and fits and parts not in fits and "train.micro_batches" not in given:
        notes.append(
            f"`train.micro_batches` {parts} -> {fits[-1]}, so that each has a row for each of "
            f"`mesh.data` × `mesh.fsdp` = {ways}"
        )
        changed.train.micro_batches = fits[-1]
    validate(changed)
    return FrozenConfigDict(changed), notes
