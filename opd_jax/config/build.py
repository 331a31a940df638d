"""From settings to live objects: models, agents, judges, sources of experience, compiled updates.

The only room in which settings meet what they configure. Everything below takes keyword arguments.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
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
from opd_jax.agent.generate import sampling_params
from opd_jax.agent.rollout import make_envs, rollout, row_keys
from opd_jax.config.models import LoadedModel
from opd_jax.config.settings import Settings
from opd_jax.envs.base import Env
from opd_jax.envs.make import EnvSettings, make_env
from opd_jax.envs.players import make_player
from opd_jax.experience.demonstrations import demonstrate
from opd_jax.experience.source import Episodes, Play, Played, Source, TaskOrder, play_expert
from opd_jax.experience.stream import Stream, judge_example
from opd_jax.experience.tasks import Panel, find_panels, split_size
from opd_jax.judge.answer import LABELS
from opd_jax.judge.labellers import Labeller, no_judge, teacher_judge
from opd_jax.judge.prompt import Judge
from opd_jax.learner.batch import Batch, pack
from opd_jax.learner.optimizer import make_optimizer
from opd_jax.learner.teacher import Teacher, make_teacher_pass
from opd_jax.learner.train_state import TrainState, placement_of
from opd_jax.learner.train_step import make_train_step
from opd_jax.model import ModelConfig, Params, init_arrays
from opd_jax.model.lora import Lora, lora_specs, with_adapters
from opd_jax.report.log import UpdateLog
from opd_jax.report.update import unmeasured
from opd_jax.runtime.mesh import param_shardings, shard_batch

# --- What is trained ----------------------------------------------------------------------------


def adapters(settings: Settings) -> Lora | None:
    """The adapters that are trained; None where all parameters are."""
    return settings.lora if settings.lora.rank else None


def initial_params(student: LoadedModel, settings: Settings, mesh: jax.sharding.Mesh) -> Params:
    """What is trained, before any update: the student's parameters, or adapters for them.

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
    # Folded with a number that no update has.
    return init(jax.random.fold_in(jax.random.key(settings.seed), 2**32 - 1))


