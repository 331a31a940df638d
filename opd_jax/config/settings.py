"""A config as typed settings: each section becomes the frozen dataclass of the room that reads it.

A dataclass checks its own values. Relations between sections are checked here, before anything is
loaded.
"""

import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from opd_jax.agent.agent import Decoding, RolloutSettings
from opd_jax.config.flags import closest
from opd_jax.envs.make import (
    EnvSettings,
    figures_options,
    judges_responses,
    keeps_record,
    labels_turns,
    own_rule,
    world_options,
)
from opd_jax.experience.asides import TeacherContext
from opd_jax.experience.source import DataSettings
from opd_jax.experience.stream import DemonstrationSettings
from opd_jax.judge.answer import JudgeSettings
from opd_jax.judge.others import find_judge
from opd_jax.judge.prompt import read_prompt
from opd_jax.learner.nonfinite import DebugSettings
from opd_jax.learner.objective import Objective
from opd_jax.learner.optimizer import AdamW
from opd_jax.learner.train_step import TrainSettings
from opd_jax.learner.weighing import WEIGHT_SETTINGS, Weight
from opd_jax.learner.weights import COMPARE_TURNS
from opd_jax.model import ModelConfig
from opd_jax.model.kernels import ATTENTION
from opd_jax.model.lora import Lora
from opd_jax.report.episodes import EpisodeSettings
from opd_jax.runtime.checkpoint import CheckpointSettings
from opd_jax.runtime.fields import (
    EXTENT,
    FIGURES,
    LAYOUT,
    METHOD,
    WORLD,
    affects,
    check_choice,
    check_within,
)
from opd_jax.runtime.mesh import MeshShape

EVALUATED = ("before", "teacher", "expert", "random")
FLOATS = ("float32", "bfloat16")
SEEDS = (0, 2**31 - 1)  # the least and the greatest


@dataclass(frozen=True)
class EvalSettings:
    """Who is evaluated, on what.

    Attributes:
      who: names from `EVALUATED`; the trained student is evaluated anyway.
      splits: the environment's splits to play.
      tasks: at most this many per split.
      batch: episodes played at a time.
      temperature: sampling temperature of models.
      seed: seed of the models' sampling.
      judge: also measure the judge on the turns that a model plays.
      every: updates between evaluations while training; 0 for none.
      dev: the split of their tasks.
      dev_tasks: at most this many.
    """

    who: tuple[str, ...] = field(metadata=affects(FIGURES))
    splits: tuple[str, ...] = field(metadata=affects(FIGURES))
    tasks: int = field(metadata=affects(FIGURES))
    batch: int = field(metadata=affects(FIGURES))
    temperature: float = field(metadata=affects(FIGURES))
    seed: int = field(metadata=affects(FIGURES))
    judge: bool = field(metadata=affects(FIGURES))
    every: int = field(metadata=affects(FIGURES))
    dev: str = field(metadata=affects(FIGURES))
    dev_tasks: int = field(metadata=affects(FIGURES))

    def __post_init__(self):
        for who in self.who:
            check_choice(EVALUATED, who=who)
        if not self.splits:
            raise ValueError("`splits`: expected at least one split, got none")
        check_within(1, tasks=self.tasks, batch=self.batch, dev_tasks=self.dev_tasks)
        check_within(0, temperature=self.temperature, every=self.every)
        check_within(*SEEDS, seed=self.seed)


@dataclass(frozen=True)
class CompareSettings:
    """Which runs a comparison has.

    Attributes:
      methods: names of variants; () for a single run.
      seeds: every method runs once with each.
      variants: method name to the fields that it sets.
      results: the folder of the result files (`report.cells`); "": `results` in the workdir.
    """

    methods: tuple[str, ...] = field(metadata=affects(FIGURES))
    seeds: tuple[int, ...] = field(metadata=affects(FIGURES))
    variants: Mapping[str, Any] = field(metadata=affects(FIGURES))
    results: str = field(metadata=affects(WORLD))

    def __post_init__(self):
        for method in self.methods:
            check_choice(self.variants, methods=method)
        for name in ("methods", "seeds"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"`{name}`: expected each once, got {', '.join(map(str, given))}")
        if self.methods and not self.seeds:
            raise ValueError("`seeds`: expected at least one seed, got none")
        for seed in self.seeds:
            check_within(*SEEDS, seeds=seed)


