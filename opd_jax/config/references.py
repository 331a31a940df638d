"""What a model reference names, and what is known of the model before its weights are read.

A reference is a folder, one in a bucket too, `embedded:NAME` for a model of the package, or
`workdir:DIR[@STEP]` for the student of a run: of its newest checkpoint, or of `@120` or `@best`.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import hf
from opd_jax.config.settings import Settings, read_settings
from opd_jax.config.stored import closest_run, read_stored
from opd_jax.experience.recorded import recorded_panel
from opd_jax.judge.prompt import PHRASES, read_prompt
from opd_jax.model import ModelConfig
from opd_jax.report.writers import read_summary
from opd_jax.runtime import bucket, processes
from opd_jax.runtime.checkpoint import Checkpoints, saved_steps
from opd_jax.runtime.files import local_path

EMBEDDED = Path(__file__).parents[1] / "pair"
MODELS = ("student", "teacher")
MODELS_FILE = "models.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights of a run's student are.

    Attributes:
      workdir: the run's.
      step: the updates that they have had.
      settings: the run's.
      base: the student that the run began with.
    """

    workdir: Path
    step: int
    settings: Settings
    base: "FoundModel"

    def open(self) -> Checkpoints:
        """The run's checkpoints, to read; close them."""
        return Checkpoints(self.workdir / "checkpoints", keep=self.settings.checkpoint.keep)


@dataclass(frozen=True)
class FoundModel:
    """A model before its weights are read.

    Attributes:
      name: its reference, or "new".
      sizes: the model's.
      folder: has the tokenizer, and the weights unless a checkpoint has them; None for a new model,
        which has the household's tokenizer.
      checkpoint: has the weights, or adapters to those of its base.
    """

    name: str
    sizes: ModelConfig
    folder: Path | None
    checkpoint: Checkpoint | None = None

    @property
    def place(self) -> Any:
        """Where the weights are; None for a new model."""
        if self.checkpoint:
            return self.checkpoint.workdir.resolve(), self.checkpoint.step
        return self.folder and self.folder.resolve()

    def tokenizer_from(self) -> Any:
        """The folder with the tokenizer; of a new model the tokenizer itself."""
        return self.folder or _household_tokenizer()

    def tokenizer(self) -> Any:
        """The `transformers` tokenizer."""
        return hf.load_tokenizer(self.folder) if self.folder else _household_tokenizer()


# --- From a reference to a model ----------------------------------------------------------------


def model_folder(reference: str) -> Path:
    """The folder of a reference that names one, in a bucket too, or a model of the package.

    ValueError if the package has no such model, or the path is an address of another kind.
    """
    if reference.startswith(bucket.SCHEME):
        return bucket.model_folder(reference, name="student` or `teacher", wanted=hf.is_needed)
    if not reference.startswith("embedded:"):
        return local_path(reference, name="student` or `teacher")
    folder = EMBEDDED / (name := reference.removeprefix("embedded:"))
    if not name or not folder.is_dir():
        known = ", ".join(
            f"embedded:{path.parent.name}" for path in sorted(EMBEDDED.glob("*/config.json"))
        )
        raise ValueError(f"the package has no model `{reference}`, only {known}")
    return folder


def find_model(reference: str, *, field: str) -> FoundModel:
    """The model that a reference names; no weight is read. All processes call it.

    Args:
      reference: a folder, `embedded:NAME`, or `workdir:DIR[@STEP]`.
      field: the setting that gives it, for errors.

    Raises:
      ValueError: there is no such folder, run or checkpoint.
    """
    if not (run := re.fullmatch(r"workdir:(.+?)(?:@(\d+|newest|best))?", reference)):
        folder = model_folder(reference)
        return FoundModel(reference, hf.read_config(folder), folder)
    name = f"{field}` = `{reference}"
    workdir = bucket.place(run[1], name=name)
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"`{name}`: `{workdir}` holds no run: it has no config.json{closest_run(workdir)}"
        )
    step = find_step(workdir, run[2] or "newest", name=name)
    what = f"`{path}`"
    try:
        settings = read_settings(read_stored(path))
        what = "what its run began with"
        base = find_student(settings)
    except ValueError as error:
        raise ValueError(f"`{name}`: {what}: {error}") from None
    checkpoint = Checkpoint(workdir, step, settings, base)
    with closing(checkpoint.open()) as checkpoints:
        # Padding that the run's teacher lacks was cut from what was trained, not below adapters.
        embed = checkpoints.shapes(step).get("params/embed", (base.sizes.vocab_size,))
    sizes = dataclasses.replace(base.sizes, vocab_size=embed[0])
    return FoundModel(reference, sizes, base.folder, checkpoint)


def find_student(settings: Settings) -> FoundModel:
    """The student before any update, a new one too; raises as `find_model`."""
    if settings.student == "new":
        return FoundModel("new", new_sizes(settings)[0], None)
    return find_model(settings.student, field="student")


def find_models(settings: Settings, who: Collection[str] = MODELS) -> dict[str, FoundModel]:
    """`student` and `teacher`, those in `who` that there are; raises as `find_model`."""
    found = {name: find_student(settings) for name in who if name == "student"}
    if "teacher" in who and settings.teacher:
        found["teacher"] = find_model(settings.teacher, field="teacher")
    return found


