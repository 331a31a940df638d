"""From a config to live objects: models, agents, judges, objectives, demonstrations.

Everything it calls takes keyword arguments: below this file nothing knows of configs.
"""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from opd_jax import hf
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.generate import Sampling, sampling_params
from opd_jax.agent.rollout import Agent
from opd_jax.envs.base import Env
from opd_jax.experience.demonstrations import demonstrate
from opd_jax.experience.environments import make_env, split_size
from opd_jax.experience.players import make_player
from opd_jax.judge.prompt import PHRASES, Judge
from opd_jax.learner import optimizer
from opd_jax.learner.objective import Objective
from opd_jax.model import ModelConfig, Params, init_arrays, init_params, param_specs
from opd_jax.model.lora import Lora, lora_specs, with_adapters
from opd_jax.runtime.mesh import param_shardings

EMBEDDED = Path(__file__).parents[1] / "pair"


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory.

    Attributes:
      folder: where it came from.
      config: its sizes.
      params: its parameters.
      tokenizer: a `transformers` tokenizer.
      chat: its chat format.
    """

    folder: Path
    config: ModelConfig
    params: Params
    tokenizer: Any
    chat: ChatFormat


def model_folder(name: str) -> Path:
    """The folder a config's model name stands for: `embedded:NAME` ships with the package."""
    return EMBEDDED / name.removeprefix("embedded:") if name.startswith("embedded:") else Path(name)


def load_model(
    name: str, *, dtype: str, mesh: jax.sharding.Mesh, vocab_size: int | None = None
) -> LoadedModel:
    """Read a model folder; errors as in `hf`.

    Args:
      name: a folder of Hugging Face safetensors, or `embedded:student` or `embedded:teacher`.
      dtype: of the parameters; "int8" is `quantize` over bfloat16.
      mesh: over which they are split.
      vocab_size: tokens that are read, without rows that pad the vocabulary beyond; None: all.
    """
    folder = model_folder(name)
    config = hf.read_config(folder)
    tokenizer = hf.load_tokenizer(folder)
    if vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=vocab_size)
    hf.check_vocab(folder, tokenizer, config)
    return LoadedModel(
        folder=folder,
        config=config,
        params=hf.load_params(
            folder,
            config,
            dtype=jnp.dtype("bfloat16" if dtype == "int8" else dtype),
            int8=dtype == "int8",
            mesh=mesh,
        ),
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(tokenizer),
    )


def load_pair(
    config: FrozenConfigDict, mesh: jax.sharding.Mesh
) -> tuple[LoadedModel, LoadedModel | None]:
    """Student and teacher as the config names them; no teacher where its name is empty."""
    return load_student(config, mesh), load_teacher(config, mesh)


def load_student(config: FrozenConfigDict, mesh: jax.sharding.Mesh) -> LoadedModel:
    """The student that the config names, for use beside its teacher, as it is before any update.

    Raises:
      ValueError: its tokenizer differs from the teacher's, before any weight is read; else as in
        `hf`.
    """
    if config.student == "new":
        return new_model(config, mesh)
    if config.teacher:
        hf.check_same_tokenizer(model_folder(config.student), model_folder(config.teacher))
    return load_model(
        config.student, dtype=student_dtype(config), mesh=mesh, vocab_size=_shared_vocab(config)
    )


def student_sizes(config: FrozenConfigDict) -> ModelConfig:
    """Sizes of the student that `load_student` gives; no weight is read.

    Raises:
      ValueError: as `hf.read_config`.
    """
    if config.student == "new":
        return new_sizes(config)[0]
    sizes = hf.read_config(model_folder(config.student))
    return dataclasses.replace(sizes, vocab_size=_shared_vocab(config))


def student_dtype(config: FrozenConfigDict) -> str:
    """What the student is loaded in, as `load_model` takes it: frozen weights need no more."""
    if not config.lora.rank:
        return config.dtype
    return "int8" if config.lora.int8 else config.compute_dtype