@dataclass(frozen=True)
class Settings:
    """A whole run.

    Attributes:
      seed: seeds everything that a run draws.
      dtype: dtype of the student's parameters and its optimizer.
      compute_dtype: dtype of the student's arithmetic.
      teacher_dtype: dtype of the teacher's parameters; "int8" rounds its projections to 8 bits.
      attention: what computes attention, or "auto" (`model.kernels`).
      student: a model reference (`references`), or "new" for a random one.
      teacher: a model reference; "" for none.
      program_cache: the folder in which compiled programs are kept, in a bucket too; "" for none
        (`compilation.start`).
      wandb: project of Weights & Biases that metrics are copied to; "" for none.
      new_model: sizes of a new student; the tokenizer gives its vocabulary.
      demonstrations: who demonstrates, where `data.source` is "players".
    """

    seed: int
    dtype: str
    compute_dtype: str
    teacher_dtype: str
    attention: str = field(metadata=affects(LAYOUT))
    student: str = field(metadata=affects(WORLD))  # `models.json` says which models a run has
    teacher: str = field(metadata=affects(WORLD))
    program_cache: str = field(metadata=affects(WORLD))
    wandb: str = field(metadata=affects(WORLD))
    mesh: MeshShape
    lora: Lora
    env: EnvSettings
    teacher_context: TeacherContext
    data: DataSettings
    rollout: RolloutSettings
    weight: Weight  # the same as `objective.weight`
    objective: Objective
    judge: JudgeSettings
    optimizer: AdamW
    train: TrainSettings
    eval: EvalSettings
    checkpoint: CheckpointSettings
    episodes: EpisodeSettings
    compare: CompareSettings
    debug: DebugSettings
    new_model: ModelConfig | None = None
    demonstrations: DemonstrationSettings | None = None

    def __post_init__(self):
        check_within(*SEEDS, seed=self.seed)
        check_choice(FLOATS, dtype=self.dtype, compute_dtype=self.compute_dtype)
        check_choice((*FLOATS, "int8"), teacher_dtype=self.teacher_dtype)
        check_choice(("auto", *ATTENTION), attention=self.attention)
        _check_student(self)
        _check_batches(self)
        _check_retries(self)
        _check_source(self)
        _check_judge(self)
        _check_teacher(self)
        _check_dev(self)

    @property
    def judges_what_it_scores(self) -> bool:
        """Whether the judge reads the very sequences that the teacher scores, so once for both."""
        judges = self.weight.reads_verdict and not self.shows_players
        # With "history" there is no `rollout.history_turns`.
        judges = judges and self.judge.by == "teacher" and self.judge.context == "history"
        return judges and not self.teacher_context.by

    def is_saved(self, update: int) -> bool:
        """Whether a checkpoint follows an update, whatever its figures."""
        return update % self.checkpoint.every == 0 or update == self.train.updates

    @property
    def learns_teacher_turns(self) -> bool:
        """Whether the student learns from turns that the teacher takes of its episodes."""
        return self.rollout.teacher_plays and bool(self.objective.teacher_turns)

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked for verdicts."""
        return self.eval.judge or (self.weight.reads_verdict and self.judge.by == "teacher")

    @property
    def judge_model(self) -> str:
        """The model that is asked instead of the teacher; "" if there is none."""
        return self.judge.model if self.asks_teacher else ""

    @property
    def shows_players(self) -> bool:
        """Whether the student learns from players' demonstrations."""
        return self.data.source == "players"


# Not in a config. The tokenizer later replaces the vocabulary's size.
_NEW_MODEL = {"vocab_size": 1, "rope_scaling": None}


