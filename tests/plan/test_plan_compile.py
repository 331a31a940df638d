"""Plans with a compiler: that of this machine, and, where it is installed, that of TPUs."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from opd_jax import config as cfg
from opd_jax.plan.analysis import analyze
from opd_jax.plan.chips import GIB, find
from opd_jax.plan.compiling import compile_program
from opd_jax.plan.report import describe

ROOT = Path(__file__).parents[2]

# As little as a run can be: nothing is sampled or judged in its updates.
LOCAL = (
    "--config=configs/household_pair.py:runlocal,who=student",
    "--topology=local",
    "--config.mesh.data=2",
    "--config.new_model.num_layers=2",
    "--config.env.max_turns=2",
    "--config.rollout.context_tokens=128",
    "--config.rollout.chunk=8",
    "--config.train.length_multiple=128",
    "--config.train.response_multiple=64",
)


def plan(command, *flags: object) -> dict:
    done = command("plan", *flags, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["plan"]


def test_the_compiler_of_this_machine_plans_and_is_asked_once(command, tmp_path):
    first = plan(command, *LOCAL, f"--cache={tmp_path}")
    assert (first["chips"], first["chip"]["platform"]) == (2, "cpu")
    for program in first["programs"]:
        found = program["compiled"]
        assert (found["refused"], found["remembered"]) == (None, False)
        assert found["memory"]["arguments"] == pytest.approx(program["arguments"], rel=0.01)
        # How much memory there is nobody says of a CPU.
        assert program["verdict"] == "memory unknown"
    (step,) = [p["compiled"] for p in first["programs"] if p["name"] == "train step"]
    # Gradients are added up over `data`, which is two devices, once an update.
    reduced = [c for c in step["collectives"] if c["kind"] == "all-reduce"]
    assert {(c["group"], c["known"]) for c in reduced} == {(2, True)}

    second = plan(command, *LOCAL, f"--cache={tmp_path}")
    for program in second["programs"]:
        assert program["compiled"].pop("remembered")
        program["compiled"]["remembered"] = False
    assert second == first

    # Another program is another question; those that are the same are not asked again.
    changed = ("--config.optimizer.weight_decay=0.5", "--limit_s=0.01")
    for program in plan(command, *LOCAL, f"--cache={tmp_path}", *changed)["programs"]:
        trains = program["name"] == "train step"
        assert (program["compiled"]["refused"] is None) == (not trains)
        assert program["compiled"]["remembered"] == (not trains)


def test_a_compiler_that_does_not_answer_is_given_up(command, tmp_path):
    found = plan(command, *LOCAL, f"--cache={tmp_path}", "--limit_s=0.01")
    assert found["verdict"] == "not compiled"
    for program in found["programs"]:
        assert "no answer from the compiler within 0.01 s" in program["compiled"]["refused"]
    assert list(tmp_path.iterdir()) == []  # another time it may


# --- TPUs


def folder(path: Path, *, width: int, vocab: int, tied: bool) -> Path:
    """A model of two layers that has sizes and no weights."""
    path.mkdir()
    sizes = dict(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=width,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=vocab,
        num_hidden_layers=2,
        intermediate_size=2 * width,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        rope_theta=1e6,
    )
    (path / "config.json").write_text(json.dumps(sizes))
    return path


needs_tpu_compiler = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs the extra `plan`"
)
TPU = (
    "--config=configs/alfworld_qwen3.py:method=opd",
    "--topology=v5e:2x2",
    "--config.env.max_turns=2",
    "--config.rollout.batch=8",
    "--config.rollout.context_tokens=256",
    "--config.rollout.turn_tokens=64",
    "--config.rollout.extend_widths=16",
    "--config.rollout.chunk=16",
    "--config.judge.batch=8",
    "--config.eval.batch=8",
    "--config.eval.who=random",
    "--config.train.micro_batches=2",
    "--config.train.query_chunk=128",
    "--config.train.loss_chunk=64",
    "--config.train.length_multiple=128",
    "--config.train.response_multiple=128",
)


@needs_tpu_compiler
def test_the_tpu_compiler_plans_a_model_of_two_layers(command, tmp_path):
    student = folder(tmp_path / "student", width=256, vocab=8192, tied=True)
    teacher = folder(tmp_path / "teacher", width=512, vocab=8192, tied=False)
    models = (f"--config.student={student}", f"--config.teacher={teacher}")
    found = plan(command, *TPU, *models, f"--cache={tmp_path / 'cache'}")
    assert found["verdict"] == "fits"
    programs = {program["name"]: program for program in found["programs"]}
    assert list(programs) == ["copy to sample with", "observation", "sampling", "train step"]
    for program in programs.values():
        compiled = program["compiled"]
        assert compiled["memory"]["arguments"] == pytest.approx(program["arguments"], rel=0.02)
        assert all(part["known"] for part in compiled["collectives"])
    # The teacher's layers are gathered over the four chips, once for each of two micro-batches.
    step = programs["train step"]["compiled"]
    gathered = [c for c in step["collectives"] if c["kind"] == "all-gather" and c["times"] == 4]
    assert {c["group"] for c in gathered} == {4}
    assert any("model.py" in c["source"] for c in gathered)
    # Sampling has its weights whole: it sends next to nothing.
    assert sum(c["sent"] for c in programs["sampling"]["compiled"]["collectives"]) < 2**20


@needs_tpu_compiler
def test_a_program_that_the_tpu_compiler_refuses_does_not_fit(tmp_path):
    student = folder(tmp_path / "student", width=256, vocab=65536, tied=True)
    words = [
        *(word for word in TPU if not word.startswith("--topology")),
        f"--config.student={student}",
        f"--config.teacher={student}",
        # Logits of all positions at once.
        "--config.train.loss_chunk=100_000_000",
        "--config.rollout.context_tokens=2048",
        "--config.rollout.turn_tokens=1024",
        "--config.rollout.batch=256",
        "--config.train.micro_batches=1",
        "--config.train.query_chunk=2048",
    ]
    path, *overrides = (word.removeprefix("--config=") for word in words)
    where = find("v5e:2x2", local_chips=0)
    analysis = analyze(cfg.load(str(ROOT / path), overrides), where, given=[], flops=False)
    (cost,) = [cost for cost in analysis.costs if cost.program.name == "train step"]
    assert (cost.verdict, cost.least < 15 * GIB) == ("not compiled", True)
    words[0] = f"--config={ROOT / path}"
    result = compile_program(analysis, cost.program, words, cache=tmp_path / "cache", limit_s=300)
    assert "RESOURCE_EXHAUSTED" in result["refused"]
    found = describe(analysis, {"train step": result})
    (step,) = [program for program in found["programs"] if program["name"] == "train step"]
    assert step["verdict"] == found["verdict"] == "does not fit"
