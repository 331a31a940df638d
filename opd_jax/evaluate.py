"""Success, score, turns and repetition of a model or a player on a split, with intervals.

    python -m opd_jax.evaluate --config=configs/quickstart.py --workdir=DIR --policy=expert

With `--policy=model` the student of the newest checkpoint in the workdir plays, or the config's
untrained student where there is none; `--config.eval.judge=true` also measures how the teacher's
judgement of the turns agrees with the environment's own labels.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.agent.conversation import Conversation
from opd_jax.agent.rollout import Agent, rollout, row_keys
from opd_jax.config import build as experiment
from opd_jax.config import check_same_run, fail, parse_command_line, validate
from opd_jax.config.build import LoadedModel
from opd_jax.experience import environments
from opd_jax.experience.demonstrations import play_out
from opd_jax.experience.players import make_player
from opd_jax.judge import agreement
from opd_jax.judge.verdicts import judge
from opd_jax.model import Params
from opd_jax.report.figures import macro_average, summarize
from opd_jax.report.tables import judge_table, results_table
from opd_jax.report.writers import write_summary
from opd_jax.runtime import processes
from opd_jax.runtime.mesh import make_mesh

POLICIES = ("model", "expert", "random")
# Beside the splits, where all those of a benchmark are evaluated (`environments.benchmark_splits`).
MACRO_AVERAGE = "macro_average"
# What may differ from the config of the run in the workdir: it changes nobody's episodes, or stands
# beside the figures.
_FREE_FIELDS = ("eval", "checkpoint", "compare", "train", "judge", "mesh")


def play_model(
    params: Params,
    rng: jax.Array,
    *,
    agent: Agent,
    env: FrozenConfigDict,
    split: str,
    tasks: int,
    batch: int,
) -> list[Conversation]:
    """The first `tasks` tasks of a split, `batch` conversations at a time.

    Each is sampled with `rng` folded with its task's index, so that what is played does not depend
    on how many are played, or on how many at a time.

    Args:
      params: the model's.
      rng: a PRNG key.
      agent: everything else of the model's playing.
      env: the environment's settings, `config.env`.
      split: of the environment.
      tasks: how many are played, at most as many as the split has.
      batch: environments, and rows of the compiled programs.

    Returns:
      The episodes in the order of the tasks.

    Raises:
      ValueError: as of the environment, or a first prompt does not fit into the agent's context.
    """
    envs = environments.make_envs(env, batch)
    conversations: list[Conversation] = []
    try:
        for start in range(0, tasks, batch):
            panel = [(split, index) for index in range(start, min(start + batch, tasks))]
            keys = row_keys(rng, range(start, start + batch))
            conversations += rollout(params, keys, agent=agent, envs=envs, tasks=panel, depth=0)
    finally:
        environments.close(envs)
    return conversations


def play_player(config: FrozenConfigDict, who: str, split: str) -> list[Conversation]:
    """The tasks that `evaluate_model` plays, played by the expert or the random player.

    Args:
      config: of the run; `eval.tasks` of the split are played.
      who: the player's name.
      split: of the environment.

    Returns:
      The episodes, without tokens, in the order of the tasks.

    Raises:
      ValueError: as of `make_player` or the environment.
    """
    player = make_player(who, config, field="--policy` or `eval.who")
    env = environments.make_env(config.env)
    tasks = panel_size(config, split)
    try:
        played = {
            index: play_out(
                env, split, index, player=player, rng=random.Random(f"{who}/{split}/{index}")
            )
            for index in range(tasks)
            if processes.owns(index, tasks)
        }
    finally:
        environments.close([env])
    return processes.share(played, tasks)


def panel_size(config: FrozenConfigDict, split: str) -> int:
    """How many tasks of a split are played: `eval.tasks`, or all where there are fewer."""
    return min(config.eval.tasks, _panel(config, split).size)


def _panel(config: FrozenConfigDict, split: str) -> environments.Panel:
    return environments.panel(config.env, "eval.splits", split)


def evaluate_model(
    config: FrozenConfigDict,
    model: LoadedModel,
    params: Params,
    *,
    update: int,
    judging: LoadedModel | None,
    after_split: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """`summarize` of a model on every split of `eval.splits`, and of all (`MACRO_AVERAGE`).

    Beside the figures stands what they depend on: the `digest` of the split's tasks, `update`,
    `temperature` and `seed`. With `eval.judge` the model `judging` also judges every turn played,
    and how it agrees with the environment's own labels is put under `judge` (`agreement.figures`).

    Args:
      config: of the run.
      model: who plays, with other parameters.
      params: the parameters to play with.
      update: after how many updates they are.
      judging: the teacher; None for none.
      after_split: called when a split is done, which takes minutes: what it raises ends all.

    Returns:
      Figures by split.

    Raises:
      ValueError: as of `summarize`, `measure_judge` or the environment.
    """
    agent = experiment.make_agent(model, config.rollout, temperature=config.eval.temperature)
    results = {}
    for split in config.eval.splits:
        conversations = play_model(
            params,
            jax.random.key(config.eval.seed),
            agent=agent,
            env=config.env,
            split=split,
            tasks=panel_size(config, split),
            batch=config.eval.batch,
        )
        played_with = {name: config.eval[name] for name in ("temperature", "seed")}
        results[split] = _figures(config, split, conversations) | {"update": update, **played_with}
        if config.eval.judge and judging is not None:
            results[split]["judge"] = measure_judge(config, judging, conversations)
        if after_split:
            after_split()
    return _with_average(config, results)


def _figures(
    config: FrozenConfigDict, split: str, conversations: Sequence[Conversation]
) -> dict[str, Any]:
    return summarize(conversations) | {"digest": _panel(config, split).digest}


def _with_average(config: FrozenConfigDict, results: dict[str, Any]) -> dict[str, Any]:
    """With the average of a benchmark's splits, or None in its place where some are missing."""
    splits = environments.benchmark_splits(config.env)
    if not splits:
        return results
    complete = results.keys() >= set(splits)
    average = macro_average([results[split] for split in splits]) if complete else None
    return results | {MACRO_AVERAGE: average}