def read_settings(config: ConfigDict) -> Settings:
    """A config as checked settings.

    Raises:
      ValueError: a field is missing, unknown, of another type or out of range, or fields contradict
        each other; names them.
    """
    hints = get_type_hints(Settings)
    optional = {"new_model", "demonstrations"}
    sections = {name: config[name] for name in config}
    _check_names("", hints.keys() - optional, hints.keys(), sections)
    sections = {"weight": sections.pop("weight"), **sections}  # the objective holds it
    values: dict[str, Any] = {}
    for name, given in sections.items():
        kind = _plain(hints[name])
        if not dataclasses.is_dataclass(kind):
            values[name] = _typed(name, hints[name], given)
            continue
        if not isinstance(given, ConfigDict):
            raise ValueError(f"`{name}`: expected a group of fields, got {given!r}")
        fields = dict(given.items())
        # A function of the user's has fields of its own; other judges and weights have ours.
        brought = ":" in str(fields.get("by"))
        if kind is EnvSettings or (brought and kind in (JudgeSettings, TeacherContext, Weight)):
            fields = _with_options(kind, fields)
        if kind is Objective:
            fields["weight"] = values["weight"]
        values[name] = _section(name, kind, fields)
    return Settings(**values)


def _with_options(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Moves the fields that only what `by` names has into `options`."""
    own = {f.name for f in dataclasses.fields(kind)} - {"options"}
    options = tuple((name, value) for name, value in sorted(given.items()) if name not in own)
    return {name: value for name, value in given.items() if name in own} | {"options": options}


T = TypeVar("T")


def _section(section: str, kind: type[T], given: Mapping[str, Any]) -> T:
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if kind is ModelConfig:
        given = {**_NEW_MODEL, **given}
    needed = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    _check_names(f"{section}.", needed, fields.keys(), given)
    values = {
        name: _typed(f"{section}.{name}", hints[name], value) for name, value in given.items()
    }
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(_named(str(error), section, fields)) from None


def _named(message: str, section: str, fields: Mapping[str, Any]) -> str:
    """Puts the section before the names of its fields in a dataclass's message."""
    return re.sub(
        r"`(\w+)`",
        lambda word: f"`{section}.{word[1]}`" if word[1] in fields else word[0],
        message,
    )


def _check_names(prefix: str, needed: Any, known: Any, given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            near = closest(prefix + name, [prefix + other for other in known])
            raise ValueError(f"`{prefix}{name}`: there is no such setting{near}")
    for name in known:
        if name in needed and name not in given:
            raise ValueError(
                f"`{prefix}{name}`: the config has no such field, and every run needs it; add it "
                "to the config file (configs/quickstart.py has every field, with what it means)"
            )


def _plain(hint: Any) -> Any:
    """The class of an annotation: `int` for `int | None`, `tuple` for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    return get_origin(hint) or hint


def _typed(name: str, hint: Any, value: Any) -> Any:
    """The value, checked to have the field's type; a list becomes a tuple."""
    kind = _plain(hint)
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if kind is Any or (value is None and types.NoneType in get_args(hint)):
        return value
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}`: expected {kind.__name__}, got {value!r}")
    if kind is tuple:
        element = get_args(hint)[0]
        return tuple(_typed(name, element, part) for part in value)
    return value


# --- What a field affects ---------------------------------------------------------------------


def affected_by(name: str, *, env: str) -> frozenset[str]:
    """What a config field affects (`runtime.fields`).

    Args:
      name: dotted, such as `train.updates`.
      env: `env.by`. Of the fields that only this environment has, those that its `world` names
        affect the world, those that its `figures` names the figures, and all others the method.
    """
    section, _, rest = name.partition(".")
    hints = get_type_hints(Settings)
    kind = _plain(hints.get(section, str))
    own = rest.partition(".")[0] if dataclasses.is_dataclass(kind) else section
    fields = dataclasses.fields(kind if dataclasses.is_dataclass(kind) else Settings)
    found = next((f for f in fields if f.name == own), None)
    if found:
        return found.metadata.get("affects", frozenset([METHOD]))
    kinds = {WORLD: world_options, FIGURES: figures_options}
    of_env = [kind for kind, options in kinds.items() if section == "env" and own in options(env)]
    return frozenset(of_env or [METHOD])


def binds_a_run(settings: Settings) -> Callable[[str], bool]:
    """Tells of a field's name whether its value must be equal to resume a run.

    A constant rate does not depend on the number of updates, so there it is free, unless the
    teacher's share of turns falls. Batches of demonstrations are cut to fit micro-batches and mesh,
    so there the layout binds too. What the method does not read is free (`_unread`).
    """
    kinds, how = {METHOD}, settings.rollout
    if settings.optimizer.schedule != "constant" or how.teacher_share * how.teacher_share_for:
        kinds.add(EXTENT)
    if settings.shows_players:
        kinds.add(LAYOUT)
    unread = _unread(settings)
    return lambda name: (
        name not in unread
        and f"{name.partition('.')[0]}." not in unread
        and not kinds.isdisjoint(affected_by(name, env=settings.env.by))
    )


def _unread(s: Settings) -> tuple[str, ...]:
    """Fields of the method that other fields make meaningless; `judge.` is the whole section."""
    objective = s.objective
    asks = (s.weight.reads_verdict and s.judge.by == "teacher") or s.shows_players
    is_read = {
        "judge.": s.weight.reads_verdict or s.shows_players,
        "judge.decode": asks,
        "judge.model": asks,
        "judge.prompt": asks,
        "judge.context": asks,
        "judge.admissible_shown": asks,
        "judge.max_new_tokens": s.judge.decode == "generate",
        "lora.alpha": s.lora.rank > 0,
        "lora.targets": s.lora.rank > 0,
        "objective.beta": "jsd" in (objective.divergence, objective.teacher_turns),
        "objective.teacher_turns": s.rollout.teacher_plays,
        "objective.max_z": objective.normalize != "none",
        "rollout.depth_every": s.rollout.depth_start > 0,
        "rollout.depth_from": s.rollout.depth_start > 0,
        "rollout.teacher_share_for": s.rollout.teacher_share > 0,
        "teacher_context.tokens": bool(s.teacher_context.by),
        "teacher_context.file": bool(s.teacher_context.by),
        **{f"weight.{name}": s.weight.takes(name) for name in WEIGHT_SETTINGS},
    }
    return tuple(name for name, read in is_read.items() if not read)


def binds_an_evaluation(settings: Settings, *, teacher: bool = False) -> Callable[[str], bool]:
    """Tells of a field's name whether it must be equal to evaluate a workdir's run.

    Bound are the tasks, the model's arithmetic and how it is sampled. How it was trained is in the
    checkpoint, and figures say themselves how they were measured (`eval`, `judge`). `teacher`: the
    teacher plays too.
    """
    sampled = {f"rollout.{f.name}" for f in dataclasses.fields(Decoding)} - {"rollout.temperature"}
    unread = _unread(settings)

    def binds(name: str) -> bool:
        kinds, section = affected_by(name, env=settings.env.by), name.partition(".")[0]
        if METHOD not in kinds or FIGURES in kinds or section in _TRAINING or name in unread:
            return False
        if section == "rollout":
            return name in sampled
        if name == "seed":
            return settings.student == "new"
        return name != "teacher_dtype" or settings.eval.judge or teacher

    return binds


def binds_a_result(settings: Settings) -> Callable[[str], bool]:
    """Tells of a field's name whether the result of a run depends on it, as far as one is told.

    It does on all that binds a run, on the number of updates, and on which episodes are evaluated.
    The seed is told beside it.
    """
    binds, dev = binds_a_run(settings), bool(settings.eval.every)

    def depends(name: str) -> bool:
        if name in _EVALUATED:
            return dev or not name.startswith("eval.dev")
        extent = EXTENT in affected_by(name, env=settings.env.by)
        return name != "seed" and (extent or binds(name))

    return depends


# Fields that say which episodes are evaluated.
_EVALUATED = tuple(
    f"eval.{name}" for name in ("splits", "tasks", "temperature", "seed", "dev", "dev_tasks")
)

# Sections that only training reads.
_TRAINING = ("data", "demonstrations", "objective", "optimizer", "teacher_context", "weight")


# --- Relations between sections ---------------------------------------------------------------


def _check_student(s: Settings) -> None:
    """There is a student. A new one has sizes, and no adapters."""
    if not s.student:
        raise ValueError(
            "`student` is empty: name a model folder (`hf download Qwen/Qwen3-1.7B --local-dir "
            "models/Qwen3-1.7B` makes one), embedded:student, or new"
        )
    if s.student != "new":
        return
    if s.new_model is None:
        raise ValueError(
            "`student` = 'new' needs its sizes in `new_model`, as in configs/household_pair.py"
        )
    if s.lora.rank:
        raise ValueError(
            f"`lora.rank` = {s.lora.rank} adapts a pretrained student, but `student` = 'new': set "
            "it to 0, or name a model folder"
        )