def load_teacher(config: FrozenConfigDict, mesh: jax.sharding.Mesh) -> LoadedModel | None:
    """The teacher that the config names, or None."""
    if not config.teacher:
        return None
    return load_model(
        config.teacher, dtype=config.teacher_dtype, mesh=mesh, vocab_size=_shared_vocab(config)
    )


def _shared_vocab(config: FrozenConfigDict) -> int:
    """The smaller vocabulary: models of one tokenizer may be padded to different sizes."""
    names = [name for name in (config.student, config.teacher) if name]
    return min(hf.read_config(model_folder(name)).vocab_size for name in names)


def new_model(config: FrozenConfigDict, mesh: jax.sharding.Mesh) -> LoadedModel:
    """A random model of `config.new_model` with the household's tokenizer."""
    sizes, tokenizer = new_sizes(config)
    init = jax.jit(
        partial(init_params, sizes, dtype=jnp.dtype(config.dtype)),
        out_shardings=param_shardings(param_specs(sizes), mesh),
    )
    return LoadedModel(
        folder=EMBEDDED,
        config=sizes,
        params=init(jax.random.key(config.seed)),
        tokenizer=tokenizer,
        chat=ChatFormat.from_tokenizer(tokenizer),
    )


def new_sizes(config: FrozenConfigDict) -> tuple[ModelConfig, Any]:
    """Sizes of `new_model`, and its tokenizer."""
    from opd_jax.envs.household.tokenizer import build

    tokenizer = build(phrases=PHRASES)
    return ModelConfig(vocab_size=len(tokenizer), rope_scaling=None, **config.new_model), tokenizer


def make_lora(settings: FrozenConfigDict) -> Lora | None:
    """The adapters of `config.lora`; None where all parameters are trained."""
    if not settings.rank:
        return None
    return Lora(rank=settings.rank, alpha=settings.alpha, targets=tuple(settings.targets))


def initial_params(
    student: LoadedModel, config: FrozenConfigDict, mesh: jax.sharding.Mesh
) -> Params:
    """What is trained, before any update: the student's parameters, or adapters for them.

    Raises:
      ValueError: the student cannot have such adapters, or they do not divide over the mesh.
    """
    lora = make_lora(config.lora)
    if lora is None:
        return student.params
    specs = lora_specs(student.config, lora)
    init = jax.jit(
        partial(init_arrays, specs, dtype=jnp.dtype(config.dtype)),
        out_shardings=param_shardings(specs, mesh),
    )
    # A key that no update's number leads to.
    return init(jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1))


def student_params(trained: Params, student: LoadedModel, config: FrozenConfigDict) -> Params:
    """The parameters that the student computes with: those trained, or its own beside them."""
    lora = make_lora(config.lora)
    return with_adapters(student.params if lora else None, trained, lora)


def make_optimizer(config: FrozenConfigDict) -> optax.GradientTransformation:
    """AdamW from `config.optimizer`, over `train.updates` updates."""
    return optimizer.make_optimizer(total_updates=config.train.updates, **config.optimizer)


def make_agent(
    model: LoadedModel, rollout: FrozenConfigDict, *, temperature: float | None = None
) -> Agent:
    """An agent from `config.rollout`; `temperature` replaces the one for training.

    Raises:
      ValueError: the cache is longer than what the model was made for.
    """
    if rollout.context_tokens > model.config.max_positions:
        raise ValueError(
            f"`rollout.context_tokens` = {rollout.context_tokens} exceeds the "
            f"{model.config.max_positions} positions of `{model.folder}`; lower it"
        )
    return Agent(
        model=model.config,
        tokenizer=model.tokenizer,
        chat=model.chat,
        sampling=Sampling(
            temperature=rollout.temperature if temperature is None else temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
        ),
        turn_tokens=rollout.turn_tokens,
        context_tokens=rollout.context_tokens,
        cache_step=rollout.cache_step,
        extend_widths=tuple(rollout.extend_widths),
        chunk=rollout.chunk,
        history_turns=rollout.history_turns,
    )


