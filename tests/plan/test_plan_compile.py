"""Plans with a compiler: that of this machine, and, where it is installed, that of TPUs."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from opd_jax import config as cfg
from opd_jax.plan.chips import V5E, find
from opd_jax.plan.compiling import PACKAGE, compile_programs
from opd_jax.plan.programs import plan_run
from opd_jax.plan.verdict import verdict

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


def run(command, *flags: object, **variables: str) -> tuple[dict, str]:
    """The plan, and what was said while it was made."""
    done = command("plan", *flags, "--json", **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["plan"], done.stderr


@pytest.mark.slow
def test_the_compiler_of_this_machine_is_asked_once_for_each_program_and_revision(
    command, tmp_path
):
    cache = f"--cache={tmp_path / 'cache'}"
    first, said = run(command, *LOCAL, cache)
    assert (first["chips"], first["chip"]["platform"]) == (2, "cpu")
    for program in first["programs"]:
        assert f"compiling: {program['name']}\n" in said
        assert (program["refused"], program["verdict"]) == ("", "memory unknown")  # of a CPU
    files = (tmp_path / "cache").iterdir()
    found = sorted(json.loads(file.read_text())["arguments"] for file in files)
    counted = sorted(program["arguments"] for program in first["programs"])
    # Reading alone needs neither the head nor what follows the last attention.
    (reading, *others), (resident, *counted) = found, counted
    assert others == pytest.approx(counted, rel=0.01)
    assert resident / 2 < reading < resident
    # Gradients are added up over `data`, which is two devices.
    rows = [row for row in first["collectives"] if row["kind"] == "all-reduce"]
    assert {row["group"] for row in rows if row["program"] == "train step"} == {2}
    assert all(row["in_sequence"] > 0 and row["bytes"] > 0 for row in rows)

    second, said = run(command, *LOCAL, cache)
    assert (second, "compiling" in said) == (first, False)

    # Only the program that changed is compiled again.
    late = ("--limit_s=0.01", cache)
    found, said = run(command, *LOCAL, "--config.optimizer.weight_decay=0.5", *late)
    assert said.count("compiling") == said.count("compiling: train step") == 1
    refused = {program["name"]: program["refused"] for program in found["programs"]}
    assert "no answer from the compiler within 0.01 s" in refused.pop("train step")
    assert set(refused.values()) == {""}
    # A compiler that did not answer is asked again: another time it may.
    assert len(list((tmp_path / "cache").iterdir())) == len(first["programs"])

    # Another revision of our source gets results of its own.
    copy = shutil.copytree(PACKAGE, tmp_path / "opd_jax")
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    with (copy / "losses.py").open("a") as file:
        file.write("# another line\n")
    found, said = run(command, *LOCAL, *late, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert said.count("compiling") == len(first["programs"])
    assert found["verdict"] == "not compiled"


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
PAPER = "configs/alfworld_qwen3.py:method=opd"
SMALL = (
    "--config.mesh.decode=1",
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
    found, _ = run(
        command,
        f"--config={PAPER}",
        "--topology=v5e:2x2",
        *SMALL,
        *models,
        f"--cache={tmp_path / 'cache'}",
    )
    assert found["verdict"] == "fits"
    rollout = ["copy to sample with", "observation", "sampling"]
    names = [*rollout, "teacher's pass", "train step"]
    assert [program["name"] for program in found["programs"]] == names
    rows = found["collectives"]
    assert all(row["in_sequence"] for row in rows)
    # The two layers of the teacher are gathered over the four chips, for each of two micro-batches.
    gathered = {
        (row["kind"], row["group"], row["in_sequence"] % 4)
        for row in rows
        if row["program"] == "teacher's pass" and row["source"].startswith("model/projections.py")
    }
    assert gathered == {("all-gather", 4, 0)}
    # Sampling has whole weights, so it sends next to nothing.
    assert sum(row["bytes"] for row in rows if row["program"] == "sampling") < 2**20


@needs_tpu_compiler
def test_a_program_that_the_tpu_compiler_refuses_does_not_fit(tmp_path):
    model = folder(tmp_path / "model", width=256, vocab=65536, tied=True)
    large = (
        f"--config.student={model}",
        f"--config.teacher={model}",
        # Logits of all positions at once.
        "--config.train.loss_chunk=100_000_000",
        "--config.rollout.context_tokens=2048",
        "--config.rollout.turn_tokens=1024",
        "--config.rollout.batch=256",
        "--config.train.micro_batches=1",
        "--config.train.query_chunk=2048",
    )
    config = cfg.load(str(PACKAGE.parent / PAPER), [*SMALL, *large])
    run = plan_run(config, find("v5e:2x2", local_chips=0))
    # What is least likely to fit comes first.
    step, result = next(compile_programs(run, cache=tmp_path / "cache", limit_s=300))
    assert step.name == "train step"
    assert run.least(step) < V5E.memory
    assert "RESOURCE_EXHAUSTED" in result["refused"]
    assert verdict(run, step, result) == "does not fit"
