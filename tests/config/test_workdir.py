"""What a workdir keeps of the run that it holds."""

import json
import shutil
from pathlib import Path

import pytest
from settings import read

from opd_jax.config import load
from opd_jax.config.build import panels
from opd_jax.config.references import EMBEDDED
from opd_jax.config.workdir import check_models, check_run, store_run
from opd_jax.evaluate import run

QUICKSTART = "quickstart:runlocal"


def store(workdir: Path, *overrides: str) -> None:
    settings = read(QUICKSTART, *overrides)
    config = load(QUICKSTART, [f"--config.{override}" for override in overrides])
    store_run(config, settings, panels(settings), workdir)


def figures(workdir: Path) -> Path:
    path = workdir / "summary.json"
    path.write_text(json.dumps({"eval": {"before": {}, "after": {}}}))
    return path


def another_model(folder: Path) -> Path:
    shutil.copytree(EMBEDDED / "teacher", folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[len(weights) // 2 :] = bytes(len(weights) - len(weights) // 2)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_figures_of_another_config_or_of_other_models_do_not_stay(tmp_path: Path) -> None:
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    workdir.mkdir()
    summary = figures(workdir)
    store(workdir)
    assert not summary.exists()  # nobody knows whose they were
    summary = figures(workdir)
    store(workdir, "eval.tasks=3")
    shutil.copytree(EMBEDDED / "teacher", moved)
    store(workdir, f"teacher={moved}")
    assert summary.exists()
    store(workdir, f"teacher={another_model(tmp_path / 'other')}")
    assert not summary.exists()
    summary = figures(workdir)
    store(workdir, "dtype=bfloat16", f"teacher={tmp_path / 'other'}")
    assert not summary.exists()


def test_figures_that_another_method_leaves_as_they_are_stay(tmp_path: Path) -> None:
    store(tmp_path)
    for change in ("optimizer.learning_rate=0.1", "seed=1", "weight.by=intervention"):
        summary = figures(tmp_path)
        store(tmp_path, change)  # begun again before the first checkpoint
        assert json.loads(summary.read_text()) == {"eval": {"before": {}}}
        store(tmp_path)
    for change in ("rollout.turn_tokens=16", "env.size=large", "teacher_dtype=bfloat16"):
        summary = figures(tmp_path)
        store(tmp_path, change)
        assert not summary.exists()
        store(tmp_path)


def test_a_models_folder_is_no_workdir(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED / "student", tmp_path / "student")
    with pytest.raises(ValueError, match=f"`{folder}/config.json` is not the config of a run"):
        check(folder)
    with pytest.raises(ValueError, match=f"`{folder}/config.json` is not the config of a run"):
        run(load(QUICKSTART, []), folder, "expert")


def test_a_run_goes_on_with_its_models_wherever_they_lie(tmp_path: Path) -> None:
    store(tmp_path)
    moved = shutil.copytree(EMBEDDED / "teacher", tmp_path / "moved")
    check_models(read(QUICKSTART, f"teacher={moved}"), tmp_path)
    with pytest.raises(ValueError, match="`nowhere` does not exist; check the path, or download"):
        check_models(read(QUICKSTART, "teacher=nowhere"), tmp_path)
    other = another_model(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`teacher` = .* is not the model that the run in"):
        check_models(read(QUICKSTART, f"teacher={other}"), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "rate", "warned"),
    [("bfloat16", 1e-6, True), ("bfloat16", 1e-3, False), ("float32", 1e-6, False)],
)
def test_updates_that_bfloat16_rounds_away_are_warned_of(
    dtype: str, rate: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = (f"dtype={dtype}", f"optimizer.learning_rate={rate}")
    config = load(QUICKSTART, [f"--config.{change}" for change in changes])
    check_run(config, read(QUICKSTART, *changes), tmp_path)
    said = [r.getMessage() for r in caplog.records if "set `dtype` to float32" in r.getMessage()]
    assert len(said) == warned
    assert all("`optimizer.learning_rate` = 1e-06" in text for text in said)


def test_a_student_that_is_its_own_teacher_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(QUICKSTART, [])
    check_run(config, read(QUICKSTART, f"teacher={EMBEDDED / 'student'}"), tmp_path)
    assert "`student` and `teacher` are one model, embedded:student, so" in caplog.messages[-1]
    told = len(caplog.messages)
    check_run(config, read(QUICKSTART), tmp_path)
    imitation = ("data.source=teacher", "teacher=embedded:student")
    check_run(config, read("quickstart:method=sft,runlocal", *imitation), tmp_path)
    assert len(caplog.messages) == told


def check(workdir: Path) -> None:
    check_run(load(QUICKSTART, []), read(QUICKSTART), workdir)


def test_a_subfolder_that_cannot_be_written_is_found_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    places = [tmp_path / "checkpoints", tmp_path / "events"]
    for place in places:
        place.mkdir()
    check(tmp_path)
    assert not any(any(place.iterdir()) for place in places)
    for place in places:
        place.rmdir()
        place.symlink_to(tmp_path / "disk")  # not mounted: the checkpoints of before are there
        with pytest.raises(ValueError, match=f"`{place}` is a link to `{tmp_path / 'disk'}`, whi"):
            check(tmp_path)
        place.unlink()
        place.symlink_to("/proc")
        with pytest.raises(ValueError, match=rf"`{place}` cannot be written \(E\w+\); move it aw"):
            check(tmp_path)
        place.unlink()
        place.write_text("")
        with pytest.raises(ValueError, match=f"`{place}` is not a folder; move it away"):
            check(tmp_path)
        place.unlink()


def test_a_path_that_checkpoints_would_be_lost_in_is_refused(tmp_path: Path) -> None:
    for name in ("seed[0]", "lr=*", "why?"):
        with pytest.raises(ValueError, match=r"cannot be restored; choose another --workdir"):
            check(tmp_path / name / "run")
    for name in ("lr=1e-3, seed 0", "100%", "a]b", "grün"):
        check(tmp_path / name)
