"""Every check that a config can fail before anything is built, each error naming its field."""

import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

# What a field may hold, where the code that reads it would find out only after compiling.
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
    "teacher_dtype": ("float32", "bfloat16", "int8"),
    "data.source": ("on_policy", "teacher", "expert", "players"),
    "objective.divergence": (
        "reverse_kl",
        "forward_kl",
        "jsd",
        "sampled_reverse_kl",
        "cross_entropy",
    ),
    "objective.normalize": ("all_tokens", "active_tokens", "none"),
    "objective.scope": ("batch", "trajectory"),
    "train.remat": ("none", "projections", "layers"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "judge.decode": ("constrained", "generate"),
    "judge.context": ("table9", "+feedback", "history"),
}

# Each of `lora.targets`; as `lora.TARGETS`.
_LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# At least 1.
_COUNTS = (
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "env.max_turns",
    "rollout.batch",
    "rollout.per_task",
    "rollout.depth_every",
    "rollout.turn_tokens",
    "rollout.cache_step",
    "rollout.chunk",
    "judge.batch",
    "judge.length_multiple",
    "judge.max_new_tokens",
    "train.updates",
    "train.micro_batches",
    "train.query_chunk",
    "train.loss_chunk",
    "train.length_multiple",
    "train.response_multiple",
    "eval.tasks",
    "eval.batch",
    "checkpoint.every",
    "checkpoint.keep",
)

