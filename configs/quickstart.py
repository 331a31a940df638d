"""SAGE-OPD on the embedded household task: the whole method on a laptop's CPU.

    ./launch/local.sh --config=quickstart

The embedded student (`opd_jax/pair/student`) plays training tasks, the embedded teacher judges its
turns and scores its tokens, and the student is evaluated before and after on scenes it was trained
in (`valid_seen`) and on scenes never trained in (`valid_unseen`). The household is this project's
own environment; its scores are not ALFWorld scores.

Arguments, after a colon, separated by commas:
  method=NAME           sage, opd, sft, or another of configs/methods.py; sft imitates the teacher's
                        own episodes, or with --config.data.source=expert the expert's
  ablate=NAME           sage with one factor off: intervention, confidence or normalizer
  compare               sft, opd, sage and its ablation over three seeds, one table; two hours
  table=STAGE           a stage of the large table, A, B, C-long or C-small (configs/stages.py)
  runlocal              shrunk to about a minute, for a smoke test
"""

from ml_collections import ConfigDict

from opd_jax.config import parse_arg
from opd_jax.configs import methods, stages


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one run, or of the comparison."""
    args = parse_arg(arg, runlocal=False, compare=False, table="", method="sage", ablate="none")
    config = ConfigDict()
    config.seed = 0  # seeds everything that a run draws
    config.dtype = "float32"  # dtype of the student's parameters and its optimizer
    config.compute_dtype = "float32"  # dtype of the student's arithmetic
    config.teacher_dtype = "float32"  # or bfloat16; or int8: its projections rounded to 8 bits
    config.attention = "auto"  # kernels on a TPU; or pallas (TPU), cudnn (GPU), plain (any)
    # Compiled programs are kept in this folder, or in gs://BUCKET/DIR; "": nowhere.
    config.program_cache = "~/.cache/opd_jax/programs"
    config.wandb = ""  # project of Weights & Biases to copy the metrics to; "": none
    config.mesh = dict(
        data=1,  # shards the batch, replicates parameters
        fsdp=1,  # shards the batch and the parameters
        decode=1,  # of the fsdp devices so many are like tensor in sampling and judging
        tensor=1,  # shards heads, feed-forward width and vocabulary
    )
    # A model folder; embedded:NAME; or another run's student, workdir:DIR, @120 or @best behind it.
    config.student = "embedded:student"  # or new: random, with the sizes of `new_model`
    config.teacher = "embedded:teacher"  # or "" for none

    # With a rank above 0 the student's weights are frozen, in compute_dtype. Low-rank adapters, in
    # dtype, are trained instead.
    config.lora = dict(
        rank=0,  # rank of the adapters; 0: train all parameters
        alpha=32.0,  # the adapters' product is scaled by alpha / rank
        targets=("q", "k", "v", "o", "gate", "up", "down"),  # projections with adapters
        int8=False,  # round the frozen projections to 8 bits
    )

    config.env = dict(
        by="household",  # alfworld, scienceworld, searchqa, factbookqa, or module:Class
        size="medium",  # rooms of 9 to 13 receptacles; large: ALFWorld's size, twice the time
        max_turns=20,  # an episode ends after this many
        show_admissible=0,  # admissible actions that an observation lists; 0: none
        workers=False,  # run each environment in a process of its own
        start_timeout_s=60.0,  # seconds for a worker's start and each of its resets
        step_timeout_s=10.0,  # seconds for a worker's step
    )

    # What the teacher reads and the student does not (docs/teacher_context.md).
    config.teacher_context = dict(
        # "": nothing; record: the environment's; solved: a task of the same type that was solved,
        # from `file`; or module:function.
        by="",
        tokens=512,  # most tokens that it adds to a conversation
        file="",  # of `solved`: an episode file (docs/episodes.md)
    )

    config.data = dict(
        # Who plays: on_policy is the student; or teacher; expert; players (household_pair.py only).
        # episodes:FILE is learnt from; from prefixes:FILE the student plays on (docs/episodes.md).
        source="on_policy",
        split="train",  # the split of the training tasks
        only_success=False,  # learn only from episodes that succeeded
    )

    config.rollout = dict(
        batch=16,  # episodes of an update
        rows=0,  # most of them at a time; 0: all. A row whose episode is over takes the next
        temperature=1.0,  # sampling temperature; 0: greedy
        top_k=0,  # sample from the k most likely tokens; 0: from all
        top_p=1.0,  # sample from the most likely tokens with this mass; 1: from all
        turn_tokens=32,  # most tokens of a response
        context_tokens=640,  # most tokens of a context, observations included
        extend_widths=(16,),  # new observations are read in pieces of these widths, ascending
        prefill_rows=4,  # rows of each device that read at a time
        chunk=8,  # tokens sampled between looks which responses have ended
        join_after=0,  # chunks that a row sits out while its environment answers
        int8_cache=False,  # keys and values in 8 bits: half of bfloat16's bytes for a token to read
        gather_weights=True,  # a whole copy for every decode × tensor devices: faster, more memory
        history_turns=0,  # most earlier turns in a context; 0: all
        per_task=1,  # episodes of each task; a batch has batch / per_task tasks
        depth_start=0,  # turns that an episode may have in the first update; 0: no limit
        depth_every=1,  # updates until it may have one more
        depth_from="front",  # or back: of a recorded episode's turns the student plays the last
        teacher_share=0.0,  # probability that a turn is the teacher's, in the first update
        teacher_share_for=0.8,  # it falls to 0 in this share of the updates; 0: it stays
        take_over_after=0,  # failed turns in a row, then the teacher plays the rest; 0: never
        cut_repeated_failure=False,  # end it where a failed turn repeats the action before it
    )

    # The raw weight of a token (docs/weights.md). A method reads the fields that it takes.
    config.weight = dict(
        # sage; uniform: plain OPD; intervention or confidence: one factor of sage; reliability,
        # entropy_aware, sod, iw_opd, return_to_go; or module:function.
        by="sage",
        skip_weight=0.0,  # weight of SKIP turns
        weak_weight=0.5,  # weight of WEAK turns; STRONG has 1
        fail_weight=1.0,  # weight of turns that the environment rejected
        confidence_temperature=1.0,  # temperature of the teacher's softmax, in confidence only
        entropy_bonus=1.0,  # entropy_aware: added where the teacher is uncertain
        entropy_threshold=0.8,  # entropy_aware: it is uncertain above this entropy, nats
        most_weight=1.2,  # sod: most weight of a turn
        discrepancy_eps=1e-6,  # sod: added to a turn's discrepancy, nats
        early_bonus=0.5,  # iw_opd: added to a row's first tokens, less to later ones
        discount=0.5,  # return_to_go: a later turn counts so much less
        teacher_samples=1,  # reliability: own turns that the teacher takes at each turn
        teacher_labels="oracle",  # who labels them: the environment; or record: its rule
    )

    config.objective = dict(
        divergence="reverse_kl",  # or forward_kl, jsd, sampled_reverse_kl, cross_entropy
        beta=0.5,  # the teacher's share in jsd
        teacher_turns="",  # divergence on turns that the teacher plays; "": they are not learnt
        normalize="all_tokens",  # tokens with mean weight 1; or active_tokens; or none
        scope="batch",  # one normalizer for the batch; or trajectory: one for each
        eps=1e-8,  # least sum of weights to divide by
        max_z=0.0,  # bound on the normalizer; 0: none
    )

    config.judge = dict(
        # teacher; oracle: the environment's labels; record: its rule over the record; failures:
        # nobody; or module:function.
        by="teacher",
        decode="constrained",  # score the three labels; or generate the answer's text
        model="",  # another model that is asked, in the teacher's dtype; "": the teacher
        prompt="",  # a file with another question, its words and their verdicts; "": the paper's
        context="table9",  # what the question shows; or +feedback, history, record
        admissible_shown=12,  # most admissible actions in a question
        batch=16,  # most questions at a time, each about another conversation
        extend_widths=(16, 64),  # questions are read in pieces of these widths, ascending
        prefill_rows=8,  # rows of each device that read at a time
        max_new_tokens=8,  # longest generated answer
        agreement_every=20,  # updates between checks against the other decoding; 0: never
        agreement_turns=64,  # most turns of such a check
    )

    config.optimizer = dict(
        learning_rate=1e-3,  # peak of the schedule
        schedule="linear",  # after the warm-up, to 0 at the last update; or cosine, constant
        warmup_updates=5,  # the rate rises linearly for this many
        weight_decay=0.0,  # AdamW's; norms and biases are spared
        b1=0.9,  # decay of the first moment
        b2=0.98,  # decay of the second moment
        eps=1e-8,  # added to the root of the second moment
        clip_norm=1.0,  # bound on the gradient's global norm; 0: none
    )

    config.train = dict(
        updates=80,  # optimizer steps of the run
        micro_batches=1,  # equal parts of a batch; more parts need less memory
        query_chunk=128,  # queries attended at a time
        loss_chunk=1024,  # positions whose logits exist at a time
        remat="none",  # or projections, layers: keep less for the backward pass, compute it again
        length_multiple=320,  # rows are padded to a multiple; coarse: each length compiles once
        response_multiple=192,  # student tokens of a row likewise; coarse for the same reason
    )

    config.eval = dict(
        who=("before", "teacher", "expert", "random"),  # evaluated besides the trained student
        splits=("valid_seen", "valid_unseen"),  # the environment's splits to play
        tasks=200,  # most tasks of a split
        batch=100,  # episodes played at a time
        temperature=0.4,  # sampling temperature of models
        seed=0,  # seed of their sampling
        judge=False,  # also measure the judge on the turns that a model plays
        every=0,  # updates between evaluations while training; 0: none
        dev="dev",  # the split of their tasks, which no table reports
        dev_tasks=50,  # most tasks of it
    )
    config.checkpoint = dict(
        every=20,  # updates between checkpoints
        keep=2,  # how many of the newest checkpoints stay
        best="",  # and that of the best success, score, turns, repeated or failed on dev; "": none
    )
    config.episodes = dict(
        every=20,  # episodes to look at of update 1 and of each 20th, in episodes/; 0: none
        count=4,  # episodes of the batch in a file
        top=True,  # also the teacher's five likeliest tokens at each place
    )
    config.compare = dict(
        methods=(),  # names of variants; () for a single run
        seeds=(),  # every method runs once with each
        variants=methods.METHODS,  # method name to the fields that it sets
        results="",  # folder of the result files, one a cell; "": `results` in the workdir
    )
    config.debug = dict(
        nans=False,  # name the token at which a loss or gradient stops being finite; two states
    )

    method = methods.name_of(args.method, args.ablate)
    config.update(ConfigDict(methods.METHODS[method]))

    if (args.compare or args.table) and (method != "sage" or (args.compare and args.table)):
        raise ValueError(
            "config arguments `compare` and `table` run several methods: give one of them, without "
            "`method` and `ablate`"
        )
    if args.table:
        stages.set_stage(config, args.table)
    if args.compare:
        config.compare.methods = methods.ABLATION
        config.compare.seeds = (0, 1, 2)
        config.eval.tasks = 400
    if args.runlocal:
        config.rollout.batch = 8
        config.env.size = "small"
        config.env.max_turns = 10
        config.rollout.context_tokens = 384
        config.train.updates = 4
        config.eval.tasks = config.eval.dev_tasks = 8
        config.eval.every = min(config.eval.every, config.train.updates)
        config.compare.results = ""
        config.eval.batch = 8
        config.judge.batch = 32
        config.checkpoint.every = 2
        config.episodes.every = 4
    return config
