"""What a model reference names: above all, the student of another run."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import one_device, read
from test_export import copy_model, save_run

from opd_jax import export, train
from opd_jax.config import load
from opd_jax.config.models import load_model, load_student, load_teacher
from opd_jax.config.references import find_model, fingerprint, fingerprints
from opd_jax.runtime.mesh import DECODING, TRAINING, make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")


def compared(ours: jax.Array, theirs: jax.Array, *, ulps: float = 0) -> None:
    """Equal, or apart by `ulps` of bfloat16, of int8's steps, or a rounding near zero."""
    least = 1 if ours.dtype == jnp.int8 else 1e-7
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=ulps * 2**-8, atol=ulps * least)


@pytest.mark.parametrize(
    "changes", [(), ("lora.rank=4",), ("lora.rank=4", "lora.int8=true", "lora.targets=q,up")]
)
def test_a_checkpoint_is_the_model_that_its_export_holds(
    changes: tuple[str, ...], tmp_path: Path
) -> None:
    # Training cuts rows that the teacher lacks, but not from below adapters.
    student = copy_model("student", tmp_path / "student", padding=7)
    (student / "generation_config.json").write_text('{"eos_token_id": [12, 3]}')
    run = tmp_path / "run"
    save_run(run, f"student={student}", *changes)
    export.export(run, tmp_path / "out", dtype="float32")
    several = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    for dtype, mesh, rules, rows in (
        ("float32", one_device(), TRAINING, None),
        ("bfloat16", several, TRAINING, 665),
        ("int8", several, DECODING, 665),
    ):
        ours, theirs = (
            load_model(name, dtype=dtype, mesh=mesh, rules=rules, vocab_size=rows)
            for name in (f"workdir:{run}@3", str(tmp_path / "out"))
        )
        assert ours.config == theirs.config
        assert ours.chat.stop_ids == theirs.chat.stop_ids == (3, 12)
        # Over several devices the sums of a merge are ordered otherwise.
        ulps = 1 if changes and mesh is several else 0
        jax.tree.map(partial(compared, ulps=ulps), ours.params, theirs.params)
        assert [x.sharding for x in jax.tree.leaves(ours.params)] == [
            x.sharding for x in jax.tree.leaves(theirs.params)
        ]


def test_a_run_may_begin_where_another_began_with_a_third(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_run(first, "lora.rank=4")
    save_run(second, f"student=workdir:{first}", "lora.rank=2")  # new adapters of the merged model
    began = load_model(f"workdir:{first}", dtype="float32", mesh=one_device())
    both = read("quickstart", f"student=workdir:{second}", f"teacher=workdir:{first}")
    student, teacher = load_student(both, one_device()), load_teacher(both, one_device())
    assert teacher is not None
    jax.tree.map(np.testing.assert_array_equal, teacher.params, began.params)
    assert not np.array_equal(student.params["layers"]["q"], began.params["layers"]["q"])
    np.testing.assert_array_equal(student.params["embed"], began.params["embed"])
    export.export(second, tmp_path / "out")
    exported = load_model(str(tmp_path / "out"), dtype="float32", mesh=one_device())
    jax.tree.map(np.testing.assert_array_equal, student.params, exported.params)


def test_a_checkpoint_is_known_wherever_its_run_lies(tmp_path: Path) -> None:
    base = copy_model("student", tmp_path / "base")
    run, other = tmp_path / "run", tmp_path / "other"
    save_run(run, f"student={base}", "lora.rank=4")
    (run / "models.json").write_text(
        json.dumps(fingerprints(read("quickstart", f"student={base}"), ["student"]))
    )
    found = fingerprint(find_model(f"workdir:{run}", field="student"))
    shutil.copytree(run, tmp_path / "moved")
    assert fingerprint(find_model(f"workdir:{tmp_path / 'moved'}", field="student")) == found
    save_run(other, f"student={base}", "lora.rank=4", "lora.alpha=16")
    shutil.copy(run / "models.json", other)
    assert fingerprint(find_model(f"workdir:{other}", field="student")) != found
    shutil.rmtree(base)
    copy_model("teacher", base)
    with pytest.raises(ValueError, match=r"has adapters of another model than `.*base` holds now"):
        fingerprint(find_model(f"workdir:{run}", field="student"))


def test_a_new_students_run_names_a_model(built: Any) -> None:
    reference = f"workdir:{built.workdir}"
    settings = read("quickstart", f"teacher={reference}")
    teacher = load_teacher(settings, one_device())
    assert teacher is not None
    assert teacher.params["embed"].shape == (665, 32)
    assert fingerprints(settings).keys() == {"student", "teacher"}
    plain = load_model("embedded:student", dtype="float32", mesh=one_device())
    assert teacher.chat.stop_ids == plain.chat.stop_ids


def test_a_reference_to_no_checkpoint_is_one_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, empty, gone = tmp_path / "run", tmp_path / "empty", tmp_path / "gone"
    save_run(run)
    shutil.copytree(run, empty)
    shutil.rmtree(empty / "checkpoints")
    save_run(gone, f"student={copy_model('student', tmp_path / 'student')}")
    shutil.rmtree(tmp_path / "student")
    for reference, said in (
        (f"workdir:{tmp_path / 'rum'}", f"holds no run: it has no config.json; closest: `{run}`"),
        (f"workdir:{empty}", "has no checkpoint yet; let the run save one"),
        (f"workdir:{run}@7", "has no checkpoint of update 7; it keeps those of 3"),
        (f"workdir:{run}@best", "has no best checkpoint"),
        (f"workdir:{gone}", "what its run began with: model folder"),
        ("workdir:s3://bucket/run", "is a URL"),
    ):
        for field in ("student", "teacher"):
            words = ["--config=quickstart:runlocal", f"--workdir={tmp_path / 'new'}"]
            with pytest.raises(SystemExit) as stop:
                train.main([*words, f"--config.{field}={reference}"])
            message = capsys.readouterr().err
            assert (stop.value.code, message.count("\n")) == (2, 1)
            assert f"`{field}` = `{reference}`" in message
            assert said in message
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_from_the_weights_of_another(
    trained: Any, small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = Path(shutil.copytree(trained.workdir, tmp_path / "a")), tmp_path / "b"

    def go_on(reference: str) -> None:
        changes = ("train.updates=1", "eval.who=", "eval.splits=valid_seen", "eval.tasks=1")
        words = [f"--config.{change}" for change in (*changes, f"student={reference}")]
        config = load("quickstart:runlocal", [*small, *words])
        train.run(config, second)

    go_on(f"workdir:{first}@2")
    line = json.loads((second / "metrics.jsonl").read_text())
    before, after = (
        load_model(name, dtype="float32", mesh=one_device())
        for name in (f"workdir:{first}@2", f"workdir:{second}")
    )
    moved = jax.tree.map(lambda x, y: np.sum(np.square(x - y)), before.params, after.params)
    assert sum(jax.tree.leaves(moved)) ** 0.5 == pytest.approx(line["update_norm"], rel=1e-3)
    # Another checkpoint of that run is another model.
    with pytest.raises(ValueError, match="is not the model that the run in"):
        go_on(f"workdir:{first}@4")
    # What a run holds needs no folder of the run that it began with to be where it was.
    first.rename(tmp_path / "moved")
    go_on(f"workdir:{tmp_path / 'moved'}@2")
