"""Success, score, turns and repetition of a model or a player on a split, with intervals.

    python -m opd_jax.evaluate --config=configs/quickstart.py --workdir=DIR --policy=expert

With `--policy=model` the student of the newest checkpoint in the workdir plays, or the config's
untrained student where there is none.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from opd_jax import experiment
from opd_jax.config import fail, parse_command_line, validate
from opd_jax.demonstrations import play_out
from opd_jax.mesh import make_mesh
from opd_jax.model import Params
from opd_jax.report import mean_interval, table, wilson_interval, write_summary
from opd_jax.rollout import Agent, rollout
from opd_jax.trajectory import Conversation

POLICIES = ("model", "expert", "random")


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
    """The first `tasks` tasks of a split, `batch` conversations at a time."""
    envs = [experiment.make_env(env) for _ in range(batch)]
    conversations = []
    for start in range(0, tasks, batch):
        panel = [(split, index) for index in range(start, min(start + batch, tasks))]
        key = jax.random.fold_in(rng, start)
        conversations += rollout(params, key, agent=agent, envs=envs, tasks=panel)
    return conversations


def play_player(config: FrozenConfigDict, who: str, split: str) -> list[Conversation]:
    """The same tasks played by the expert or the random player."""
    env = experiment.make_env(config.env)
    player = experiment.make_player(who, config.data)
    return [
        play_out(env, split, index, player=player, rng=random.Random(f"{who}/{split}/{index}"))
        for index in range(panel_size(config, split))
    ]


def panel_size(config: FrozenConfigDict, split: str) -> int:
    """How many tasks of a split are played: `eval.tasks`, or all where there are fewer."""
    env = experiment.make_env(config.env)
    return min(config.eval.tasks, experiment.split_size(env, "eval.splits", split))


def summarize(conversations: Sequence[Conversation]) -> dict[str, object]:
    """The figures of a panel of episodes.

    Returns:
      `success` (share), `ci95` (Wilson interval of it), `score` and `score_ci95` (mean), `turns`
      (mean), `repeated` (share of turns that repeat an earlier action of their episode), `failed`
      (share of turns that failed deterministically), `n`.
    """
    n = len(conversations)
    wins = sum(c.success for c in conversations)
    turns = sum(len(c.turns) for c in conversations)
    scores = [c.score for c in conversations]
    return {
        "success": wins / n,
        "ci95": list(wilson_interval(wins, n)),
        "score": float(np.mean(scores)),
        "score_ci95": list(mean_interval(scores)),
        "turns": turns / n,
        "repeated": sum(c.repeated_actions for c in conversations) / max(turns, 1),
        "failed": sum(bool(t.failure) for c in conversations for t in c.turns) / max(turns, 1),
        "n": n,
    }


def evaluate_model(
    config: FrozenConfigDict, model: experiment.LoadedModel, params: Params
) -> dict[str, dict]:
    """`summarize` of a model on every split of `eval.splits`."""
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
        results[split] = summarize(conversations)
    return results


def evaluate_player(config: FrozenConfigDict, who: str) -> dict[str, dict]:
    """`summarize` of a player on every split of `eval.splits`."""
    return {split: summarize(play_player(config, who, split)) for split in config.eval.splits}


def results_table(results: dict[str, dict]) -> str:
    """A markdown table of `{who: {split: figures}}`."""
    rows = [
        {
            "who": who,
            "split": split,
            "success": f"{r['success']:.1%}",
            "95 % interval": f"{r['ci95'][0]:.1%} to {r['ci95'][1]:.1%}",
            "turns": f"{r['turns']:.1f}",
            "repeated": f"{r['repeated']:.1%}",
            "failed": f"{r['failed']:.1%}",
            "n": r["n"],
        }
        for who, splits in results.items()
        for split, r in splits.items()
    ]
    columns = ["who", "split", "success", "95 % interval", "turns", "repeated", "failed", "n"]
    return table(rows, columns)


def run(config: FrozenConfigDict, workdir: Path, policy: str) -> dict[str, dict]:
    """Evaluate one policy, print its table and merge it into `summary.json`."""
    experiment.check_splits(config)
    if policy == "model":
        from opd_jax.checkpoint import Checkpoints
        from opd_jax.train_step import abstract_state

        mesh = make_mesh(**config.mesh)
        # With the teacher, as in training: which rows pad the vocabulary depends on both.
        student, _ = experiment.load_pair(config, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        params, who = student.params, "before"
        if checkpoints.latest() is not None:
            optimizer = experiment.make_optimizer(config)
            abstract = abstract_state(student.params, optimizer)
            _, state, _ = checkpoints.restore_latest(abstract)
            params, who = state.params, "after"
        results = {who: evaluate_model(config, student, params)}
    else:
        results = {policy: evaluate_player(config, policy)}
    write_summary(workdir / "summary.json", {"eval": results}, write=jax.process_index() == 0)
    return results


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.evaluate`."""
    try:
        config, workdir, flags = parse_command_line(argv, usage=__doc__, policy=POLICIES)
        validate(config)
        print(results_table(run(config, workdir, flags["policy"])))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
