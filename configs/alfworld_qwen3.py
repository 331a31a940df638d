"""The paper's main experiment: ALFWorld, Qwen3 students from larger Qwen3 teachers.

    python -m opd_jax.train --config=alfworld_qwen3 --workdir=runs/alfworld
    python -m opd_jax.train --config=alfworld_qwen3:student=0.6b,method=opd --workdir=...
    python -m opd_jax.evaluate --config=alfworld_qwen3 --workdir=... --policy=expert

Arguments, and the sweeps that give the paper's tables: see `paper.py`. Models are local folders:
`hf download Qwen/Qwen3-1.7B --local-dir models/Qwen3-1.7B`, and so on for Qwen/Qwen3-8B.

Needs the extra `alfworld`, and ALFWorld's games: `alfworld-download`, with their folder in
`ALFWORLD_DATA` or in `--config.env.data`. Without that download, `python -m
opd_jax.envs.alfworld.games --out=DIR --games=200 --seed=0` generates games in the same format.
Tables mark their figures "generated": they are not ALFWorld's.

Hardware: meant for eight accelerators of 80 GB (`mesh`), and on the host 64 environments of
about 120 MB in processes of their own. We have not run it at this size, so there is no wall time.

The paper's figures (single runs; ± 4 points with 140 and 134 games). Success in %, valid_seen /
valid_unseen:

                       0.6B from 8B    1.7B from 8B    0.6B from 32B   1.7B from 32B
  before                1.43 /  0.75   25.71 / 26.12    1.43 /  0.75   25.71 / 26.12
  teacher              61.43 / 67.16   61.43 / 67.16   57.14 / 69.40   57.14 / 69.40
  sft                   2.86 /  4.48   25.00 / 26.12        -               -
  opd                  55.00 / 56.72   60.00 / 61.94   53.57 / 68.66   58.57 / 74.85
  opd_two_rollouts     56.43 / 59.70   63.00 / 64.93   52.14 / 70.37   62.14 / 72.39
  entropy_aware        54.26 / 54.48   63.57 / 65.67   48.57 / 68.13   60.00 / 79.10
  tcod_f2b             56.43 / 61.19   64.29 / 58.21   54.29 / 67.91   57.14 / 73.13
  sage                 57.86 / 61.94   64.29 / 70.15   54.29 / 70.90   62.82 / 73.88

Ablation, valid_unseen: i alone 62.69, 66.42, 67.16, 79.10; i·c 55.22, 64.93, 69.40, 73.13.
Sensitivity, 1.7B from 8B, valid_unseen: weak_weight 0.3 67.16, 0.5 70.15, 0.7 66.42, 1 61.94;
normalize=active_tokens 68.66. In training SKIP rises from about 52 % of turns to 75 %, and STRONG
falls from 32 % to 13 %.
"""

from ml_collections import ConfigDict

from opd_jax.configs.paper import paper_config

ENV = dict(
    by="alfworld",
    data="",  # folder of the games; "": the one that ALFWORLD_DATA names
    max_turns=30,
    show_admissible=30,  # most admissible actions that an observation lists
    workers=True,  # run each environment in a process of its own
    start_timeout_s=300.0,
    step_timeout_s=60.0,
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one run, or of a comparison."""
    splits = ("valid_seen", "valid_unseen")
    config = paper_config(
        arg,
        env=ENV,
        splits=splits,
        tasks=140,
        updates=55,
        local_env=ENV | dict(max_turns=3),
        local_splits=splits,
    )
    config.eval.dev = "valid_train"
    return config