def _check_batches(s: Settings) -> None:
    """Batches divide into micro-batches and over the mesh."""
    batch, parts = s.rollout.batch, s.train.micro_batches
    if not s.shows_players and batch % parts:
        raise ValueError(
            f"`rollout.batch` = {batch} does not divide into `train.micro_batches` = {parts}; "
            "choose a divisor"
        )
    decoding = "`mesh.data` × `mesh.fsdp` / gcd(`mesh.fsdp`, `mesh.decode`)", s.mesh.decode_shards
    training = "`mesh.data` × `mesh.fsdp`", s.mesh.batch_shards
    sizes = {
        "rollout.batch": (batch, training),
        "rollout.rows": (s.rollout.at_once, decoding),
        "eval.batch": (s.eval.batch, decoding),
        "judge.batch": (s.judge.batch, decoding),
        "rollout.batch` / `train.micro_batches": (batch // parts, training),
    }
    for name, (size, (axes, ways)) in sizes.items():
        if size % ways:
            raise ValueError(f"`{name}` = {size} does not divide over {axes} = {ways}")


def _check_retries(s: Settings) -> None:
    """A worker may live as long as its client of a retrieval server asks again."""
    options = dict(s.env.options)
    if not s.env.workers or not str(options.get("retriever")).startswith("http"):
        return
    longest_s = 60 * options.get("retry_minutes", 0) + options.get("timeout_s", 0)
    for name in ("start_timeout_s", "step_timeout_s"):
        if getattr(s.env, name) < longest_s:
            raise ValueError(
                f"`env.{name}` = {getattr(s.env, name):g} would end a worker that still asks the "
                "retrieval server, which with `env.retry_minutes` and `env.timeout_s` may take "
                f"{longest_s:g} s: set it to that at least, or `env.workers` to False"
            )


def _check_source(s: Settings) -> None:
    """The objective, the rollout and the judge fit the source of the tokens."""
    objective, rollout, source = s.objective, s.rollout, s.data.source
    problems = [
        (
            rollout.per_task > 1 and rollout.sampling.greedy,
            "`rollout.per_task` above 1 would repeat the greedy episode of a task: set it to 1, or "
            "`rollout.temperature` above 0, `rollout.top_k` to 0 and `rollout.top_p` to 1",
        ),
        (
            rollout.per_task > 1 and source == "expert",
            "`rollout.per_task` above 1 would repeat the expert's episode of a task: set it to 1, "
            "or `data.source` to on_policy or teacher",
        ),
        (
            rollout.per_task > 1 and s.data.file and not s.data.on_policy,
            "`rollout.per_task` above 1 would repeat the episodes of a file: set it to 1",
        ),
        (
            s.weight.labels and s.data.file and not s.data.on_policy,
            f"`weight.by` = {s.weight.by!r} asks about what a task and its environment said, and "
            "a file of episodes holds only a part of it: set it to uniform",
        ),
        (
            rollout.history_turns and source == "players",
            "`data.source` = 'players' trains on whole histories: set `rollout.history_turns` to 0",
        ),
        (
            rollout.history_turns and objective.scope == "trajectory",
            "`objective.scope` = 'trajectory' needs each episode in one row, but with "
            "`rollout.history_turns` it has several: set the scope to batch, or the turns to 0",
        ),
        (
            rollout.history_turns and s.judge.context == "history",
            "`judge.context` = 'history' asks after the whole conversation, but "
            "`rollout.history_turns` shows the student only a part of it: change one of them",
        ),
        (
            rollout.depth_start and not s.data.on_policy,
            "`rollout.depth_start` cuts the student's episodes: set it to 0, or `data.source` to "
            "on_policy",
        ),
        (
            rollout.depth_from == "back" and not (rollout.depth_start and s.data.replays),
            "`rollout.depth_from` = 'back' replays a recorded episode but for its last turns: set "
            "`rollout.depth_start` above 0 and `data.source` to prefixes:FILE, or this to front",
        ),
        (
            rollout.teacher_plays and not s.data.on_policy,
            "`rollout.teacher_share` and `rollout.take_over_after` give turns of the student's "
            "episodes to the teacher: set both to 0, or `data.source` to on_policy",
        ),
        (
            rollout.cut_repeated_failure and not s.data.on_policy,
            "`rollout.cut_repeated_failure` cuts the student's episodes: set it to False, or "
            "`data.source` to on_policy",
        ),
        (
            s.learns_teacher_turns and "sampled_logprobs" in s.weight.reads,
            f"`weight.by` = {s.weight.by!r} reads log-probabilities of the student's own samples, "
            "and the teacher's turns have none: set `objective.teacher_turns` to ''",
        ),
        (
            s.learns_teacher_turns and not objective.needs_teacher,
            f"`objective.teacher_turns` = {objective.teacher_turns!r} compares with what a teacher "
            "scores, and with `objective.divergence` = 'cross_entropy' none scores: set it to ''",
        ),
        (
            objective.divergence == "sampled_reverse_kl" and not s.data.on_policy,
            "`objective.divergence` = 'sampled_reverse_kl' is an estimate from the student's own "
            "samples: set `data.source` to on_policy",
        ),
        (
            objective.divergence == "sampled_reverse_kl"
            and (rollout.temperature, rollout.top_k, rollout.top_p) != (1.0, 0, 1.0),
            "`objective.divergence` = 'sampled_reverse_kl' holds for tokens drawn from the "
            "student's own distribution: set `rollout.temperature` to 1, `rollout.top_k` to 0 and "
            "`rollout.top_p` to 1, or choose reverse_kl",
        ),
        (
            objective.divergence == "sampled_reverse_kl" and rollout.int8_cache,
            "`objective.divergence` = 'sampled_reverse_kl' holds for tokens drawn from the "
            "student's own distribution, and `rollout.int8_cache` rounds what they are drawn "
            "from: set it to False, or choose reverse_kl",
        ),
        (
            not objective.needs_teacher
            and s.data.on_policy
            and not (s.data.only_success and source == "on_policy"),
            "`objective.divergence` = 'cross_entropy' on the student's own episodes teaches "
            "nothing: set `data.only_success` to True, or `data.source` to teacher, expert, "
            "players or episodes:FILE",
        ),
        (
            rollout.history_turns and s.weight.by in COMPARE_TURNS,
            f"`weight.by` = {s.weight.by!r} compares the turns of an episode in one row, but with "
            "`rollout.history_turns` it has several: set that to 0",
        ),
        (
            "reliability" in s.weight.labels and bool(s.teacher_context.by),
            "`weight.by` reads how reliable the teacher is, which plays there without "
            "`teacher_context.by`: leave that empty",
        ),
        (
            "reliability" in s.weight.labels and not s.data.on_policy,
            "`weight.by` reads how reliable the teacher is at the student's turns: set "
            "`data.source` to on_policy",
        ),
        (
            s.data.only_success and not s.data.file and s.judges_what_it_scores,
            "`judge.context` = 'history' reads the whole batch for verdicts and scores at once, "
            "and `data.only_success` leaves a part of it out: change one of them",
        ),
        (
            s.teacher_context.by == "record" and not keeps_record(s.env.by),
            "`teacher_context.by` = 'record' tells the teacher the environment's record, and "
            f"`env.by` = {s.env.by!r} keeps none (`record`, docs/environment.md): set it to '' or "
            "solved",
        ),
        (
            bool(s.teacher_context.by) and not objective.needs_teacher,
            f"`teacher_context.by` = {s.teacher_context.by!r} tells a teacher something, and with "
            "`objective.divergence` = 'cross_entropy' none scores: leave it empty",
        ),
        (
            objective.needs_teacher and source == "players",
            "`data.source` = 'players' needs `objective.divergence` = cross_entropy",
        ),
        (
            source == "players" and s.env.by != "household",
            "`data.source` = 'players' draws rooms of several sizes, which only household has; got "
            f"`env.by` = {s.env.by!r}: for episodes of its expert set `data.source` to expert",
        ),
        (
            source == "players" and s.demonstrations is None,
            "`data.source` = 'players' needs the section `demonstrations`, as in "
            "configs/household_pair.py; for episodes of the expert set `data.source` to expert",
        ),
    ]
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)