def make_sampling_params(trained: Params, student: LoadedModel, settings: Settings) -> Params:
    """The student's parameters as it samples with them, from those being trained."""
    lora = adapters(settings)
    return sampling_params(
        with_adapters(student.params if lora else None, trained, lora),
        config=student.config,
        dtype=jnp.dtype(settings.compute_dtype),
        gather=settings.rollout.gather_weights,
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of the run."""
    return make_optimizer(settings.optimizer, total_updates=settings.train.updates)


Update = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def compile_update(
    settings: Settings, *, student: ModelConfig, teacher: ModelConfig | None, placement: Any
) -> tuple[Callable, Callable | None]:
    """The programs of an update: the train step, and the teacher's pass if the objective has one.

    Args:
      settings: of the run.
      student: its sizes.
      teacher: its sizes; None without one.
      placement: see `make_train_step`.
    """
    train = settings.train
    how: dict[str, Any] = dict(
        micro_batches=train.micro_batches,
        # A batch of demonstrations has however many rows fit.
        batch_rows=None if settings.shows_players else settings.rollout.batch,
        query_chunk=train.query_chunk,
    )
    train_step = make_train_step(
        student=student,
        objective=settings.objective,
        optimizer=optimizer(settings),
        placement=placement,
        dtype=jnp.dtype(settings.compute_dtype),
        loss_chunk=train.loss_chunk,
        remat=train.remat,
        lora=adapters(settings),
        **how,
    )
    if teacher is None or not settings.objective.needs_teacher:
        return train_step, None
    return train_step, make_teacher_pass(teacher, **how)


def make_update(
    settings: Settings, student: LoadedModel, teacher: LoadedModel | None, state: TrainState
) -> Update:
    """One update, from a batch on the host to metrics on the host; donates its state."""
    train_step, teacher_pass = compile_update(
        settings,
        student=student.config,
        teacher=teacher.config if teacher else None,
        placement=placement_of(state),
    )
    base = student.params if adapters(settings) else None

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        rows, said = shard_batch(batch), None
        if teacher and teacher_pass:
            said = Teacher(teacher_pass(teacher.params, rows), model.head_params(teacher.params))
        state, raw = train_step(state, said, rows, base)
        return state, jax.device_get(raw)

    return update


def make_pack(settings: Settings, sizes: ModelConfig) -> Callable[[Played, np.ndarray], Batch]:
    """The function from episodes and their verdicts [B, K] to the batch of an update.

    Args:
      settings: of the run.
      sizes: of the student, who reads the tokens.
    """

    def packed(played: Played, verdict: np.ndarray) -> Batch:
        return pack(
            played.rows,
            verdict[played.episode],
            length_multiple=played.length_multiple,
            response_multiple=settings.train.response_multiple,
            vocab_size=sizes.vocab_size,
        )

    return packed


def make_log(settings: Settings, workdir: Path, *, done: int) -> UpdateLog:
    """The log of a run that resumes after `done` updates."""
    on_policy = settings.data.source == "on_policy"
    return UpdateLog(
        workdir,
        done=done,
        updates=settings.train.updates,
        leave_out=unmeasured(settings.objective, on_policy=on_policy),
    )


# --- Who acts and who judges ----------------------------------------------------------------------


def make_agent(
    loaded: LoadedModel, settings: Settings, *, temperature: float | None = None
) -> Agent:
    """A model as an agent; `temperature` replaces the one for training.

    Raises:
      ValueError: the context is longer than what the model was made for.
    """
    decoding, most = settings.rollout, loaded.config.max_positions
    if decoding.context_tokens > most:
        raise ValueError(
            f"`rollout.context_tokens` = {decoding.context_tokens} exceeds the {most} positions of "
            f"`{loaded.folder}`; lower it"
        )
    if temperature is not None:
        decoding = dataclasses.replace(decoding, temperature=temperature)
    return Agent(loaded.config, loaded.tokenizer, loaded.chat, decoding)


def make_judge(loaded: LoadedModel, settings: Settings) -> Judge:
    """A model as a judge."""
    return Judge(loaded.config, loaded.tokenizer, loaded.chat, settings.judge)


def make_labeller(settings: Settings, teacher: LoadedModel | None) -> Labeller:
    """What gives the turns of an update their verdicts."""
    max_turns = settings.env.max_turns
    if not settings.objective.intervention or teacher is None:
        return no_judge(max_turns=max_turns)
    return teacher_judge(teacher.params, by=make_judge(teacher, settings), max_turns=max_turns)


# --- Where tokens come from -----------------------------------------------------------------------


def panels(settings: Settings) -> dict[str, Panel]:
    """The tasks of every split that the settings name; errors as in `tasks.find_panels`."""
    evaluated = ((split, "eval.splits") for split in settings.eval.splits)
    return dict(_panels(settings.env, ((settings.data.split, "data.split"), *evaluated)))


def eval_panels(settings: Settings) -> dict[str, Panel]:
    """The tasks of the splits that are evaluated: the training tasks need not be there."""
    evaluated = tuple((split, "eval.splits") for split in settings.eval.splits)
    return dict(_panels(settings.env, evaluated))


@cache  # a comparison asks for each of its runs, and some environments read thousands of files
def _panels(env: EnvSettings, splits: tuple[tuple[str, str], ...]) -> dict[str, Panel]:
    return find_panels(make_env(env), dict(splits))


def check_players(settings: Settings) -> None:
    """Finds every player that the settings name, or raises as `make_player` does."""
    wanted = [("eval.who", who) for who in settings.eval.who if who not in ("before", "teacher")]
    habits: Any = {}
    if settings.data.source == "expert":
        wanted.append(("data.source", "expert"))
    if settings.shows_players and (shown := settings.demonstrations):
        habits = shown.habits
        wanted.append(("demonstrations.player", shown.player))
        wanted += [("demonstrations.distractors", name) for name in shown.distractors]
    for field, name in wanted:
        make_player(name, settings.env, field=field, habits=habits)


def make_source(
    settings: Settings,
    student: LoadedModel,
    teacher: LoadedModel | None,
    *,
    tasks: Panel,
    cursor: Sequence[int],
) -> Source:
    """The source named by `data.source`.

    Args:
      settings: of the run.
      student: who plays on-policy, and whose tokenizer and chat format the tokens have.
      teacher: who plays where the settings say so.
      tasks: of `data.split`.
      cursor: where the first call starts, as from `Source.cursor`; [0, 0] at the beginning.
    """
    if settings.shows_players:
        return _demonstrations(settings, student, cursor=cursor)
    how, source = settings.rollout, settings.data.source
    player = teacher if source == "teacher" and teacher else student
    agent = make_agent(player, settings)
    envs = make_envs(partial(make_env, settings.env), how.batch)
    play = play_expert(make_expert(settings, agent), envs)
    if source != "expert":
        play = _play_model(settings, player, agent, envs)
    return Episodes(
        play,
        envs=envs,
        tasks=TaskOrder(
            split=settings.data.split,
            size=tasks.size,
            seed=settings.seed,
            count=how.batch // how.per_task,
            per_task=how.per_task,
        ),
        agent=agent,
        length_multiple=settings.train.length_multiple,
        cursor=cursor,
    )


def _play_model(
    settings: Settings, player: LoadedModel, agent: Agent, envs: Sequence[Env | None]
) -> Play:
    """`Play` of the student being trained, or of the teacher."""
    on_policy = settings.data.source == "on_policy"

    def play(state: TrainState, tasks: Sequence[tuple[str, int]]) -> list[Conversation]:
        params = player.params
        if on_policy:
            params = make_sampling_params(state.params, player, settings)
        update = int(state.step)
        keys = row_keys(jax.random.fold_in(state.rng, state.step), range(len(tasks)))
        depth = settings.rollout.depth(update)
        return rollout(params, keys, agent=agent, envs=envs, tasks=tasks, depth=depth)

    return play


def make_expert(settings: Settings, agent: Agent) -> Callable[[Env, str, int], Conversation]:
    """`demonstrate` bound to the environment's expert, undisturbed: (env, split, index).

    Raises:
      ValueError: when called, where the environment has no expert or a prompt does not fit.
    """

    def episode(env: Env, split: str, index: int) -> Conversation:
        return demonstrate(
            env,
            split,
            index,
            player=make_player("expert", settings.env, field="data.source", habits={}),
            distractor=None,
            distraction=0.0,
            rng=random.Random(f"{settings.seed}/expert/{split}/{index}"),
            tokenizer=agent.tokenizer,
            chat=agent.chat,
            context_tokens=agent.decoding.context_tokens,
        )

    return episode


def make_demonstrator(settings: Settings, *, tokenizer: Any, chat: ChatFormat):
    """`demonstrate` bound to `demonstrations`: episode number n, a pure function of n.

    Each episode draws the size of its rooms. At first there is only the first of `sizes`; each
    number in `sizes_from` is the episode from which on there is one more. Texts of small rooms are
    short, and what was learnt in them needs little change for large ones. Each episode also draws
    its share of strayed turns, between none and `distraction`: the model learns to go on from every
    degree of disorder.
    """
    shown = settings.demonstrations
    assert shown is not None  # as settings are checked
    envs = [make_env(settings.env, size=size) for size in shown.sizes]
    player = partial(make_player, env=settings.env, habits=shown.habits)

    def episode(number: int) -> Conversation:
        rng = random.Random(f"{settings.seed}/episode/{number}")
        env = rng.choice(envs[: 1 + sum(number >= start for start in shown.sizes_from)])
        distraction = shown.distraction * rng.random()
        distractor = rng.choice(shown.distractors) if distraction else None
        split = settings.data.split
        return demonstrate(
            env,
            split,
            number % split_size(env, split, field="data.split"),
            player=player(shown.player, field="demonstrations.player"),
            distractor=(
                player(distractor, field="demonstrations.distractors") if distractor else None
            ),
            distraction=distraction,
            rng=rng,
            tokenizer=tokenizer,
            chat=chat,
            context_tokens=settings.rollout.context_tokens,
        )

    return episode


def _demonstrations(settings: Settings, student: LoadedModel, *, cursor: Sequence[int]) -> Stream:
    """Demonstrations by players, and judge examples: supervised data that builds a model."""
    shown = settings.demonstrations
    assert shown is not None  # as settings are checked
    asking = [
        dataclasses.replace(
            make_judge(student, settings),
            settings=dataclasses.replace(settings.judge, context=context),
        )
        for context in shown.judge_contexts
    ]

    def make_example(number: int, conversation: Conversation, index: int) -> Conversation:
        # Labels take turns, and the context changes after each round: it gets every label.
        by = asking[number // len(LABELS) % len(asking)]
        prompt = [*by.prefix(conversation, index), *by.question(conversation, index)]
        label = conversation.turns[index].oracle
        answer = student.tokenizer.encode(label, add_special_tokens=False)
        return judge_example(prompt, [*answer, student.chat.stop_ids[0]])

    return Stream(
        make_episode=make_demonstrator(settings, tokenizer=student.tokenizer, chat=student.chat),
        make_example=make_example if shown.judge_examples else None,
        seed=settings.seed,
        window=shown.window,
        judge_examples=shown.judge_examples,
        tokens_per_batch=shown.tokens_per_batch,
        length_multiple=settings.train.length_multiple,
        rows_multiple=settings.train.micro_batches * settings.mesh.batch_shards,
        cursor=cursor,
    )