def is_evaluated(
    result: Mapping[str, Any] | None, config: FrozenConfigDict, *, update: int
) -> bool:
    """Whether stored figures of somebody are what evaluating again would give.

    Args:
      result: figures by split; None for none.
      config: what is asked for.
      update: of a model, after how many updates.
    """

    def good(figures: Mapping[str, Any] | None, split: str) -> bool:
        if figures is None or figures.get("digest") != _panel(config, split).digest:
            return False
        # Broken episodes count: played again they may break again, without end.
        if figures["n"] + figures.get("broken", 0) != panel_size(config, split):
            return False
        if "update" not in figures:  # a player
            return True
        played_with = {"update": update, **{n: config.eval[n] for n in ("temperature", "seed")}}
        judged = not config.eval.judge or (
            _judged_by(config).items() <= figures.get("judge", {}).items()
        )
        return judged and played_with.items() <= figures.items()

    return result is not None and all(
        good(result.get(split), split) for split in config.eval.splits
    )


def measure_judge(
    config: FrozenConfigDict, judging: LoadedModel, conversations: Sequence[Conversation]
) -> dict[str, object]:
    """`agreement.figures` of a judge over the turns of a panel of episodes, and how it was asked.

    Args:
      config: of the run; `judge` says how the question is put and answered.
      judging: the teacher.
      conversations: episodes with their turns and the environment's labels.

    Raises:
      ValueError: the environment has no oracle.
    """
    judgement = judge(
        judging.params,
        conversations,
        by=experiment.make_judge(judging, config.judge),
        max_turns=config.env.max_turns,
        decode=config.judge.decode,
    )
    try:
        figures = agreement.figures(agreement.confusion(judgement, conversations))
    except ValueError as error:
        raise ValueError(f"`eval.judge`: {error}") from None
    return figures | _judged_by(config)


def _judged_by(config: FrozenConfigDict) -> dict[str, object]:
    """What a judge's figures depend on, besides the teacher and the turns."""
    return {name: config.judge[name] for name in ("context", "decode", "admissible_shown")}


def evaluate_player(
    config: FrozenConfigDict, who: str, *, after_split: Callable[[], None] | None = None
) -> dict[str, Any]:
    """`summarize` of a player on every split of `eval.splits`, with `digest`, and of all.

    Args:
      config: of the run.
      who: the player's name.
      after_split: as of `evaluate_model`.

    Returns:
      Figures by split.

    Raises:
      ValueError: as of `make_player` or `summarize`.
    """
    results = {}
    for split in config.eval.splits:
        results[split] = _figures(config, split, play_player(config, who, split))
        if after_split:
            after_split()
    return _with_average(config, results)


def run(config: FrozenConfigDict, workdir: Path, policy: str) -> dict[str, dict]:
    """Evaluate one policy and merge its figures into `summary.json`.

    Raises:
      ValueError: the workdir holds a run in another environment, of another student, ...: figures
        of the two would stand side by side as if they were of one.
    """
    check_same_run(config, workdir, ignore=_FREE_FIELDS)
    for split in config.eval.splits:  # one that does not exist is named before anything is played
        processes.say(environments.describe(split, _panel(config, split)))
    if policy == "model":
        mesh = make_mesh(**config.mesh)
        with jax.set_mesh(mesh):
            results = _evaluate_student(config, workdir, mesh)
    else:
        results = {policy: evaluate_player(config, policy)}
    write_summary(workdir / "summary.json", {"eval": results}, write=processes.is_first())
    return results


def _evaluate_student(
    config: FrozenConfigDict, workdir: Path, mesh: jax.sharding.Mesh
) -> dict[str, dict]:
    """The student `after` the workdir's newest checkpoint, or `before` any update."""
    from opd_jax.runtime.checkpoint import Checkpoints

    student = experiment.load_student(config, mesh)
    judging = experiment.load_teacher(config, mesh) if config.eval.judge else None
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    untrained = experiment.initial_params(student, config, mesh)
    restored = checkpoints.restore_latest({"params": untrained}, partial=True)
    who = "after" if restored else "before"
    update, state, _ = restored or (0, {"params": untrained}, {})
    sampling = experiment.make_sampling_params(state["params"], student, config)
    # Nothing else is needed on the devices from here on.
    student = dataclasses.replace(student, params={})
    del untrained, restored, state
    return {who: evaluate_model(config, student, sampling, update=update, judging=judging)}


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.evaluate`."""
    try:
        config, workdir, flags = parse_command_line(argv, usage=__doc__, policy=POLICIES)
        validate(config)
        processes.start()
        with processes.ending_together():
            results = run(config, workdir, flags["policy"])
        processes.say("\n\n".join(filter(None, (results_table(results), judge_table(results)))))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