def _check_judge(s: Settings) -> None:
    """There is such a judge, and it can judge this environment."""
    judge = s.judge
    find_judge(judge.by, dict(judge.options))
    prompt = read_prompt(judge.prompt)
    if s.asks_teacher and prompt.reads_record(judge.context) and not keeps_record(s.env.by):
        named = f"`judge.prompt` = {judge.prompt!r}" if judge.prompt else "`judge.context` = record"
        raise ValueError(
            f"{named} shows the judge the environment's record, and `env.by` = {s.env.by!r} keeps "
            "none (`record`, docs/environment.md): choose another"
        )
    if judge.by == "oracle" and s.weight.reads_verdict and not labels_turns(s.env.by):
        raise ValueError(
            f"`judge.by` = 'oracle' takes the environment's labels, and `env.by` = {s.env.by!r} "
            "has none: set it to teacher"
        )
    by_rule = judge.by == "record" and s.weight.reads_verdict
    if by_rule and not (own_rule(s.env.by) and keeps_record(s.env.by)):
        raise ValueError(
            "`judge.by` = 'record' takes the verdicts of the environment's own rule, and `env.by` "
            f"= {s.env.by!r} brings none (`rule` and `record`): set it to teacher"
        )
    labelled_by_rule = "reliability" in s.weight.labels and s.weight.teacher_labels == "record"
    if labelled_by_rule and not judges_responses(s.env.by):
        raise ValueError(
            "`weight.teacher_labels` = 'record' labels the teacher's turns by the environment's "
            f"own rule, and `env.by` = {s.env.by!r} does not bring all of `rule`, `parse` and "
            "`record`: set it to oracle"
        )
    if s.judge_model and judge.context == "history":
        raise ValueError(
            "`judge.context` = 'history' asks behind the conversation's own tokens, which another "
            "model may not read: set it to table9 or +feedback, or `judge.model` to ''"
        )
    if judge.prompt and s.shows_players:
        raise ValueError(
            "`judge.prompt` has words of its own, and with `data.source` = 'players' a model "
            "learns to answer the paper's: leave it empty"
        )
    if judge.by != "teacher" and s.eval.judge:
        raise ValueError(
            f"`eval.judge` measures the teacher's verdicts, but `judge.by` = {judge.by!r}: set one "
            "to False, or the other to teacher"
        )


