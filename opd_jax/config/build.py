"""Makes live objects from settings: agents, judges, sources of experience, compiled updates.

Only here do settings of all sections meet. What they configure takes keyword arguments.
"""

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opd_jax import model
from opd_jax.agent.agent import Agent
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.environments import everywhere, make_envs
from opd_jax.agent.generate import sampling_params
from opd_jax.agent.guide import Guide
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.config.models import LoadedModel, load_judge, student_dtype
from opd_jax.config.references import MODELS, find_model, histories_file, named_sizes
from opd_jax.config.settings import Settings
from opd_jax.envs.base import Env, MakePlayer
from opd_jax.envs.make import (
    EnvSettings,
    benchmark_splits,
    invented,
    make_env,
    own_parse,
    own_rule,
)
from opd_jax.envs.players import make_player
from opd_jax.experience.asides import with_asides
from opd_jax.experience.demonstrations import demonstrate
from opd_jax.experience.histories import HISTORIES, env_of, read_histories
from opd_jax.experience.proposals import proposals
from opd_jax.experience.recorded import beginnings, read_conversations, recorded_panel
from opd_jax.experience.source import Episodes, Play, Played, Source
from opd_jax.experience.stream import Stream, judge_example
from opd_jax.experience.tasks import Panel, TaskOrder, check_alike, find_panels, split_size
from opd_jax.judge.answer import Judge
from opd_jax.judge.labels import actors, repeats
from opd_jax.judge.others import brought_judge, find_judge
from opd_jax.judge.own_turns import played_turns, sampled_turns
from opd_jax.judge.prompt import LABELS, PROPOSAL, read_prompt
from opd_jax.judge.reliability import Measure, reliability_labeller
from opd_jax.judge.verdicts import Labeller, Verdicts, no_judge, teacher_judge
from opd_jax.learner.batch import Batch, pack, responses
from opd_jax.learner.optimizer import make_optimizer
from opd_jax.learner.teacher import Teacher, make_teacher_pass
from opd_jax.learner.train_state import TrainState, placement_of
from opd_jax.learner.train_step import make_train_step
from opd_jax.model import ModelConfig, Params, init_arrays
from opd_jax.model.int8 import int8_specs
from opd_jax.model.lora import Lora, lora_specs, with_adapters
from opd_jax.runtime import bucket, compilation, startup
from opd_jax.runtime.mesh import (
    DECODING,
    TRAINING,
    abstract_mesh,
    make_mesh,
    param_shardings,
    shard_batch,
)
from opd_jax.runtime.signals import signalled


def open_mesh(settings: Settings) -> jax.sharding.Mesh:
    """The run's devices, where its compiled programs are kept from one start to the next."""
    startup.begin()
    compilation.start(settings.program_cache)
    return make_mesh(**settings.mesh.axes)


# --- What is trained ----------------------------------------------------------------------------


def adapters(settings: Settings) -> Lora | None:
    """The adapters to train; None if all parameters are trained."""
    return settings.lora if settings.lora.rank else None


def initial_params(student: LoadedModel, settings: Settings, mesh: jax.sharding.Mesh) -> Params:
    """What is trained, before any update: the student's parameters, or new adapters of them.

    Raises:
      ValueError: the student cannot have such adapters, or they do not divide over the mesh.
    """
    lora = adapters(settings)
    if lora is None:
        return student.params
    specs = lora_specs(student.config, lora)
    init = jax.jit(
        partial(init_arrays, specs, dtype=jnp.dtype(settings.dtype)),
        out_shardings=param_shardings(specs, mesh),
    )
    # 2**32 - 1 is no update's number, so this key is used once.
    return init(jax.random.fold_in(jax.random.key(settings.seed), 2**32 - 1))


def only_frozen(student: LoadedModel, settings: Settings) -> LoadedModel:
    """The student without parameters that are trained: with adapters its own stay, else none."""
    return student if adapters(settings) else dataclasses.replace(student, params={})


