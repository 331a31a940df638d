"""Configs as settings: mistakes are refused by name, and every field says what it affects."""

import dataclasses
import typing

import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from settings import read

from opd_jax.config import load
from opd_jax.config.loading import flatten
from opd_jax.config.settings import affected_by, binds_a_run, binds_an_evaluation, read_settings
from opd_jax.runtime import fields as kinds

# The household checks these itself. Members of `compare.variants` are the user's to choose.
ELSEWHERE = ("env.size", "env.show_admissible", "compare.variants.")


def edited(config: FrozenConfigDict, field: str, value: object = None) -> FrozenConfigDict:
    """The config with another value of a field; None: without it."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    *groups, leaf = field.split(".")
    node = changed
    for group in groups:
        node = node[group]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return FrozenConfigDict(changed)


def test_settings_have_the_attributes_of_their_config() -> None:
    for name in ("quickstart", "household_pair", "alfworld_qwen3", "searchqa_qwen3:runlocal"):
        config = load(name, [])
        settings = read_settings(config)
        for field, value in flatten(config).items():
            node: typing.Any = settings
            for part in field.split("."):
                # What an environment takes for itself, variants and habits are mappings.
                if isinstance(node, typing.Mapping):
                    node = node[part]
                elif part in {f.name for f in dataclasses.fields(node)}:
                    node = getattr(node, part)
                else:
                    node = dict(node.options)[part]
            assert node == value, field


@pytest.mark.parametrize("name", ["quickstart", "household_pair"])
def test_a_missing_field_is_named(name: str) -> None:
    config = load(name, [])
    fields = [f for f in flatten(config) if not f.startswith((*ELSEWHERE, "demonstrations.habits"))]
    groups = {field.partition(".")[0] for field in fields}
    for field in (*fields, *groups):
        made_up = field in ("new_model", "demonstrations")
        expected = rf"`{field}`.*household_pair" if made_up else rf"`{field}`.*no such field.*quick"
        with pytest.raises(ValueError, match=expected):
            read_settings(edited(config, field))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        # Unknown: the closest one is offered.
        ("train.update", 3, "`train.update`: there is no such setting; closest: `train.updates`"),
        ("updates", 3, "`updates`: there is no such setting"),
        ("judge.context_tokens", 3, "`judge.context_tokens`: .*closest: .*`judge.context`"),
        ("optimiser", {"b1": 0.9}, "`optimiser`: there is no such setting; .*`optimizer`"),
        # Of another type.
        ("train.updates", 2.5, "`train.updates`: expected int, got 2.5"),
        ("train.updates", True, "`train.updates`: expected int, got True"),
        (
            "optimizer.learning_rate",
            "fast",
            "`optimizer.learning_rate`: expected float, got 'fast'",
        ),
        ("debug.nans", 1, "`debug.nans`: expected bool, got 1"),
        ("eval.splits", "train", "`eval.splits`: expected tuple, got 'train'"),
        ("student", 3, "`student`: expected str, got 3"),
        ("mesh", 8, "`mesh`: expected a group of fields, got 8"),
    ],
)
def test_a_field_that_is_unknown_or_of_another_type_is_named(
    field: str, value: object, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        read_settings(edited(load("quickstart", []), field, value))


def test_whole_numbers_serve_as_floats_and_lists_as_tuples() -> None:
    config = edited(load("quickstart", []), "optimizer.learning_rate", 1)
    assert read_settings(edited(config, "eval.splits", ["train"])).eval.splits == ("train",)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("judge.context=all", "`judge.context`: .* table9, .feedback, history, record, got 'all'"),
        ("judge.decode=vote", "`judge.decode`: .* constrained, .*, got 'vote'"),
        ("judge.batch=0", "`judge.batch`: expected at least 1, got 0"),
        ("dtype=int8", "`dtype`: expected one of float32, bfloat16, got 'int8'"),
        ("teacher_dtype=int4", "`teacher_dtype`: .* float32, bfloat16, int8, got 'int4'"),
        ("mesh.fsdp=0", "`mesh.fsdp`: expected at least 1, got 0"),
        ("seed=-1", r"`seed`: expected 0\.\.2147483647, got -1"),
        ("weight.weak_weight=1.5", r"`weight.weak_weight`: expected 0\.\.1, got 1.5"),
        ("objective.beta=2", r"`objective.beta`: expected 0\.\.1, got 2"),
        ("objective.divergence=l2", "`objective.divergence`: .*reverse_kl, .* got 'l2'"),
        ("objective.normalize=l2", "`objective.normalize`: .*all_tokens, .* got 'l2'"),
        ("objective.scope=token", "`objective.scope`: .*trajectory, got 'token'"),
        ("weight.entropy_bonus=-1", "`weight.entropy_bonus`: expected at least 0, got -1.0"),
        ("optimizer.schedule=step", "`optimizer.schedule`: .*cosine.* got 'step'"),
        ("optimizer.clip_norm=-1", "`optimizer.clip_norm`: expected at least 0, got -1.0"),
        ("optimizer.b1=2", r"`optimizer.b1`: expected 0\.\.0.999999999, got 2.0"),
        ("optimizer.b2=1", r"`optimizer.b2`: expected 0\.\.0.999999999, got 1.0"),
        ("optimizer.eps=0", "`optimizer.eps`: expected at least 1e-30, got 0.0"),
        ("train.updates=0", "`train.updates`: expected at least 1, got 0"),
        ("checkpoint.keep=0", "`checkpoint.keep`: expected at least 1, got 0"),
        ("data.source=books", "`data.source`: .*on_policy, .*episodes:FILE, .*got 'books'"),
        ("data.source=episodes:", "`data.source`: .*episodes:FILE, .*got 'episodes:'"),
        (
            "data.only_success=true data.source=players",
            "`data.only_success` .*`data.source` = 'players' .*`data.source` to expert",
        ),
        (
            "data.only_success=true judge.context=history",
            "`judge.context` = 'history' .*`data.only_success`",
        ),
        (
            "data.only_success=true data.source=prefixes:x weight.by=uniform "
            "objective.divergence=cross_entropy",
            "'cross_entropy' on the student's own episodes teaches nothing",
        ),
        ("weight.teacher_labels=rule", "`weight.teacher_labels`: .* oracle, record, got 'rule'"),
        ("env.max_turns=0", "`env.max_turns`: expected at least 1, got 0"),
        ("rollout.top_p=0", "`rollout.top_p`: expected above 0 and at most 1, got 0.0"),
        ("rollout.context_tokens=32", "`rollout.turn_tokens` = 32.*`rollout.context_tokens` = 32"),
        ("rollout.extend_widths=", r"`rollout.extend_widths`: .* ascending widths, got \[\]"),
        ("rollout.extend_widths=8,8", r"`rollout.extend_widths`: .* ascending .* got \[8, 8\]"),
        ("rollout.per_task=3", "`rollout.batch` = 16 .* `rollout.per_task` = 3; .* divisor"),
        ("rollout.per_task=0", "`rollout.per_task`: expected at least 1, got 0"),
        ("rollout.depth_every=0", "`rollout.depth_every`: expected at least 1, got 0"),
        ("rollout.teacher_share=2", r"`rollout.teacher_share`: expected 0\.\.1, got 2"),
        ("rollout.take_over_after=-1", "`rollout.take_over_after`: expected at least 0, got -1"),
        ("objective.teacher_turns=sampled_reverse_kl", "`objective.teacher_turns`: .* got 'sampl"),
        ("eval.who=before,judge", "`eval.who`: expected one of before, .* got 'judge'"),
        ("eval.splits=", "`eval.splits`: expected at least one split"),
        ("eval.every=-1", "`eval.every`: expected at least 0, got -1"),
        ("eval.dev_tasks=0", "`eval.dev_tasks`: expected at least 1, got 0"),
        ("checkpoint.best=loss", "`checkpoint.best`: expected one of , success, .* got 'loss'"),
        ("checkpoint.best=success", "`checkpoint.best` = 'success' .* set `eval.every` too"),
        ("eval.seed=-1", r"`eval.seed`: expected 0\.\.2147483647, got -1"),
        ("compare.seeds=0,-1", r"`compare.seeds`: expected 0\.\.2147483647, got -1"),
        ("env.start_timeout_s=-1", r"`env.start_timeout_s`: expected seconds above 0, got -1"),
        ("env.step_timeout_s=0", r"`env.step_timeout_s`: expected seconds above 0, got 0"),
        ("compare.methods=sage", "`compare.seeds`: expected at least one seed"),
        ("compare.methods=opd compare.seeds=1,1", "`compare.seeds`: expected each once, got 1, 1"),
        ("rollout.per_task=2 rollout.temperature=0", "would repeat the greedy episode of a task"),
        ("rollout.per_task=2 rollout.top_k=1", "would repeat the greedy episode of a task"),
        ("rollout.per_task=2 rollout.top_p=1e-6", "would repeat the greedy episode of a task"),
        (
            "compare.methods=sage,ppo",
            "`compare.methods`: expected one of cut_repeated, .* got 'ppo'",
        ),
        # Of several sections.
        ("train.micro_batches=3", "`rollout.batch` = 16 .* `train.micro_batches` = 3; .* divisor"),
        ("mesh.data=2 mesh.fsdp=3", "`rollout.batch` = 16 .*`mesh.data` × `mesh.fsdp` = 6"),
        ("mesh.data=8", "`eval.batch` = 100 .*`mesh.fsdp` / gcd.* = 8"),
        (
            "train.micro_batches=16 mesh.data=2",
            "`rollout.batch` / `train.micro_batches` = 1 .*`mesh.data` × `mesh.fsdp` = 2",
        ),
        ("teacher=", "the objective .* needs a teacher, but `teacher` is empty"),
        ("student=", "`student` is empty: name a model folder .`hf download Qwen/Qwen3-1.7B"),
        ("student=new", "`student` = 'new' needs its sizes in `new_model`"),
        (
            "objective.divergence=cross_entropy",
            "'cross_entropy' has no teacher and no labels, which `weight.by` = 'sage'",
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
        *(
            (
                f"rollout.depth_from=back {change}",
                "`rollout.depth_from` = 'back' .*`rollout.depth_start` .*`data.source` to prefixes",
            )
            for change in ("rollout.depth_start=1", "data.source=prefixes:x")
        ),
        *(
            (f"rollout.{change} data.source=teacher", f"`rollout.{name}` .*`data.source` to on_pol")
            for change, name in (
                ("teacher_share=0.5", "teacher_share"),
                ("take_over_after=2", "take_over_after"),
                ("cut_repeated_failure=true", "cut_repeated_failure"),
            )
        ),
        (
            "rollout.take_over_after=2 objective.teacher_turns=forward_kl weight.by=sod",
            "`weight.by` = 'sod' reads .* student's own samples.* set `objective.teacher_turns`",
        ),
        (
            "objective.teacher_turns=forward_kl objective.divergence=cross_entropy "
            "weight.by=uniform rollout.take_over_after=2 data.only_success=true",
            "`objective.teacher_turns` = 'forward_kl' .* 'cross_entropy' none scores: set it to ''",
        ),
        ("rollout.per_task=2 data.source=expert", "`rollout.per_task` .*`data.source`"),
        (
            "objective.divergence=sampled_reverse_kl data.source=teacher",
            "'sampled_reverse_kl' .* set `data.source` to on_policy",
        ),
        *(
            (f"objective.divergence=sampled_reverse_kl rollout.{cut}", f"set `rollout.{named}` to")
            for cut, named in (
                ("temperature=0.4", "temperature"),
                ("top_k=5", "temperature` to 1, `rollout.top_k"),
                ("top_p=0.9", "temperature` to 1, .*`rollout.top_p"),
            )
        ),
        (
            "objective.divergence=cross_entropy weight.by=uniform",
            "'cross_entropy' on the student's own episodes teaches .* set `data.only_success`",
        ),
        ("weight.by=sod rollout.history_turns=1", "`weight.by` = 'sod' compares the turns"),
        (
            "weight.by=reliability teacher_context.by=solved teacher_context.file=x",
            "`weight.by` reads how reliable .* leave that empty",
        ),
        ("data.source=players", "`data.source` = 'players' needs .* cross_entropy"),
        ("data.source=episodes:x", "`weight.by` = 'sage' asks .* a file of episodes"),
        (
            "data.source=episodes:x rollout.per_task=2 weight.by=uniform",
            "`rollout.per_task` above 1 would repeat the episodes of a file",
        ),
    ],
)
def test_a_mistake_names_its_fields(flags: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read("quickstart", *flags.split())


def test_a_worker_lives_as_long_as_it_may_ask_the_retrieval_server() -> None:
    read("searchqa_qwen3")
    working = ("env.workers=true", "env.retry_minutes=2", "env.timeout_s=30")
    long = ("env.start_timeout_s=150", "env.step_timeout_s=150")
    read("searchqa_qwen3", *working, *long)
    read("searchqa_qwen3", *working, "env.step_timeout_s=9", "env.retriever=wiki.jsonl")
    for name in ("start", "step"):
        with pytest.raises(ValueError, match=f"`env.{name}_timeout_s` = 149 .* may take 150 s"):
            read("searchqa_qwen3", *working, *long, f"env.{name}_timeout_s=149")


def test_a_teacher_is_needed_only_where_it_is_used() -> None:
    for split in ("train", "valid_seen"):
        with pytest.raises(ValueError, match=rf"`eval\.dev` = '{split}' chooses a checkpoint"):
            read("quickstart", "eval.every=1", f"eval.dev={split}")
    tuning = ("data.source=expert", "teacher=", "eval.who=expert")
    read("quickstart:method=sft", *tuning)
    with pytest.raises(ValueError, match=r"`eval.judge` needs a teacher, but `teacher` is empty"):
        read("quickstart:method=sft", *tuning, "eval.judge=true")
    with pytest.raises(ValueError, match="names the teacher, but `teacher` is empty"):
        read("quickstart:method=sft", *tuning[:2], "eval.who=teacher")
    alone = ("teacher=", "eval.who=before")
    read("quickstart:method=rft", *alone)
    for change in ("take_over_after=3", "teacher_share=0.5"):
        with pytest.raises(ValueError, match=r"turns to a teacher, but `teacher` is empty"):
            read("quickstart:method=rft", *alone, f"rollout.{change}")
    with pytest.raises(ValueError, match="names the teacher, but `student` = 'new' has none"):
        read("household_pair", "eval.who=expert,teacher")


def test_players_need_their_section_and_the_household() -> None:
    with pytest.raises(ValueError, match=r"'players' needs the section `demonstrations`.*_pair"):
        read("quickstart:method=sft", "data.source=players")
    with pytest.raises(ValueError, match=r"'players' .*household.*`env.by` = 'alfworld'"):
        read("household_pair", "env.by=alfworld")
    with pytest.raises(ValueError, match=r"`demonstrations.judge_contexts`: .* got 'all'"):
        read("household_pair", "demonstrations.judge_contexts=all")


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("demonstrations.window=0", "`demonstrations.window`: expected at least 1"),
        ("demonstrations.sizes=", "`demonstrations.sizes`: expected at least one"),
        ("demonstrations.sizes_from=9", "`demonstrations.sizes_from`: .* 2, got .9."),
        ("demonstrations.distractors=", "`demonstrations.distractors`: expected at least one"),
        ("demonstrations.judge_contexts=", "`demonstrations.judge_contexts`: .* at least one"),
        ("demonstrations.distraction=7", r"`demonstrations.distraction`: expected 0\.\.1"),
        ("new_model.num_layers=0", "`new_model.num_layers`: expected at least 1"),
        ("new_model.head_dim=15", "`new_model.head_dim`: expected an even number, got 15"),
        ("new_model.num_kv_heads=3", "`new_model.num_kv_heads`: .* `new_model.num_heads` = 4"),
    ],
)
def test_players_and_new_models_that_cannot_be_are_refused(flag: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read("household_pair:who=teacher", flag)


@pytest.mark.parametrize("name", ["alfworld_qwen3", "scienceworld_qwen3", "searchqa_qwen3"])
def test_a_judge_is_measured_only_against_labels(name: str) -> None:
    with pytest.raises(ValueError, match=r"`eval.judge` compares .* `env.by` = .* has none"):
        read(name, "eval.judge=true")


# --- What a field affects


def test_what_fields_affect_by_a_sample_of_each_kind() -> None:
    samples = {
        kinds.METHOD: ["seed", "optimizer.learning_rate", "env.by", "env.size", "rollout.batch"],
        kinds.EXTENT: ["train.updates"],
        kinds.LAYOUT: ["mesh.fsdp", "train.micro_batches", "train.remat", "rollout.chunk"],
        kinds.WORLD: ["env.step_timeout_s", "env.workers", "checkpoint.every"],
        kinds.FIGURES: ["eval.tasks", "eval.splits", "compare.variants.opd.weight.by"],
    }
    for kind, fields in samples.items():
        assert all(kind in affected_by(field, env="household") for field in fields), kind
    assert affected_by("judge.context", env="household") == {kinds.METHOD, kinds.FIGURES}


def test_an_environment_says_which_of_its_options_change_nothing_that_is_learnt() -> None:
    for field in ("env.retriever", "env.timeout_s", "env.retry_minutes", "env.data"):
        assert affected_by(field, env="searchqa") == {kinds.WORLD}, field
    for env, field in (("scienceworld", "env.heap_mb"), ("alfworld", "env.data")):
        assert affected_by(field, env=env) == {kinds.WORLD}
    assert affected_by("env.test_questions", env="searchqa") == {kinds.FIGURES}
    for field in ("env.passages", "env.train_questions"):
        assert affected_by(field, env="searchqa") == {kinds.METHOD}
    assert affected_by("env.simplifications", env="scienceworld") == {kinds.METHOD}


def test_a_resumed_run_may_differ_in_layout_world_and_figures_only() -> None:
    config = load("quickstart", [])
    binding = {field for field in flatten(config) if binds_a_run(read_settings(config))(field)}
    free = set(flatten(config)) - binding
    assert {"seed", "env.size", "train.updates", "optimizer.b2", "judge.context"} <= binding
    assert {"student", "mesh.data", "train.micro_batches", "env.start_timeout_s"} <= free
    assert not any(field.startswith(("optimizer.", "data.")) for field in free)
    assert {"objective.eps", "objective.scope", "lora.rank", "lora.int8"} <= binding


def test_what_the_method_does_not_read_is_free() -> None:
    fields = flatten(load("quickstart", []))
    sage, opd = binds_a_run(read("quickstart")), binds_a_run(read("quickstart:method=opd"))
    for name in ("judge.context", "weight.weak_weight"):
        assert sage(name)
        assert not opd(name)
    assert not any(opd(name) for name in fields if name.startswith("judge."))
    assert opd("weight.by")
    assert binds_a_run(read("household_pair"))("judge.context")  # of the questions it learns
    for change, name in {
        "objective.divergence=jsd": "objective.beta",
        "weight.by=entropy_aware": "weight.entropy_threshold",
        "rollout.depth_start=1": "rollout.depth_every",
        "rollout.depth_start=2": "rollout.depth_from",
        "rollout.teacher_share=0.5": "rollout.teacher_share_for",
        "rollout.take_over_after=2": "objective.teacher_turns",
        "judge.decode=generate": "judge.max_new_tokens",
        "lora.rank=4": "lora.alpha",
    }.items():
        assert not sage(name)
        assert binds_a_run(read("quickstart", change))(name)
        assert sage(change.partition("=")[0])
    guided = read("quickstart", "rollout.take_over_after=2", "objective.teacher_turns=jsd")
    assert binds_a_run(guided)("objective.beta")
    # A field of the user's own that begins like one of ours binds.
    assert opd("weight.discount_of_mine")
    assert not opd("weight.discount")
    assert not binds_an_evaluation(read("quickstart"))("lora.alpha")
    assert binds_an_evaluation(read("quickstart", "lora.rank=4"))("lora.alpha")


def test_batches_of_demonstrations_are_cut_to_fit_the_layout_which_then_binds() -> None:
    binds = binds_a_run(read("household_pair"))
    assert binds("mesh.data")
    assert binds("train.micro_batches")
    assert not binds("checkpoint.every")


def test_a_constant_rate_leaves_the_number_of_updates_free() -> None:
    assert binds_a_run(read("quickstart"))("train.updates")
    constant = "optimizer.schedule=constant"
    assert not binds_a_run(read("quickstart", constant))("train.updates")
    # The teacher's share of turns falls in a share of the updates.
    guided = constant, "rollout.teacher_share=0.5"
    assert binds_a_run(read("quickstart", *guided))("train.updates")
    assert not binds_a_run(read("quickstart", *guided, "rollout.teacher_share_for=0"))(
        "train.updates"
    )


def test_an_evaluation_is_bound_to_the_tasks_the_model_and_how_it_is_sampled() -> None:
    config = load("quickstart", ["--config.lora.rank=4"])
    binds = binds_an_evaluation(read_settings(config))
    sampled = {f"rollout.{x}" for x in ("top_k", "top_p", "turn_tokens", "context_tokens")}
    lora = {f"lora.{x}" for x in ("rank", "alpha", "targets", "int8")}
    tasks = {f"env.{x}" for x in ("by", "size", "max_turns", "show_admissible")}
    bound = {field for field in flatten(config) if binds(field)}
    others = {"rollout.history_turns", "rollout.int8_cache", "dtype", "compute_dtype"}
    assert bound == tasks | lora | sampled | others


def test_an_evaluation_is_bound_to_what_it_uses() -> None:
    for judged in (True, False):
        binds = binds_an_evaluation(read("quickstart", f"eval.judge={judged}"))
        assert binds("teacher_dtype") == judged
    assert binds_an_evaluation(read("household_pair"))("seed")  # it gives a new model's weights
    assert not binds_an_evaluation(read("quickstart"))("seed")