def _check_teacher(s: Settings) -> None:
    """There is a teacher, and labels to compare its verdicts with, wherever they are needed."""
    if s.eval.judge and not labels_turns(s.env.by):
        raise ValueError(
            f"`eval.judge` compares verdicts with the environment's labels, and `env.by` = "
            f"{s.env.by!r} has none: set it to False"
        )
    needs = [
        (
            s.objective.needs_teacher
            or s.data.source == "teacher"
            or (s.weight.reads_verdict and s.judge.by == "teacher"),
            "the objective or `data.source` needs a teacher",
        ),
        (
            s.rollout.teacher_plays,
            "`rollout.teacher_share` or `rollout.take_over_after` gives turns to a teacher",
        ),
        ("teacher" in s.eval.who, "`eval.who` names the teacher"),
        (s.eval.judge, "`eval.judge` needs a teacher"),
    ]
    for is_needed, need in needs:
        if is_needed and s.student == "new":
            raise ValueError(f"{need}, but `student` = 'new' has none")
        if is_needed and not s.teacher:
            raise ValueError(f"{need}, but `teacher` is empty")


def _check_dev(s: Settings) -> None:
    """What is evaluated while training is neither trained on nor reported."""
    if s.checkpoint.best and not s.eval.every:
        raise ValueError(
            f"`checkpoint.best` = {s.checkpoint.best!r} is a figure of evaluations while training: "
            "set `eval.every` too"
        )
    if s.eval.every and s.eval.dev in (s.data.split, *s.eval.splits):
        raise ValueError(
            f"`eval.dev` = {s.eval.dev!r} chooses a checkpoint, so it is not a split that "
            "`data.split` trains on or `eval.splits` reports: name another"
        )
