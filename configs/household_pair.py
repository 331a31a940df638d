"""Builds the embedded pair from nothing, with our own fine-tuning objective.

    ./launch/local.sh --config=household_pair:who=teacher --workdir=runs/teacher
    ./launch/local.sh --config=household_pair:who=student --workdir=runs/student
    ./launch/local.sh --config=household_pair:who=recovering --workdir=runs/recovering
    .venv/bin/python -m opd_jax.export --workdir=runs/teacher --out=runs/teacher/model

Then copy `runs/teacher/model` to `opd_jax/pair/teacher`, and the student's likewise.

The teacher imitates the household's expert, whose turns have a "Thought:" line. Other players
disturb the episodes. Their turns stay in the history without loss, so the teacher learns to go on
after anybody's mistakes. It also learns to judge: it answers the judge's question about turns of
those episodes. The right answer comes from the exact distance to the goal, and the prompt is the
one that a large model would get.

The student imitates a forgetful player. It reads, searches and acts as the expert does, but in most
episodes it forgets to clean, heat or cool, or that there is a second object. So the student knows
every word and has the skills, but lacks a part of the policy. Distillation teaches that part.

The recovering teacher goes on from the teacher's weights. Half of its episodes begin with up to 12
turns of a weak player, so it learns to win from there. It also learns to judge from the record of
an episode (`judge.context=record`). After its answer a judge example goes on with other responses
at the same turn, so that one record has several answers to learn.

With `histories`, a file of models' episodes, training goes on from the workdir `runs/recovering`.
Two of three episodes then begin with up to 20 turns of a model. docs/pair.md says how the file is
made.

Arguments: who=teacher|student|recovering, histories=FILE, runlocal.
"""

from ml_collections import ConfigDict

from opd_jax.config import parse_arg
from opd_jax.configs import quickstart


def get_config(arg: str | None = None) -> ConfigDict:
    """The config that trains one of the models."""
    args = parse_arg(arg, runlocal=False, who="teacher", histories="")
    config = quickstart.get_config("runlocal" if args.runlocal else "")
    is_teacher = {"teacher": True, "student": False, "recovering": True}.get(args.who)
    if is_teacher is None:
        raise ValueError(
            f"config argument `who`: expected teacher, student or recovering, got {args.who!r}"
        )
    if args.histories and args.who != "recovering":
        raise ValueError(
            f"config argument `histories`: expected who=recovering beside it, got {args.who!r}"
        )

    config.student = "new"
    config.teacher = ""
    config.new_model = dict(
        d_model=96 if is_teacher else 64,  # width of the residual stream
        num_layers=3,  # transformer layers
        num_heads=4,  # query heads
        num_kv_heads=2,  # key/value heads; a divisor of num_heads
        head_dim=24 if is_teacher else 16,  # size of a head
        d_ff=256 if is_teacher else 192,  # width of the feed-forward layer
        norm_eps=1e-6,  # added to the mean square in RMS norms
        rope_theta=10_000.0,  # base of the rotary frequencies
        max_positions=2048,  # longest sequence
        qk_norm=True,  # RMS norm of queries and keys
        qkv_bias=False,  # bias of the query, key and value projections
        tied=True,  # the output head is the transposed embedding
    )
    config.data.source = "players"
    config.demonstrations = dict(
        sizes=("small", "medium", "large"),  # sizes of rooms; an episode draws one
        sizes_from=(15_000, 40_000),  # first episode that may draw the second size, and the third
        player="expert" if is_teacher else "forgetful",  # whose turns are learnt from
        distraction=0.3,  # largest share of an episode's turns that a distractor plays
        head_start=0,  # half of the episodes begin with up to so many turns of a distractor alone
        # Players that disturb; an episode draws one.
        distractors=(
            ("careless", "clumsy", "mistaken", "random") if is_teacher else ("clumsy", "mistaken")
        ),
        histories="",  # episode file of the distractor "histories", a model's episodes; "": none
        # Probabilities of a player's lapses (`opd_jax/envs/household/habits.py`).
        habits=dict(
            careless=dict(skip_step=0.7, list_order=0.8, ignore_closed=0.4, idle=0.15, forget=0.7),
            forgetful=dict(skip_step=0.8, forget=0.8),
            stubborn=dict(again=0.7),
        ),
        window=128,  # episodes generated together
        judge_examples=64 if is_teacher else 0,  # judge examples from a window; 0: none
        judge_contexts=("table9",),  # contexts of their questions, in turn (`judge.context`)
        proposals=0,  # most other responses that an example judges at its turn; 0: none
        proposers=(),  # players that propose them
        tokens_per_batch=4096 if is_teacher else 2048,  # most tokens of a batch, with padding
    )
    config.weight.by = "uniform"
    config.objective.divergence = "cross_entropy"
    config.optimizer.update(
        ConfigDict(
            dict(
                learning_rate=2e-3 if is_teacher else 3e-3,
                schedule="cosine",
                warmup_updates=100,
                weight_decay=0.01,
            )
        )
    )
    if is_teacher:
        config.env.update(ConfigDict(dict(size="large", max_turns=30)))
        config.rollout.context_tokens = 896
    config.train.updates = 8000 if is_teacher else 9000
    if args.who == "recovering":
        config.student = "embedded:teacher"
        config.demonstrations.sizes_from = (0, 0)
        config.demonstrations.head_start = 12
        config.demonstrations.distractors = (
            *("careless", "clumsy", "mistaken", "random"),
            *("forgetful", "forgetful", "stubborn", "stubborn"),
        )
        config.demonstrations.judge_examples = 96
        config.demonstrations.judge_contexts = ("table9", "record", "record", "record")
        config.demonstrations.proposals = 7
        config.demonstrations.proposers = (
            *("expert", "careless", "careless", "forgetful", "mistaken", "mistaken"),
            *("random",) * 6,
        )
        config.optimizer.learning_rate = 1e-3
        config.train.updates = 7000
    if args.histories:
        config.student = "workdir:runs/recovering"
        config.demonstrations.histories = args.histories
        config.demonstrations.head_start = 20
        config.demonstrations.distractors = (
            *("histories",) * 8,
            *("stubborn", "clumsy", "mistaken", "random"),
        )
        config.demonstrations.judge_examples = 128
        config.train.updates = 3500
    config.train.length_multiple = 128
    config.train.response_multiple = 256
    config.eval.who = ("expert", "random")
    config.checkpoint = dict(every=250, keep=2, best="")
    if args.runlocal:
        config.env.update(ConfigDict(dict(size="small", max_turns=10)))
        config.rollout.context_tokens = 384
        config.demonstrations.sizes, config.demonstrations.sizes_from = ("small",), ()
        config.train.updates = 4
        config.demonstrations.window = 8
        config.demonstrations.judge_examples = 8 if is_teacher else 0
        config.demonstrations.tokens_per_batch = 1024
        config.checkpoint.every = 2
    return config