def make_sampling_params(trained: Params, student: LoadedModel, config: FrozenConfigDict) -> Params:
    """The student's parameters as it samples with them, from those being trained."""
    return sampling_params(
        student_params(trained, student, config),
        config=student.config,
        dtype=jnp.dtype(config.compute_dtype),
        gather=config.rollout.gather_weights,
    )


def make_judge(model: LoadedModel, settings: FrozenConfigDict) -> Judge:
    """A judge from `config.judge`."""
    return Judge(
        model=model.config,
        tokenizer=model.tokenizer,
        chat=model.chat,
        context=settings.context,
        admissible_shown=settings.admissible_shown,
        batch=settings.batch,
        length_multiple=settings.length_multiple,
        max_new_tokens=settings.max_new_tokens,
    )


def make_objective(settings: FrozenConfigDict) -> Objective:
    """The objective from `config.objective`."""
    return Objective(
        divergence=settings.divergence,
        beta=settings.beta,
        intervention=settings.intervention,
        confidence=settings.confidence,
        confidence_temperature=settings.confidence_temperature,
        weak_weight=settings.weak_weight,
        entropy_bonus=settings.entropy_bonus,
        entropy_threshold=settings.entropy_threshold,
        normalize=settings.normalize,
        scope=settings.scope,
        eps=settings.eps,
        max_z=settings.max_z or None,
    )


def train_tasks(size: int, *, seed: int, start: int, count: int) -> list[int]:
    """Tasks number `start` to `start + count` of an endless series of shuffled epochs."""
    tasks = []
    for number in range(start, start + count):
        epoch, place = divmod(number, size)
        tasks.append(int(_permutation(size, seed, epoch)[place]))
    return tasks


@lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def make_expert(config: FrozenConfigDict, agent: Agent) -> Callable[[Env, str, int], Conversation]:
    """`demonstrate` bound to the environment's expert, undisturbed: (env, split, index).

    Args:
      config: names the environment, and the seed of the expert's draws.
      agent: whose tokenizer, chat format and context the conversations have.

    Raises:
      ValueError: when called, where the environment has no expert or a prompt does not fit.
    """

    def episode(env: Env, split: str, index: int) -> Conversation:
        return demonstrate(
            env,
            split,
            index,
            player=make_player("expert", config, field="data.source"),
            distractor=None,
            distraction=0.0,
            rng=random.Random(f"{config.seed}/expert/{split}/{index}"),
            tokenizer=agent.tokenizer,
            chat=agent.chat,
            context_tokens=agent.context_tokens,
        )

    return episode


def make_demonstrator(config: FrozenConfigDict, *, tokenizer: Any, chat: ChatFormat):
    """`demonstrate` bound to `config.data`: episode number n, a pure function of n.

    Sizes of rooms are drawn evenly from the first of `data.sizes`, and from one more of them from
    each of the episodes `data.sizes_from` on: what has been learnt in small rooms, where texts are
    short, is a small step from there in large ones. The share of strayed turns is drawn anew for
    each episode, between none and `data.distraction`, so that the player is seen going on from
    every degree of disorder.
    """
    data = config.data
    envs = [make_env(FrozenConfigDict({**config.env, "size": size})) for size in data.sizes]

    def episode(number: int) -> Conversation:
        rng = random.Random(f"{config.seed}/episode/{number}")
        env = rng.choice(envs[: 1 + sum(number >= start for start in data.sizes_from)])
        distraction = data.distraction * rng.random()
        distractor = rng.choice(data.distractors) if distraction else None
        return demonstrate(
            env,
            data.split,
            number % split_size(env, "data.split", data.split),
            player=make_player(data.player, config, field="data.player"),
            distractor=distractor and make_player(distractor, config, field="data.distractors"),
            distraction=distraction,
            rng=rng,
            tokenizer=tokenizer,
            chat=chat,
            context_tokens=config.rollout.context_tokens,
        )

    return episode
