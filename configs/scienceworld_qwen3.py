"""The paper's second experiment: ScienceWorld, Qwen3 students from larger Qwen3 teachers.

    python -m opd_jax.train --config=scienceworld_qwen3 --workdir=runs/scienceworld
    python -m opd_jax.evaluate --config=scienceworld_qwen3 --workdir=... --policy=expert

Arguments, and the sweeps that give the paper's tables: see `paper.py`. Models are local folders:
`hf download Qwen/Qwen3-1.7B --local-dir models/Qwen3-1.7B`, and so on for Qwen/Qwen3-8B.

Needs the extra `scienceworld` and a Java runtime; there is nothing to download. The split `panel`
is evaluated: five variations of each of the 30 task types, spread evenly over its test variations.
One type, identify-life-stages-2, has only four; its fifth is the last of its dev variations.
`score` is the engine's, from -100 to 100; success is a score of 100. The expert follows the
engine's own path, which in many tasks is longer than 30 turns.

Hardware: meant for eight accelerators of 80 GB (`mesh`), and on the host 64 environments of
about 450 MB, each with a Java process. We have not run it at this size, so there is no wall time.

The paper's figures (single runs), mean score:

             0.6B from 8B    1.7B from 8B    0.6B from 32B   1.7B from 32B
  opd           -12.88           -2.78          -28.46          -29.89
  sage            3.89            0.24          -26.10          -16.01

The paper does not say which variations it evaluates, nor which simplifications it uses.
"""

from ml_collections import ConfigDict

from opd_jax.configs.paper import paper_config

ENV = dict(
    by="scienceworld",
    simplifications="easy",  # the engine's names, joined by commas; "": none
    max_turns=30,
    # Most admissible actions of an observation, for the judge and the random player. Listing them
    # changes the engine's random draws, so every method lists them.
    list_admissible=30,
    heap_mb=256,  # most memory of Java's heap, MiB
    timeout_s=60.0,  # longest wait for the engine's answer
    workers=True,
    start_timeout_s=300.0,
    # Within one step a lost engine may be replaced and the episode played again.
    step_timeout_s=240.0,
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one run, or of a comparison."""
    config = paper_config(
        arg,
        env=ENV,
        splits=("panel",),
        tasks=150,
        updates=56,
        local_env=ENV | dict(max_turns=3),
        local_splits=("panel",),
    )
    config.eval.dev = "dev_panel"
    return config