# Inclusive bounds; outside them an update would climb instead of descend, or divide by zero.
_RANGES = {
    "seed": (0, 2**31 - 1),
    "lora.rank": (0, math.inf),
    "lora.alpha": (1e-9, math.inf),
    "objective.beta": (0, 1),
    "objective.weak_weight": (0, 1),
    "objective.confidence_temperature": (0, math.inf),
    "objective.entropy_bonus": (0, math.inf),
    "objective.entropy_threshold": (0, math.inf),
    "objective.eps": (1e-30, 1),
    "objective.max_z": (0, math.inf),
    "rollout.temperature": (0, math.inf),
    "rollout.top_k": (0, math.inf),
    "rollout.top_p": (1e-9, 1),
    "rollout.history_turns": (0, math.inf),
    "rollout.depth_start": (0, math.inf),
    "eval.temperature": (0, math.inf),
    "judge.admissible_shown": (0, math.inf),
    "judge.agreement_every": (0, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip_norm": (0, math.inf),
    "optimizer.warmup_updates": (0, math.inf),
    # A moment that forgets nothing has no estimate, and an update is divided by `eps` where all
    # gradients were 0.
    "optimizer.b1": (0, 1 - 1e-9),
    "optimizer.b2": (0, 1 - 1e-9),
    "optimizer.eps": (1e-30, math.inf),
}

# Whose values are checked elsewhere, or may be any.
_OTHERS = (
    "student",
    "teacher",
    "lora.targets",
    "lora.int8",
    "env.name",
    "env.workers",
    "env.start_timeout_s",
    "env.step_timeout_s",
    "data.split",
    "rollout.context_tokens",
    "rollout.extend_widths",
    "rollout.gather_weights",
    "objective.intervention",
    "objective.confidence",
    "eval.who",
    "eval.splits",
    "eval.seed",
    "eval.judge",
    "compare.methods",
    "compare.seeds",
    "compare.variants",
)
# Of `data`, where `data.source` is players.
_PLAYERS_DATA = (
    "player",
    "sizes",
    "sizes_from",
    "distraction",
    "distractors",
    "window",
    "judge_examples",
    "judge_contexts",
    "tokens_per_batch",
)


def validate(config: ConfigDict) -> None:
    """Checks every field whose mistake would show late, and every relation between fields.

    Raises:
      ValueError: naming the fields, what was expected and what came.
    """
    for name in (*_CHOICES, *_COUNTS, *_RANGES, *_OTHERS):
        _field(config, name)  # all are there before any is looked at
    for name, known in _CHOICES.items():
        _check_choice(name, _field(config, name), known)
    for name in _COUNTS:
        _check_range(name, _field(config, name), 1, math.inf)
    for name, (low, high) in _RANGES.items():
        _check_range(name, _field(config, name), low, high)
    _check_lora(config)
    _check_batches(config)
    _check_context(config)
    _check_objective(config)
    _check_evaluation(config)
    if config.student == "new" and "new_model" not in config:
        raise ValueError(
            "`student` = 'new' needs its sizes in `new_model`, as in configs/household_pair.py"
        )


def _field(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            raise ValueError(
                f"`{name}`: the config has no such field, and every run needs it; add it to the "
                "config file (configs/quickstart.py has every field, with what it means)"
            )
        value = value[part]
    return value


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        expected = f"at least {low}" if high == math.inf else f"{low}..{high}"
        raise ValueError(f"`{name}`: expected {expected}, got {value}")


def _check_lora(config: ConfigDict) -> None:
    """Adapters have targets, each once, and a pretrained student to adapt."""
    lora = config.lora
    for target in lora.targets:
        _check_choice("lora.targets", target, _LORA_TARGETS)
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise ValueError(
            f"`lora.targets`: expected one or more projections, each once, got {[*lora.targets]}"
        )
    if lora.rank and config.student == "new":
        raise ValueError(
            f"`lora.rank` = {lora.rank} adapts a pretrained student, but `student` = 'new': set it "
            "to 0, or name a model folder"
        )
    if lora.int8 and not lora.rank:
        raise ValueError(
            "`lora.int8` rounds weights that are not trained, but `lora.rank` = 0 trains them all: "
            "give a rank, or set `lora.int8` to False"
        )


def _check_batches(config: ConfigDict) -> None:
    """Batches divide into micro-batches and over the mesh."""
    rollout, train = config.rollout, config.train
    if config.data.source != "players" and rollout.batch % train.micro_batches:
        raise ValueError(
            f"`rollout.batch` = {rollout.batch} does not divide into `train.micro_batches` = "
            f"{train.micro_batches}; choose a divisor"
        )
    if rollout.batch % rollout.per_task:
        raise ValueError(
            f"`rollout.batch` = {rollout.batch} does not divide by `rollout.per_task` = "
            f"{rollout.per_task}; choose a divisor"
        )
    ways = config.mesh.data * config.mesh.fsdp
    parts = {
        "rollout.batch": rollout.batch,
        "eval.batch": config.eval.batch,
        "judge.batch": config.judge.batch,
        "rollout.batch` / `train.micro_batches": rollout.batch // train.micro_batches,
    }
    for name, size in parts.items():
        if size % ways:
            raise ValueError(
                f"`{name}` = {size} does not divide over `mesh.data` × `mesh.fsdp` = {ways}"
            )


def _check_context(config: ConfigDict) -> None:
    """A turn fits into the cache, and observations into the widths they are appended in."""
    rollout = config.rollout
    if rollout.turn_tokens >= rollout.context_tokens:
        raise ValueError(
            f"`rollout.turn_tokens` = {rollout.turn_tokens} must be below the cache, "
            f"`rollout.context_tokens` = {rollout.context_tokens}"
        )
    widths = list(rollout.extend_widths)
    if not widths or widths != sorted(set(widths)) or widths[0] < 1:
        raise ValueError(f"`rollout.extend_widths`: expected ascending widths, got {widths}")


def _check_objective(config: ConfigDict) -> None:
    """The objective fits where its tokens come from, and has the teacher it needs."""
    objective, source = config.objective, config.data.source
    distils = objective.divergence != "cross_entropy"
    if distils or source == "teacher" or objective.intervention:
        _check_teacher(config, "the objective or `data.source` needs a teacher")
    if not distils and (objective.intervention or objective.confidence or objective.entropy_bonus):
        raise ValueError(
            "`objective.divergence` = 'cross_entropy' has no verdicts, confidence or teacher's "
            "entropy: set `objective.intervention` and `objective.confidence` to False, and "
            "`objective.entropy_bonus` to 0"
        )
    if config.rollout.per_task > 1 and source == "expert":
        raise ValueError(
            "`rollout.per_task` above 1 would repeat the expert's episode of a task: set it to 1, "
            "or `data.source` to on_policy or teacher"
        )
    if config.rollout.history_turns and source == "players":
        raise ValueError(
            "`data.source` = 'players' trains on whole histories: set `rollout.history_turns` to 0"
        )
    if config.rollout.history_turns and objective.scope == "trajectory":
        raise ValueError(
            "`objective.scope` = 'trajectory' needs each episode in one row, which it is not with "
            "`rollout.history_turns`: set the one to batch, or the other to 0"
        )
    if config.rollout.history_turns and config.judge.context == "history":
        raise ValueError(
            "`judge.context` = 'history' asks behind the whole conversation, of which "
            "`rollout.history_turns` lets the student see a part: change one of them"
        )
    if config.rollout.depth_start and source != "on_policy":
        raise ValueError(
            "`rollout.depth_start` cuts the student's episodes: set it to 0, or `data.source` to "
            "on_policy"
        )
    if objective.divergence == "sampled_reverse_kl" and source != "on_policy":
        raise ValueError(
            "`objective.divergence` = 'sampled_reverse_kl' is an estimate from the student's own "
            "samples: set `data.source` to on_policy"
        )
    if not distils and source == "on_policy":
        raise ValueError(
            "`objective.divergence` = 'cross_entropy' on the student's own episodes teaches "
            "nothing: set `data.source` to teacher, expert or players"
        )
    if source == "players":
        _check_players(config)


def _check_players(config: ConfigDict) -> None:
    """`data.source` = 'players' has what it needs."""
    if config.objective.divergence != "cross_entropy":
        raise ValueError("`data.source` = 'players' needs `objective.divergence` = cross_entropy")
    if config.env.name != "household":
        raise ValueError(
            "`data.source` = 'players' draws rooms of several sizes, as household has them; got "
            f"`env.name` = {config.env.name!r}: for episodes of its expert set `data.source` to "
            "expert"
        )
    if missing := [f"`data.{name}`" for name in _PLAYERS_DATA if name not in config.data]:
        raise ValueError(
            f"`data.source` = 'players' needs {', '.join(missing)}, as in "
            "configs/household_pair.py; for episodes of the expert set `data.source` to expert"
        )
    for context in config.data.judge_contexts:
        _check_choice("data.judge_contexts", context, _CHOICES["judge.context"])


def _check_evaluation(config: ConfigDict) -> None:
    """There is something to evaluate, and somebody to compare."""
    for who in config.eval.who:
        _check_choice("eval.who", who, ("before", "teacher", "expert", "random"))
    if "teacher" in config.eval.who:
        _check_teacher(config, "`eval.who` names the teacher")
    if config.eval.judge:
        _check_teacher(config, "`eval.judge` needs a teacher")
    if not config.eval.splits:
        raise ValueError("`eval.splits`: expected at least one split, got none")
    if config.compare.methods and not config.compare.seeds:
        raise ValueError("`compare.seeds`: expected at least one seed, got none")


def _check_teacher(config: ConfigDict, need: str) -> None:
    if config.student == "new":
        raise ValueError(f"{need}, but `student` = 'new' has none")
    if not config.teacher:
        raise ValueError(f"{need}, but `teacher` is empty")