def named_sizes(settings: Settings, who: Collection[str] = MODELS) -> dict[str, ModelConfig]:
    """Sizes of `student` and `teacher`, of those in `who` that there are; no weight is read."""
    return {name: model.sizes for name, model in find_models(settings, who).items()}


def new_sizes(settings: Settings) -> tuple[ModelConfig, Any]:
    """Sizes of a new student, and its tokenizer."""
    assert settings.new_model is not None  # as settings are checked
    tokenizer = _household_tokenizer()
    return dataclasses.replace(settings.new_model, vocab_size=len(tokenizer)), tokenizer


def _household_tokenizer() -> Any:
    from opd_jax.envs.household.tokenizer import build

    return build(phrases=PHRASES)


def find_step(workdir: Path, which: str, *, name: str) -> int:
    """The step of the checkpoint that `which` names: its number, "newest" or "best".

    `name` is the flag or field that gives it, for errors. All processes call it.

    Raises:
      ValueError: the workdir keeps no such checkpoint.
    """
    found: Any = None
    if processes.is_first():
        best = read_summary(workdir / "summary.json").get("best")
        found = saved_steps(workdir / "checkpoints"), best
    steps, best = processes.first(found)
    if not steps:
        near = closest_run(workdir)
        raise ValueError(f"`{name}`: `{workdir}` has no checkpoint yet; let the run save one{near}")
    kept = f"it keeps those of {', '.join(map(str, steps))}"
    if which == "newest":
        return steps[-1]
    if which == "best":
        if best is None or best["step"] not in steps:
            raise ValueError(
                f"`{name}`: `{workdir}` has no best checkpoint, as a run with `eval.every` and "
                f"`checkpoint.best` has; {kept}"
            )
        return best["step"]
    if not which.isdecimal():
        raise ValueError(f"`{name}`: expected the number of an update, newest or best; got {which}")
    if int(which) not in steps:
        raise ValueError(f"`{name}`: `{workdir}` has no checkpoint of update {which}; {kept}")
    return int(which)


# --- Which model it is ----------------------------------------------------------------------------


def fingerprints(settings: Settings, who: Collection[str] = MODELS) -> dict[str, str]:
    """A hash of each model in `who` that is read, not of a new one (`hf.fingerprint`).

    And of what the judge has of its own, a model or a file with its question, and of the file that
    the teacher is told from.
    """
    models = find_models(settings, who).items()
    found = {name: fingerprint(model) for name, model in models if model.name != "new"}
    if settings.judge.prompt and settings.asks_teacher and "teacher" in who:
        found["judge.prompt"] = read_prompt(settings.judge.prompt).fingerprint
    if settings.teacher_context.by == "solved" and "teacher" in who:
        file = bucket.place(settings.teacher_context.file, name="teacher_context.file")
        found["teacher_context.file"] = recorded_panel(file).digest
    if settings.demonstrations and settings.demonstrations.histories and "teacher" in who:
        found["demonstrations.histories"] = recorded_panel(histories_file(settings)).digest
    if settings.judge_model and "teacher" in who:
        found["judge.model"] = fingerprint(find_model(settings.judge_model, field="judge.model"))
    return found


def histories_file(settings: Settings) -> Path:
    """The file that `demonstrations.histories` names."""
    assert settings.demonstrations is not None  # as it is asked for
    return bucket.place(settings.demonstrations.histories, name="demonstrations.histories")


def fingerprint(model: FoundModel) -> str:
    """Tells models apart wherever they lie: `hf.fingerprint`, or a hash of a checkpoint.

    A checkpoint's is of the model that its run began with, and of the smallest array that was
    trained, which differs after every update. All processes call it.

    Raises:
      ValueError: a folder has errors that `hf` names; or adapters were trained beside another model
        than the one that is there now.
    """
    if model.checkpoint is None:
        assert model.folder is not None  # a new model has no fingerprint
        return hf.fingerprint(model.folder)
    run, step = model.checkpoint, model.checkpoint.step
    began = read_summary(run.workdir / MODELS_FILE).get("student")
    if run.settings.lora.rank and began not in (None, now := fingerprint(run.base)):
        raise ValueError(
            f"`{model.name}` has adapters of another model than `{run.base.name}` holds now "
            f"(fingerprint {began} then, {now} now); put the one back that its run began with"
        )
    with closing(run.open()) as checkpoints:
        shapes = {
            path: shape
            for path, shape in checkpoints.shapes(step).items()
            if path.startswith("params/")
        }
        path = min(shapes, key=lambda path: (math.prod(shapes[path]), path))
        leaf: Any = jax.ShapeDtypeStruct(shapes[path], jnp.dtype(run.settings.dtype))
        for name in reversed(path.split("/")):
            leaf = {name: leaf}
        arrays, _ = checkpoints.restore(step, leaf, partial=True)
    lora = run.settings.lora if run.settings.lora.rank else None
    found = hashlib.sha256(repr((began, model.sizes, lora, path)).encode())
    found.update(jax.tree.leaves(arrays)[0].tobytes())
    return found.hexdigest()[:16]
