"""What the experiments of the SAGE-OPD paper share: models, hyper-parameters, methods.

This is no config. `alfworld_qwen3`, `scienceworld_qwen3` and `searchqa_qwen3` build on it, each
with an environment. Their arguments, after a colon, separated by commas:

  student=1.7b|0.6b   a Qwen3 model, untuned, in the folder models/Qwen3-1.7B or models/Qwen3-0.6B
  teacher=8b|32b      models/Qwen3-8B or models/Qwen3-32B
  method=NAME         sage, opd or sft; or one of the paper's other baselines: opd_two_rollouts,
                      entropy_aware, tcod_f2b; or any other of configs/methods.py
  ablate=NAME         sage with one factor off: intervention, confidence or normalizer
  runlocal            the embedded pair in the real environment, shrunk to about a minute

Folders come from `hf download Qwen/Qwen3-1.7B --local-dir models/Qwen3-1.7B`, and so on.

The paper's tables (1 to 5) are sweeps of one of these files over `student`, `teacher` and:

  the methods         --config.compare.methods=sft,opd,opd_two_rollouts,entropy_aware,tcod_f2b,sage
                      --config.compare.seeds=0, for one table; or a run for each method
  the ablation        ablate=normalizer leaves i·c; ablate=confidence with
                      --config.objective.normalize=none leaves i alone; ablate=confidence leaves
                      i·Z, which the paper did not run
  the sensitivity     --config.weight.weak_weight=0.3, 0.7 or 1;
                      --config.objective.normalize=active_tokens;
                      --config.weight.confidence_temperature=0, 0.3, 0.7 or 1.5

Source: arXiv 2606.19659, its experimental setup and appendices.
"""

from typing import Any

from ml_collections import ConfigDict

from opd_jax.config import parse_arg
from opd_jax.configs import methods, quickstart

STUDENTS = {"0.6b": "models/Qwen3-0.6B", "1.7b": "models/Qwen3-1.7B"}
TEACHERS = {"8b": "models/Qwen3-8B", "32b": "models/Qwen3-32B"}


def paper_config(
    arg: str | None,
    *,
    env: dict[str, Any],
    splits: tuple[str, ...],
    tasks: int,
    updates: int,
    local_env: dict[str, Any],
    local_splits: tuple[str, ...],
) -> ConfigDict:
    """The config of one run, or of a comparison.

    Args:
      arg: the arguments above.
      env: the section `env`.
      splits: the splits to evaluate.
      tasks: most tasks of a split.
      updates: one epoch over the training tasks, in batches of 64.
      local_env: `env` with `runlocal`.
      local_splits: `splits` with `runlocal`.
    """
    args = parse_arg(
        arg, runlocal=False, student="1.7b", teacher="8b", method="sage", ablate="none"
    )
    method = methods.name_of(args.method, args.ablate)
    config = quickstart.get_config()
    config.student = _choice("`student`", args.student, STUDENTS)
    config.teacher = _choice("`teacher`", args.teacher, TEACHERS)
    config.env = ConfigDict(env)

    # Stated by the paper.
    config.rollout.batch = 64
    config.rollout.temperature = 0.4
    config.rollout.turn_tokens = 4096
    config.judge.max_new_tokens = 1028
    config.optimizer.learning_rate = 1e-6
    config.optimizer.weight_decay = 0.1
    config.train.updates = updates
    config.eval.splits = splits
    config.eval.tasks = tasks

    # Not stated by the paper. The whole history is shown, as there, up to a bound.
    config.rollout.context_tokens = 16_384
    config.judge.admissible_shown = 30
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_updates = 0
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 1.0
    config.eval.who = ("before", "teacher")

    # Precision, memory and speed. Parameters are float32: bfloat16 would round an update of 1e-6
    # away in 98 % of the student's weights.
    config.dtype = "float32"
    config.compute_dtype = "bfloat16"
    config.teacher_dtype = "bfloat16"  # int8: half the memory (`opd_jax/model/int8.py`)
    # By `plan --search` the best for 32 chips of v5e, and within 2 % of the best for eight H100.
    config.mesh.fsdp = config.mesh.decode = 8
    config.rollout.extend_widths = (128, 512)
    config.rollout.chunk = 64
    config.judge.batch = 64
    config.judge.prefill_rows = 16
    config.judge.extend_widths = (128, 512)
    config.train.micro_batches = 8
    config.train.query_chunk = 512
    config.train.loss_chunk = 8192  # large: each chunk reads both heads
    config.train.remat = "layers"
    config.train.length_multiple = 2048
    config.train.response_multiple = 1024
    config.eval.batch = 64
    config.checkpoint.every = 5

    config.update(ConfigDict(methods.METHODS[method]))
    if args.runlocal:
        _shrink(config, local_env, local_splits)
    return config


def _choice(name: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        expected = ", ".join(known)
        raise ValueError(f"config argument {name}: expected one of {expected}, got {value}")
    return known[value]


def _shrink(config: ConfigDict, env: dict[str, Any], splits: tuple[str, ...]) -> None:
    """Two updates of the embedded pair, whose context holds a few turns of any environment."""
    config.student, config.teacher = "embedded:student", "embedded:teacher"
    config.compute_dtype = config.teacher_dtype = "float32"
    config.mesh.fsdp = config.mesh.decode = 1
    config.env = ConfigDict(env)
    config.rollout.batch = 2
    config.rollout.turn_tokens = 24
    config.rollout.context_tokens = 1536
    config.rollout.extend_widths = (128,)
    config.rollout.chunk = 24
    config.judge.batch = 8
    config.judge.extend_widths = (128,)
    config.judge.max_new_tokens = 8
    config.train.updates = 2
    config.train.micro_batches = 1
    config.train.remat = "none"
    config.train.length_multiple = 1536
    config.train.response_multiple = 72
    config.eval.who = ("before",)
    config.eval.splits = splits
    config.eval.tasks = config.eval.dev_tasks = 2
    config.eval.batch = 2
    config.checkpoint.every = 2