def make_sampling_params(trained: Params, student: LoadedModel, settings: Settings) -> Params:
    """The student's parameters for sampling, made from what is trained."""
    lora = adapters(settings)
    return sampling_params(
        with_adapters(student.params if lora else None, trained, lora),
        config=student.config,
        dtype=jnp.dtype(settings.compute_dtype),
        gather=settings.rollout.gather_weights,
        platform=jax.default_backend(),
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of the run."""
    return make_optimizer(settings.optimizer, total_updates=settings.train.updates)


# A state, a batch on the host, and the teacher's hidden states if they are known.
Update = Callable[[TrainState, Batch, jax.Array | None], tuple[TrainState, dict[str, Any]]]


def compile_update(
    settings: Settings, *, student: ModelConfig, teacher: ModelConfig | None, placement: Any
) -> tuple[Callable, Callable | None]:
    """The programs of an update: the train step, and the teacher's pass if the objective needs it.

    `student` and `teacher` are sizes; for `placement` see `make_train_step`.
    """
    train = settings.train
    shared: dict[str, Any] = dict(
        micro_batches=train.micro_batches,
        # Batches of demonstrations are filled by tokens, so their number of rows varies.
        batch_rows=None if settings.shows_players else settings.rollout.batch,
    )
    train_step = make_train_step(
        student=model.functions_of(student, query_chunk=train.query_chunk, remat=train.remat),
        objective=settings.objective,
        optimizer=optimizer(settings),
        placement=placement,
        dtype=jnp.dtype(settings.compute_dtype),
        loss_chunk=train.loss_chunk,
        lora=adapters(settings),
        **shared,
    )
    if teacher is None or not settings.objective.needs_teacher:
        return train_step, None
    return train_step, make_teacher_pass(teacher, query_chunk=train.query_chunk, **shared)


def make_update(
    settings: Settings, student: LoadedModel, teacher: LoadedModel | None, state: TrainState
) -> Update:
    """Binds the models to an update, which returns the new state, and metrics on the host.

    The update donates its state and the hidden states. Without these the teacher reads the batch.
    With `debug.nans` it takes a copy of the state: the same program, so the same bits.
    """
    train_step, teacher_pass = compile_update(
        settings,
        student=student.config,
        teacher=teacher.config if teacher else None,
        placement=placement_of(state),
    )
    copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=placement_of(state))
    base = student.params if adapters(settings) else None

    def update(
        state: TrainState, batch: Batch, hidden: jax.Array | None
    ) -> tuple[TrainState, dict[str, Any]]:
        rows, scorer = shard_batch(batch), None
        if teacher and teacher_pass:
            if hidden is None:
                hidden = teacher_pass(teacher.params, rows.for_teacher())
            scorer = Teacher(hidden, model.head_params(teacher.params))
        taken = copy(state) if settings.debug.nans else state
        state, raw = train_step(taken, scorer, rows.for_student(), base)
        raw = jax.device_get(raw)
        if hidden is not None:
            hidden.delete()  # the caller may refer to it until the next batch is judged
        return state, raw

    return update


def make_pack(settings: Settings, sizes: ModelConfig) -> Callable[..., Batch]:
    """The function that packs episodes, their verdicts [B, K], and other labels of their turns.

    `sizes` are the student's.
    """

    def packed(
        played: Played, verdict: np.ndarray, labels: Mapping[str, np.ndarray] | None = None
    ) -> Batch:
        actor = None
        if settings.learns_teacher_turns:
            actor = actors(played.conversations, max_turns=verdict.shape[1])[played.episode]
        return pack(
            played.rows,
            verdict[played.episode],
            labels={name: label[played.episode] for name, label in (labels or {}).items()},
            length_multiple=played.length_multiple,
            response_multiple=settings.train.response_multiple,
            vocab_size=sizes.vocab_size,
            actor=actor,
            teacher_rows=played.teacher_rows,
        )

    return packed


# --- Who plays and who judges ---------------------------------------------------------------------


def make_agent(
    loaded: LoadedModel, settings: Settings, *, temperature: float | None = None
) -> Agent:
    """A model as an agent; `temperature` replaces the one for training."""
    decoding = settings.rollout
    if temperature is not None:
        decoding = dataclasses.replace(decoding, temperature=temperature)
    return Agent(loaded.config, loaded.tokenizer, loaded.chat, decoding, invented(settings.env.by))


def make_judge(loaded: LoadedModel, settings: Settings) -> Judge:
    """A model as a judge."""
    how = settings.judge
    return Judge(loaded.config, loaded.tokenizer, loaded.chat, how, read_prompt(how.prompt))


def make_labeller(
    settings: Settings,
    teacher: LoadedModel | None,
    student: LoadedModel | None = None,
    envs: Sequence[Env | None] = (),
    between: Callable[[], None] | None = None,
) -> Labeller:
    """What says of turns all that the weight reads: the judge, and other labels.

    Args:
      settings: the whole run's.
      teacher: judges, if nobody else is named.
      student: for `reliability`, gives the chat format of the episodes.
      envs: for `reliability`, environments in which nothing is played meanwhile.
      between: called between batches of questions, and between turns.
    """
    judge = _judge(settings, teacher, between=between)
    reliability = None
    if "reliability" in settings.weight.labels:
        assert student  # as settings are checked
        assert teacher
        weight = settings.weight
        how: dict[str, Any] = dict(samples=weight.teacher_samples, per_label=0, between=between)
        models = settings, student, teacher
        reliability = make_reliability(*models, envs, labels=weight.teacher_labels, **how)

    def label(conversations: Sequence[Conversation], update: int) -> Verdicts:
        said = judge(conversations, update)
        labels = other_labels(settings, conversations)
        if reliability:
            measured = reliability(conversations, update)
            labels["reliability"] = measured.share
            said = said._replace(metrics=said.metrics | dict(measured.metrics))
        return said._replace(labels=labels)

    return label


def other_labels(
    settings: Settings, conversations: Sequence[Conversation]
) -> dict[str, np.ndarray]:
    """What the weight reads of turns besides verdicts, as far as nobody has to be asked."""
    turns, labels = settings.env.max_turns, {}
    if "repeats" in settings.weight.labels:
        labels["repeats"] = repeats(conversations, max_turns=turns)
    if "reliability" in settings.weight.labels:
        labels["reliability"] = np.full((len(conversations), turns), np.nan, np.float32)
    return labels


def _judge(
    settings: Settings,
    teacher: LoadedModel | None,
    *,
    between: Callable[[], None] | None = None,
) -> Labeller:
    """The judge that `judge.by` names, or none if the weight reads no verdict."""
    judge, max_turns, train = settings.judge, settings.env.max_turns, settings.train
    if not settings.weight.reads_verdict:
        return no_judge(max_turns=max_turns)
    how: dict[str, Any] = dict(max_turns=max_turns, between=between)
    if judge.by in ("oracle", "failures"):
        return find_judge(judge.by, {})(**how)
    if judge.by == "record":
        return find_judge(judge.by, {})(rule=own_rule(settings.env.by), **how)
    if judge.by != "teacher":
        options = dict(judge.options)
        return brought_judge(partial(find_judge(judge.by, options), **options), by=judge.by, **how)
    asked = load_judge(settings, teacher)
    assert asked is not None  # as settings are checked
    places = partial(
        responses,
        length_multiple=train.length_multiple,
        response_multiple=train.response_multiple,
    )
    return teacher_judge(
        asked.params,
        by=make_judge(asked, settings),
        seed=settings.seed,
        responses=places if settings.judges_what_it_scores else None,
        **how,
    )


def make_reliability(
    settings: Settings,
    student: LoadedModel,
    teacher: LoadedModel,
    envs: Sequence[Env | None],
    *,
    labels: str,
    samples: int,
    per_label: int,
    between: Callable[[], None] | None = None,
) -> Measure:
    """How reliable the teacher is at the student's turns (`reliability_labeller`).

    `labels` is as `weight.teacher_labels`. With "record" nothing is played in `envs`; as many turns
    are sampled at a time.
    """
    how: dict[str, Any] = dict(agent=teacher_there(student, teacher, settings), between=between)
    rule, take = None, partial(played_turns, envs=envs)
    if labels == "record":
        rule, parse = own_rule(settings.env.by), own_parse(settings.env.by)
        assert parse  # as settings are checked
        take = partial(sampled_turns, parse=parse, rows=len(envs))
    return reliability_labeller(
        partial(take, teacher.params, **how),
        rule=rule,
        max_turns=settings.env.max_turns,
        seed=settings.seed,
        samples=samples,
        per_label=per_label,
    )


def teacher_there(
    student: LoadedModel,
    teacher: LoadedModel,
    settings: Settings,
    *,
    temperature: float | None = None,
) -> Agent:
    """The teacher in the student's place: it reads and writes with the student's chat format."""
    there = make_agent(student, settings, temperature=temperature)
    return dataclasses.replace(there, model=teacher.config)


# --- Tasks and sources of tokens ------------------------------------------------------------------


def panels(settings: Settings) -> dict[str, Panel]:
    """The tasks of the training split, or the file's episodes, and of every evaluated split."""
    wanted = [(split, "eval.splits") for split in settings.eval.splits]
    if settings.eval.every:
        wanted.append((settings.eval.dev, "eval.dev"))
    if source := settings.data.file and settings.data.source:
        recorded = {source: recorded_panel(recorded_file(source))}
        check_alike(recorded)
        return recorded | _panels(settings.env, tuple(wanted), _optional(settings))
    optional = _optional(settings) - {settings.data.split}
    return dict(_panels(settings.env, ((settings.data.split, "data.split"), *wanted), optional))


def eval_panels(settings: Settings) -> dict[str, Panel]:
    """The tasks of the evaluated splits; the training tasks may be missing."""
    evaluated = tuple((split, "eval.splits") for split in settings.eval.splits)
    return dict(_panels(settings.env, evaluated, _optional(settings)))


def _optional(settings: Settings) -> frozenset[str]:
    """A benchmark's splits where all are asked for: some may be missing, as may their mean."""
    splits = frozenset(benchmark_splits(settings.env.by))
    return splits if splits <= set(settings.eval.splits) else frozenset()


@cache  # a comparison asks once per run, and some environments read thousands of files
def _panels(
    env: EnvSettings, splits: tuple[tuple[str, str], ...], optional: frozenset[str]
) -> dict[str, Panel]:
    return find_panels(make_env(env), dict(splits), optional=optional)


def recorded_file(source: str) -> Path:
    """The file that `data.source` names."""
    return bucket.place(source.partition(":")[2], name="data.source")


def check_named(settings: Settings, models: Collection[str] = MODELS) -> None:
    """Checks the players and the `models` that settings name, before anything is loaded.

    Raises:
      ValueError: a folder is not there, a model has too few positions for a context or the judge's
        answers, the environment has no such player, or `attention` is for another platform.
    """
    model.attention_on(jax.default_backend(), settings.attention)
    judge, found = settings.judge, named_sizes(settings, models)
    asked = {"teacher": (settings.teacher, found["teacher"])} if "teacher" in found else {}
    if settings.judge_model and "teacher" in models:
        sizes = find_model(settings.judge_model, field="judge.model").sizes
        asked = {"judge.model": (settings.judge_model, sizes)}
    for who, (name, sizes) in asked.items():
        answer = judge.max_new_tokens if judge.decode == "generate" else 0
        if answer >= sizes.max_positions:
            raise ValueError(
                f"`judge.max_new_tokens` = {answer} leaves no room for a question within the "
                f"{sizes.max_positions} positions of `{who}` = {name!r}; lower it"
            )
    for who, sizes in found.items():
        if settings.rollout.context_tokens > sizes.max_positions:
            raise ValueError(
                f"`rollout.context_tokens` = {settings.rollout.context_tokens} exceeds the "
                f"{sizes.max_positions} positions of `{who}` = {getattr(settings, who)!r}; lower it"
            )
    context, reader = settings.rollout.context_tokens, found.get("teacher")
    told = settings.teacher_context.tokens if settings.teacher_context.by else 0
    if reader and context + told > reader.max_positions:
        raise ValueError(
            f"`rollout.context_tokens` = {context} and `teacher_context.tokens` = {told} exceed "
            f"the {reader.max_positions} positions of `teacher` = {settings.teacher!r}; lower them"
        )
    check_players(settings)


def check_shapes(settings: Settings, models: Collection[str] = MODELS) -> None:
    """Checks that `models` and adapters divide over the mesh, before weights are read for minutes.

    Raises:
      ValueError: a parameter does not divide, or the student cannot have such adapters.
    """
    mesh, found = abstract_mesh(**settings.mesh.axes), named_sizes(settings, models)
    rows = min(sizes.vocab_size for sizes in found.values())
    for who, sizes in found.items():
        sizes = dataclasses.replace(sizes, vocab_size=rows)
        dtype = settings.teacher_dtype if who == "teacher" else student_dtype(settings)
        specs = int8_specs(sizes) if dtype == "int8" else model.param_specs(sizes)
        lora = adapters(settings) if who == "student" else None
        try:
            for rules in (TRAINING, DECODING):
                param_shardings(specs, mesh, rules=rules)
                param_shardings(lora_specs(sizes, lora) if lora else {}, mesh, rules=rules)
        except ValueError as error:
            raise ValueError(f"`{who}` = {getattr(settings, who)!r}: {error}") from None


def check_players(settings: Settings) -> None:
    """Checks that every player that settings name can be made; errors as in `make_player`."""
    wanted = [("eval.who", who) for who in settings.eval.who if who not in ("before", "teacher")]
    habits: Any = {}
    if settings.data.source == "expert":
        wanted.append(("data.source", "expert"))
    if settings.shows_players and (shown := settings.demonstrations):
        habits = shown.habits
        wanted.append(("demonstrations.player", shown.player))
        others = [name for name in shown.distractors if name != HISTORIES]
        wanted += [("demonstrations.distractors", name) for name in others]
        wanted += [("demonstrations.proposers", name) for name in shown.proposers]
    for field, name in wanted:
        make_player(name, settings.env, field=field, habits=habits)


def make_source(
    settings: Settings,
    student: LoadedModel,
    teacher: LoadedModel | None,
    *,
    tasks: Panel,
    cursor: Sequence[int] = (0, 0),
    between: Callable[[], None] | None = None,
) -> Source:
    """The source named by `data.source`.

    Args:
      settings: the whole run's.
      student: plays on-policy. Otherwise it only gives the tokenizer and the chat format.
      teacher: plays if `data.source` is "teacher", and where it guides the student.
      tasks: the tasks of `data.split`, or the file's episodes.
      cursor: where to start, an earlier `Source.cursor`; by default at the beginning.
      between: called between turns, in all processes; what it raises ends the playing.
    """
    if settings.shows_players:
        return _demonstrations(settings, student, cursor=cursor)
    how, source = settings.rollout, settings.data.source
    player = teacher if source == "teacher" and teacher else student
    agent = make_agent(player, settings)
    found = _recorded(settings, agent) if settings.data.file else []
    nobody_plays = found and not settings.data.on_policy
    envs = [] if nobody_plays else make_envs(partial(make_env, settings.env), how.at_once)
    if nobody_plays:
        play = _take(found)
    elif source == "expert":
        play = _play_expert(settings, agent, envs, between)
    else:
        play = _play_model(settings, player, teacher, agent, envs, between, found)
    return Episodes(
        play,
        envs=envs,
        tasks=TaskOrder(
            split=settings.data.split,
            size=len(found) or tasks.size,
            seed=settings.seed,
            count=how.batch // how.per_task,
            per_task=how.per_task,
        ),
        agent=agent,
        length_multiple=settings.train.length_multiple,
        response_multiple=settings.train.response_multiple,
        micro_batches=settings.train.micro_batches,
        cursor=cursor,
        retell=make_retell(settings, student.chat),
        only_success=settings.data.only_success and not settings.data.file,
    )


def make_told(
    settings: Settings, chat: ChatFormat
) -> Callable[[Conversation], Sequence[str]] | None:
    """The function that says what the teacher was told in an episode; None if it never is."""
    retell, asides = make_retell(settings, chat), settings.teacher_context.asides()
    if retell is None or asides is None:
        return None
    return lambda c: () if retell(c) is c else asides(c)


def make_retell(
    settings: Settings, chat: ChatFormat
) -> Callable[[Conversation], Conversation] | None:
    """The function that gives an episode as the teacher reads it; None: as it is."""
    asides, most = settings.teacher_context.asides(), settings.teacher_context.tokens
    if asides is None:
        return None
    return lambda c: c if c.broken else with_asides(c, asides(c), chat=chat, most=most)


def _recorded(settings: Settings, agent: Agent) -> list[Conversation]:
    """The episodes of the file that `data.source` names."""
    file = recorded_file(settings.data.source)
    found = read_conversations(
        file,
        agent=agent,
        only_success=settings.data.only_success,
        max_turns=settings.env.max_turns,
    )
    if settings.data.on_policy and not all(c.split and c.index >= 0 for c in found):
        raise ValueError(
            f"`data.source`: an episode of `{file}` does not say in `task` which `split` and "
            "`index` of the environment it is of, so it cannot be played again"
        )
    return found


def _take(found: Sequence[Conversation]) -> Play:
    """Nobody plays: the episodes are there."""
    return lambda state, tasks, positions: [found[index] for _, index in tasks]


def _play_model(
    settings: Settings,
    player: LoadedModel,
    teacher: LoadedModel | None,
    agent: Agent,
    envs: Sequence[Env | None],
    between: Callable[[], None] | None,
    found: Sequence[Conversation],
) -> Play:
    """The student being trained plays, from within the `found` episodes if any; or the teacher.

    The teacher may also take turns of the student's episodes.
    """
    on_policy = settings.data.on_policy

    def play(
        state: TrainState, tasks: Sequence[tuple[str, int]], positions: Positions
    ) -> list[Conversation]:
        params = player.params
        if on_policy:
            params = make_sampling_params(state.params, player, settings)
        update = int(state.step)
        keys = row_keys(jax.random.fold_in(state.rng, state.step), range(len(tasks)))
        depth, replay, last = settings.rollout.depth(update), None, 0
        if settings.rollout.depth_from == "back":
            depth, last = 0, depth
        if found:
            begun = [found[index] for _, index in tasks]
            seed = f"{settings.seed}/prefixes/{update}"
            tasks, replay = beginnings(begun, seed=seed, last=last)
        return rollout(
            params,
            keys,
            agent=agent,
            envs=envs,
            tasks=tasks,
            depth=depth,
            replay=replay,
            guide=_guide(settings, player, teacher, update),
            cut_repeated_failure=settings.rollout.cut_repeated_failure,
            between=between,
            positions=positions,
        )

    return play


def _guide(
    settings: Settings, student: LoadedModel, teacher: LoadedModel | None, update: int
) -> Guide | None:
    """The teacher as it takes turns of the student's episodes; None if it takes none."""
    how = settings.rollout
    share = how.share_of_teacher(update, updates=settings.train.updates)
    if teacher is None or not (share or how.take_over_after):
        return None
    return Guide(
        teacher.params,
        teacher_there(student, teacher, settings),
        share=share,
        after=how.take_over_after,
        learnt=settings.learns_teacher_turns,
    )


def _play_expert(
    settings: Settings,
    agent: Agent,
    envs: Sequence[Env | None],
    between: Callable[[], None] | None,
) -> Play:
    """The environment's expert plays, undisturbed; it needs no parameters."""
    expert = partial(make_player, "expert", settings.env, field="data.source", habits={})

    def episode(env: Env, task: tuple[str, int]) -> Conversation:
        split, index = task
        return demonstrate(
            env,
            split,
            index,
            player=expert(),
            distractor=None,
            distraction=0.0,
            rng=random.Random(f"{settings.seed}/expert/{split}/{index}"),
            chat=agent.chat,
            context_tokens=agent.decoding.context_tokens,
            stopping=signalled,
        )

    def play(
        _: TrainState, tasks: Sequence[tuple[str, int]], positions: Positions
    ) -> list[Conversation]:
        played = everywhere(episode, envs, tasks)
        if between:
            between()  # before an episode that a signal has cut short is used
        return played

    return play


def make_demonstrator(settings: Settings, *, chat: ChatFormat):
    """The function that demonstrates episode number n; it depends on n alone.

    Room sizes: at first only `sizes[0]`; from episode `sizes_from[n]` on, one more. Small rooms
    have short texts, and what is learnt in them carries over to large ones. Each episode draws its
    distraction between 0 and `distraction`, so the model learns to go on after much disorder and
    after little. An episode that draws `HISTORIES` for a distractor is one of a model, up to some
    turn.
    """
    shown = settings.demonstrations
    assert shown is not None  # as settings are checked
    envs = [make_env(settings.env, size=size) for size in shown.sizes]
    player = partial(make_player, env=settings.env, habits=shown.habits)
    split = settings.data.split
    histories = read_histories(histories_file(settings), split=split) if shown.histories else []

    def episode(number: int) -> Conversation:
        rng = random.Random(f"{settings.seed}/episode/{number}")
        env = rng.choice(envs[: 1 + sum(number >= start for start in shown.sizes_from)])
        distraction = shown.distraction * rng.random()
        behind = rng.random() < 0.5 if shown.head_start else False
        head_start = rng.randint(1, shown.head_start) if behind else 0
        name = rng.choice(shown.distractors) if distraction or head_start else None
        index = number % split_size(env, split, field="data.split")
        distractor: MakePlayer | None = None
        if name == HISTORIES:
            history = rng.choice(histories)
            index = history.index
            env = env_of(envs, split, index, task_id=history.task_id)
            distractor, distraction = history.player, 0.0
            head_start = rng.randint(1, min(len(history.responses) - 1, shown.head_start))
        elif name:
            distractor = player(name, field="demonstrations.distractors")
        return demonstrate(
            env,
            split,
            index,
            player=player(shown.player, field="demonstrations.player"),
            distractor=distractor,
            distraction=distraction,
            head_start=head_start,
            rng=rng,
            chat=chat,
            context_tokens=settings.rollout.context_tokens,
        )

    return episode


def make_proposer(settings: Settings) -> Callable[..., list[tuple[str, str]]]:
    """The function that proposes other responses at a turn, for judge example n (`proposals`)."""
    shown = settings.demonstrations
    assert shown is not None  # as settings are checked
    envs = [make_env(settings.env, size=size) for size in shown.sizes]
    if shown.proposals and not hasattr(envs[0], "label"):
        raise ValueError(
            f"`demonstrations.proposals` = {shown.proposals}: expected an environment that labels "
            f"a response without acting on it (`envs.base.Labels`); {settings.env.by} does not"
        )
    player = partial(
        make_player, env=settings.env, habits=shown.habits, field="demonstrations.proposers"
    )
    players = [player(name) for name in shown.proposers]

    def propose(number: int, conversation: Conversation, index: int) -> list[tuple[str, str]]:
        if not shown.proposals:
            return []
        where = conversation.split, conversation.index
        rng = random.Random(f"{settings.seed}/proposals/{number}/{where}/{index}")
        assert conversation.task is not None  # it was demonstrated
        env: Any = env_of(envs, *where, task_id=conversation.task.id)
        return proposals(env, conversation, index, players=players, count=shown.proposals, rng=rng)

    return propose


def _demonstrations(settings: Settings, student: LoadedModel, *, cursor: Sequence[int]) -> Stream:
    """Supervised data that builds a model: players' demonstrations, and judge examples."""
    shown = settings.demonstrations
    assert shown is not None  # as settings are checked
    asking = [
        dataclasses.replace(
            make_judge(student, settings),
            settings=dataclasses.replace(settings.judge, context=context),
        )
        for context in shown.judge_contexts
    ]

    chat, propose = student.chat, make_proposer(settings)

    def make_example(number: int, conversation: Conversation, index: int) -> Conversation:
        # Labels take turns. The context changes after each round of labels, so it gets them all.
        by, turn = asking[number // len(LABELS) % len(asking)], conversation.turns[index]
        asked = [
            ([*by.prefix(conversation, index), *by.question(conversation, index)], turn.oracle)
        ]
        for response, label in propose(number, conversation, index):
            text = PROPOSAL.format(turn=dataclasses.replace(turn, response=response))
            asked.append((chat.follow(text, ended=True), label))
        return judge_example(
            (question, [*chat.response(label), chat.stop_ids[0]]) for question, label in asked
        )

    return Stream(
        shown,
        make_episode=make_demonstrator(settings, chat=student.chat),
        make_example=make_example if shown.judge_examples else None,
        seed=settings.seed,
        length_multiple=settings.train.length_multiple,
        rows_multiple=settings.train.micro_batches * settings.mesh.batch_shards,
        cursor=cursor,
    )
