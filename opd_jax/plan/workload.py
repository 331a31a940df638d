"""How much one update does at most, and a config fitted to a slice.

Texts are not known before a run, so lengths are the largest that the config allows: every episode
takes all its turns and fills its context.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config.settings import Settings, read_settings
from opd_jax.runtime.mesh import MeshShape


@dataclass(frozen=True)
class Workload:
    """Shapes of an update's arrays, and what decides how often programs run."""

    rows: int  # of a batch: episodes, or demonstrations of the greatest length
    turns: int  # of an episode, K
    slots: int  # of a row of the full cache, S
    slots_read: float  # by a sampled token, the mean
    sequence: int  # tokens of a row in training, padded, T
    read: int  # the same as the teacher reads it (`teacher_context`), T'
    response: int  # the student's tokens of a row, padded, R
    sampled: int  # tokens sampled in an episode
    question: int  # tokens of a question to the judge about a mean response
    longest_question: int  # the same about the longest response
    new_in_question: int  # tokens that it does not share with the one before


def workload(settings: Settings) -> Workload:
    """The largest update of a config.

    An episode's first message fills the widest of `rollout.extend_widths`, each later one the
    narrowest. The rest of the context is sampled, at most `rollout.turn_tokens` a turn. A question
    to the judge is as long as the first message and a response; with "history" the conversation is
    before it, and with "record" in it, in other words. What is new in one is a message and a
    response, with "history" all of the question, and with "record" all behind what was tried.
    """
    rollout, train = settings.rollout, settings.train
    turns, slots = settings.env.max_turns, rollout.context_tokens
    first, later = rollout.extend_widths[-1], rollout.extend_widths[0]
    given = first + (turns - 1) * later
    sampled = max(min(slots - given, turns * rollout.turn_tokens), turns)
    told = settings.teacher_context.tokens if settings.teacher_context.by else 0
    sequence = _round_up(slots, train.length_multiple)
    longest, mean = min(rollout.turn_tokens, sampled), sampled // turns
    # A record says what the messages and the commands do, so it is at most as long.
    before, asked = {"history": (slots, first), "record": (slots, slots)}.get(
        settings.judge.context, (0, 0)
    )
    return Workload(
        rows=_rows(settings, sequence),
        turns=turns,
        slots=slots,
        # A context grows evenly from its first message until it is full.
        slots_read=(first + slots) / 2,
        sequence=sequence,
        read=_round_up(slots + told, train.length_multiple),
        response=min(_round_up(sampled, train.response_multiple), sequence),
        sampled=sampled,
        question=before + first + mean,
        longest_question=before + first + longest,
        new_in_question=later + mean + asked,
    )


def _rows(settings: Settings, sequence: int) -> int:
    shown = settings.demonstrations
    if not settings.shows_players or shown is None:
        return settings.rollout.batch
    ways = settings.train.micro_batches * settings.mesh.batch_shards
    rows = shown.tokens_per_batch // (sequence * ways) * ways
    if not rows:
        raise ValueError(
            f"`demonstrations.tokens_per_batch` = {shown.tokens_per_batch}: expected at least "
            f"{sequence * ways}, for {ways} rows of {sequence} tokens; raise it, or lower "
            "`rollout.context_tokens`"
        )
    return rows


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def fit_to_slice(
    config: FrozenConfigDict, *, chips: int, given: Collection[str]
) -> tuple[FrozenConfigDict, list[str]]:
    """The validated config on a slice of `chips`, and what was changed for it, in words.

    If the mesh has another number of devices, `mesh.fsdp` is set to fill the slice. If then
    micro-batches have fewer rows than the mesh splits them over, there are fewer of them.

    Args:
      given: fields set on the command line; these are not changed.

    Raises:
      ValueError: the mesh cannot fill the slice, or as in `read_settings`.
    """
    changed = ConfigDict(config.to_dict())
    mesh, notes = changed.mesh, []
    if (size := MeshShape(**mesh).devices) != chips:
        fsdp = chips // (mesh.data * mesh.tensor)
        if "mesh.fsdp" in given or mesh.data * fsdp * mesh.tensor != chips:
            raise ValueError(
                f"`mesh.data` × `mesh.fsdp` × `mesh.tensor` = {mesh.data} × {mesh.fsdp} × "
                f"{mesh.tensor} = {size} must multiply to the {chips} chips of the slice; change "
                "the mesh or the slice"
            )
        notes.append(f"`mesh.fsdp` {mesh.fsdp} -> {fsdp}, to fill {chips} chips")
        mesh.fsdp = fsdp
    ways, rows = mesh.data * mesh.fsdp, changed.rollout.batch
    parts = changed.train.micro_batches
    fits = [n for n in range(1, parts + 1) if rows % (n * ways) == 0]
    episodes = changed.data.source != "players"
    if episodes and fits and parts not in fits and "train.micro_batches" not in given:
        notes.append(
            f"`train.micro_batches` {parts} -> {fits[-1]}, for a row on each of "
            f"`mesh.data` × `mesh.fsdp` = {ways}"
        )
        changed.train.micro_batches = fits[-1]
    read_settings(changed)
    return FrozenConfigDict(changed), notes
