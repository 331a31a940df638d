"""Mistakes in a config that no single field shows, each refused with its field named."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config import load, validate
from opd_jax.config.loading import flatten

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
PAIR = QUICKSTART.with_name("household_pair.py")
# Checked by the household itself, or a group whose members are the user's to choose.
ELSEWHERE = ("env.size", "env.show_admissible", "compare.variants.")


def without(config: FrozenConfigDict, field: str) -> FrozenConfigDict:
    """The config of somebody who forgot a field, or a group of them."""
    changed = ConfigDict(config.to_dict())
    *groups, leaf = field.split(".")
    node = changed
    for group in groups:
        node = node[group]
    del node[leaf]
    return FrozenConfigDict(changed)


def test_a_field_that_a_config_lacks_is_named() -> None:
    config = load(str(QUICKSTART), [])
    fields = [field for field in flatten(config) if not field.startswith(ELSEWHERE)]
    groups = {field.partition(".")[0] for field in fields}
    for field in (*fields, *groups):
        with pytest.raises(ValueError, match=rf"`{field}[`.].*no such field.*quickstart"):
            validate(without(config, field))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            "judge.context=all",
            "`judge.context`: .* table9, .feedback, history, got 'all'",
        ),
        ("dtype=int8", "`dtype`: expected one of float32, bfloat16, got 'int8'"),
        ("teacher_dtype=int4", "`teacher_dtype`: .* float32, bfloat16, int8, got 'int4'"),
        ("mesh.fsdp=0", "`mesh.fsdp`: expected at least 1, got 0"),
        ("seed=-1", r"`seed`: expected 0\.\.2147483647, got -1"),
        ("objective.weak_weight=1.5", r"`objective.weak_weight`: expected 0\.\.1, got 1.5"),
        ("optimizer.clip_norm=-1", "`optimizer.clip_norm`: expected at least 0, got -1.0"),
        ("rollout.top_p=0", r"`rollout.top_p`: expected 1e-09\.\.1, got 0.0"),
        ("train.micro_batches=3", "`rollout.batch` = 16 .* `train.micro_batches` = 3; .* divisor"),
        ("mesh.data=2 mesh.fsdp=3", "`rollout.batch` = 16 .*`mesh.data` × `mesh.fsdp` = 6"),
        ("mesh.data=8", "`eval.batch` = 100 .*`mesh.data` × `mesh.fsdp` = 8"),
        ("rollout.context_tokens=32", "`rollout.turn_tokens` = 32 .*`rollout.context_tokens` = 32"),
        ("rollout.extend_widths=", r"`rollout.extend_widths`: .* ascending widths, got \[\]"),
        ("rollout.extend_widths=8,8", r"`rollout.extend_widths`: .* ascending .* got \[8, 8\]"),
        ("teacher=", "the objective .* needs a teacher, but `teacher` is empty"),
        ("student=new", "the objective .* needs a teacher, but `student` = 'new' has none"),
        ("objective.divergence=cross_entropy", "'cross_entropy' has no verdicts, confidence"),
        ("rollout.per_task=3", "`rollout.batch` = 16 .* `rollout.per_task` = 3; .* divisor"),
        ("rollout.per_task=0", "`rollout.per_task`: expected at least 1, got 0"),
        ("rollout.depth_every=0", "`rollout.depth_every`: expected at least 1, got 0"),
        ("objective.entropy_bonus=-1", "`objective.entropy_bonus`: expected at least 0, got -1.0"),
        (
            "train.micro_batches=16 mesh.data=2",
            "`rollout.batch` / `train.micro_batches` = 1 .*`mesh.data` × `mesh.fsdp` = 2",
        ),
        (
            "rollout.history_turns=2 objective.scope=trajectory",
            "`objective.scope` = 'trajectory' .*`rollout.history_turns`",
        ),
        (
            "rollout.history_turns=2 judge.context=history",
            "`judge.context` = 'history' .*`rollout.history_turns`",
        ),
        ("rollout.depth_start=1 data.source=teacher", "`rollout.depth_start` .*`data.source`"),
        ("rollout.per_task=2 data.source=expert", "`rollout.per_task` .*`data.source`"),
        (
            "objective.divergence=sampled_reverse_kl data.source=teacher",
            "'sampled_reverse_kl' .* set `data.source` to on_policy",
        ),
        (
            "objective.divergence=cross_entropy objective.intervention=0 objective.confidence=0",
            "'cross_entropy' on the student's own episodes teaches nothing",
        ),
        ("data.source=players", "`data.source` = 'players' needs .* cross_entropy"),
        ("eval.who=before,judge", "`eval.who`: expected one of before, .* got 'judge'"),
        ("eval.splits=", "`eval.splits`: expected at least one split"),
        ("compare.methods=sage", "`compare.seeds`: expected at least one seed"),
        ("optimizer.b1=2", r"`optimizer.b1`: expected 0\.\.0.999999999, got 2.0"),
        ("optimizer.b2=1", r"`optimizer.b2`: expected 0\.\.0.999999999, got 1.0"),
        ("optimizer.eps=0", "`optimizer.eps`: expected at least 1e-30, got 0.0"),
    ],
)
def test_a_mistake_names_its_field(flags: str, text: str) -> None:
    config = load(str(QUICKSTART), [f"--config.{flag}" for flag in flags.split()])
    with pytest.raises(ValueError, match=text):
        validate(config)


def test_a_teacher_is_needed_only_where_it_is_used() -> None:
    tuning = ["--config.data.source=expert", "--config.teacher=", "--config.eval.who=expert"]
    validate(load(f"{QUICKSTART}:method=sft", tuning))
    with pytest.raises(ValueError, match=r"`eval.judge` needs a teacher, but `teacher` is empty"):
        validate(load(f"{QUICKSTART}:method=sft", [*tuning, "--config.eval.judge=true"]))
    with pytest.raises(ValueError, match="names the teacher, but `teacher` is empty"):
        validate(load(f"{QUICKSTART}:method=sft", [*tuning[:2], "--config.eval.who=teacher"]))


def test_players_need_the_fields_of_the_config_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"`data.player`.*household_pair"):
        validate(load(f"{QUICKSTART}:method=sft", ["--config.data.source=players"]))
    pair = load(str(PAIR), [])
    for field in pair.data:
        if field not in ("source", "split", "careless", "forgetful"):  # of one player each
            with pytest.raises(ValueError, match=rf"`data.{field}`.*household_pair"):
                validate(without(pair, f"data.{field}"))
    with pytest.raises(ValueError, match=r"`new_model`.*household_pair"):
        validate(without(pair, "new_model"))


def test_rooms_of_several_sizes_are_the_household_s() -> None:
    with pytest.raises(ValueError, match=r"'players' .*household.*`env.name` = 'alfworld'"):
        validate(load(str(PAIR), ["--config.env.name=alfworld"]))
