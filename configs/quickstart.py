"""SAGE-OPD on the embedded household task: the whole method on a laptop's CPU.

    ./launch/local.sh --config=quickstart

The embedded student (`opd_jax/pair/student`) plays training tasks, the embedded teacher judges its
turns and scores its tokens, and the student is evaluated before and after on scenes it was trained
in (`valid_seen`) and on scenes never trained in (`valid_unseen`). The household is this project's
own environment; its scores are not ALFWorld scores.

Arguments, after a colon, separated by commas:
  method=sage|opd|sft   the objective; sft imitates the teacher's own episodes, or
                        with --config.data.source=expert the expert's
  ablate=NAME           sage with one factor off: intervention, confidence or normalizer
  compare               every method and ablation over three seeds, one table; about two hours
  runlocal              shrunk to about a minute, for a smoke test
"""

from ml_collections import ConfigDict

from opd_jax.config import parse_arg

# Every field in which methods differ, as in SAGE-OPD.
_SAGE: dict[str, dict] = dict(
    objective=dict(
        divergence="reverse_kl",
        intervention=True,
        confidence=True,
        normalize="all_tokens",
        entropy_bonus=0.0,
    ),
    data=dict(source="on_policy"),
    rollout=dict(per_task=1, depth_start=0),
)


def variant(**changes: dict) -> dict:
    """A method: complete, so that it is the same whatever it is laid over."""
    return {group: _SAGE[group] | changes.get(group, {}) for group in _SAGE}


# Plain OPD is weight 1 everywhere; an ablation sets one factor of z · i · c to one.
OPD = dict(intervention=False, confidence=False, normalize="none")
VARIANTS = {
    "sft": variant(objective=OPD | dict(divergence="cross_entropy"), data=dict(source="teacher")),
    "opd": variant(objective=OPD),
    "sage": variant(),
    "sage_without_intervention": variant(objective=dict(intervention=False)),
    "sage_without_confidence": variant(objective=dict(confidence=False)),
    "sage_without_normalizer": variant(objective=dict(normalize="none")),
}


def variant_name(method: str, ablate: str) -> str:
    """The variant that the arguments of a config name."""
    return method if ablate == "none" else f"{method}_without_{ablate}"


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one run, or of the comparison."""
    args = parse_arg(arg, runlocal=False, compare=False, method="sage", ablate="none")
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"  # of the student's parameters, and of its optimizer
    config.compute_dtype = "float32"  # that the student computes in
    config.teacher_dtype = "float32"  # or bfloat16; or int8, its projections rounded to 8 bits
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.student = "embedded:student"
    config.teacher = "embedded:teacher"

    # With a rank the student's weights are frozen, in compute_dtype, and what is trained, in dtype,
    # are low-rank adapters beside them.
    config.lora = dict(
        rank=0,  # 0: all parameters are trained
        alpha=32.0,  # what adapters add is scaled by alpha / rank
        targets=("q", "k", "v", "o", "gate", "up", "down"),
        int8=False,  # the frozen projections rounded to 8 bits
    )

    # Rooms of 9 to 13 receptacles; `large` is ALFWorld's size and takes about twice the time.
    config.env = dict(
        by="household",
        size="medium",
        max_turns=20,
        show_admissible=0,
        workers=False,  # each environment in a process of its own
        start_timeout_s=60.0,
        step_timeout_s=10.0,
    )

    # Who plays: on_policy is the student; teacher, expert; players are of household_pair.py.
    config.data = dict(source="on_policy", split="train")

    config.rollout = dict(
        batch=16,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        turn_tokens=32,
        context_tokens=640,
        cache_step=640,  # slots by which the cache of a context grows
        extend_widths=(16,),
        chunk=32,
        gather_weights=True,  # sample with weights whole along mesh.fsdp: faster, more memory
        history_turns=0,  # earlier turns in a context, at most; 0: all
        per_task=1,  # episodes of each task; a batch then has fewer tasks
        depth_start=0,  # turns that episodes are cut to in the first update; 0: never cut
        depth_every=1,  # updates until they may have one more
    )

    config.objective = dict(
        divergence="reverse_kl",  # forward_kl, jsd, sampled_reverse_kl, cross_entropy
        beta=0.5,  # the teacher's share in jsd
        intervention=True,
        confidence=True,
        confidence_temperature=1.0,
        weak_weight=0.5,
        entropy_bonus=0.0,  # more weight for tokens at which the teacher is uncertain; 0: none
        entropy_threshold=0.8,  # nats
        normalize="all_tokens",  # active_tokens, none
        scope="batch",  # trajectory
        eps=1e-8,
        max_z=0.0,  # 0: no bound
    )

    config.judge = dict(
        decode="constrained",  # generate
        context="table9",  # +feedback, history
        admissible_shown=12,
        batch=128,
        length_multiple=64,
        max_new_tokens=8,
        agreement_every=20,  # updates; 0: never
    )

    config.optimizer = dict(
        learning_rate=1e-3,
        schedule="linear",
        warmup_updates=5,
        weight_decay=0.0,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        clip_norm=1.0,
    )

    config.train = dict(
        updates=80,
        micro_batches=1,
        query_chunk=128,
        loss_chunk=1024,
        remat="none",  # projections, layers: keep less for the backward pass, compute it again
        length_multiple=320,  # coarse, since a shape costs more to compile than to pad
        response_multiple=128,
    )

    config.eval = dict(
        who=("before", "teacher", "expert", "random"),
        splits=("valid_seen", "valid_unseen"),
        tasks=200,
        batch=100,
        temperature=0.4,
        seed=0,
        judge=False,  # also measure the judge on the turns that a model plays
    )
    config.checkpoint = dict(every=20, keep=2)
    config.compare = dict(methods=(), seeds=(), variants=VARIANTS)

    method = variant_name(args.method, args.ablate)
    if method not in VARIANTS:
        raise ValueError(
            f"config argument `method={args.method},ablate={args.ablate}`: expected method sage, "
            "opd or sft, and ablate intervention, confidence or normalizer with sage only"
        )
    config.update(ConfigDict(VARIANTS[method]))

    if args.compare and method != "sage":
        raise ValueError(
            "config argument `compare` runs every method: give it without `method` and `ablate`"
        )
    if args.compare:
        config.compare.methods = tuple(VARIANTS)
        config.compare.seeds = (0, 1, 2)
        config.eval.tasks = 400
    if args.runlocal:
        config.rollout.batch = 8
        config.env.size = "small"
        config.env.max_turns = 10
        config.rollout.context_tokens = 384
        config.train.updates = 4
        config.eval.tasks = 8
        config.eval.batch = 8
        config.judge.batch = 32
        config.checkpoint.every = 2
    return config
