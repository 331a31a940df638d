"""Workdirs and models in a bucket: what a kill leaves, who may write, what cannot be had."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from buckets import BUCKET, FORBIDDEN, another_process, impatient, served
from processes import run_python

from opd_jax import hf
from opd_jax.config.references import model_folder
from opd_jax.export import export
from opd_jax.report.writers import JsonlWriter
from opd_jax.runtime import bucket, lease
from opd_jax.runtime.checkpoint import Checkpoints, saved_steps
from opd_jax.runtime.exits import WORLD, WorldFailed, printed
from opd_jax.runtime.lease import EXPIRES_S, FILE, Owner, _Claim, held

__all__ = ["impatient", "served"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(served: Any) -> Iterator[str]:
    """An empty place in the bucket."""
    served.objects.clear()
    served.written.clear()
    another_process()
    yield f"gs://{BUCKET}/some/run"
    another_process()


def place(url: str, **options: Any) -> Path:
    return bucket.place(url, name="--workdir", **options)


def objects(served: Any) -> dict[str, bytes]:
    return {name.removeprefix("some/run/"): data for name, data in served.contents().items()}


# --- Files


def test_what_is_written_in_a_mirror_is_in_the_bucket_and_in_the_next_mirror(
    url: str, served: Any
) -> None:
    folder = place(url)
    (folder / "episodes").mkdir(parents=True)
    for name, text in {"a.json": "1", "lines": "x\n", "episodes/1": "e"}.items():
        (folder / name).write_text(text)
    (folder / "77.a.json.tmp").touch()  # of a write under way
    bucket.upload(folder)
    assert objects(served) == {"a.json": b"1", "lines": b"x\n", "episodes/1": b"e"}

    with (folder / "lines").open("a") as lines:
        lines.write("y\n")
    (folder / "episodes" / "1").unlink()
    served.written.clear()
    bucket.upload(folder)
    bucket.upload(folder)
    assert served.written == ["some/run/lines"]  # only what has changed
    assert objects(served) == {"a.json": b"1", "lines": b"x\ny\n"}

    another_process()
    again = place(url + "/")
    assert again != folder
    files = {path.name: path.read_text() for path in again.rglob("*") if path.is_file()}
    assert files == {"a.json": "1", "lines": "x\ny\n"}
    assert place(f"{url}/lines").read_text() == "x\ny\n"
    assert printed(f"`{again}`") == f"`{url}`"


def test_a_file_that_is_replaced_as_it_is_uploaded_is_whole(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(url)
    folder.mkdir(parents=True)
    (folder / "a").write_text("12345678")
    (folder / "7.a.tmp").write_text("123")

    def replaced(file: Path, *given: Any, **options: Any) -> Any:
        (folder / "7.a.tmp").replace(folder / "a")
        return opened(file, *given, **options)

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", replaced)
        bucket.upload(folder)
    assert objects(served) == {"a": b"123"}
    served.written.clear()
    bucket.upload(folder)
    assert served.written == []


def test_a_mirror_is_brought_up_to_date_and_is_without_what_is_large(url: str, served: Any) -> None:
    folder = place(url)
    folder.mkdir(parents=True)
    large = ("checkpoints/1/state/d", "profile/x", "model/model.safetensors", "lease.json")
    for name in ("kept", "replaced", "removed", *large):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    bucket.upload(folder)
    another_process()
    there = place(url)
    assert {path.name for path in there.rglob("*")} == {"kept", "replaced", "removed"}
    kept = (there / "kept").stat().st_mtime_ns
    bucket._bucket(there).blob("some/run/replaced").upload_from_string("new")
    bucket._bucket(there).blob("some/run/removed").delete()
    bucket.fetch(there)
    assert {path.name: path.read_text() for path in there.iterdir()} == {
        "kept": "old",
        "replaced": "new",
    }
    assert (there / "kept").stat().st_mtime_ns == kept  # not fetched again
    bucket.upload(there)
    assert set(objects(served)) == {"kept", "replaced", *large}  # which it has never seen


def test_what_is_replaced_while_it_is_fetched_stays_in_the_bucket(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.api_core.exceptions import NotFound
    from google.cloud.storage import Blob

    def replaced(_: Any, file: Path, **__: Any) -> None:
        file.unlink()  # as the client does
        raise NotFound("of this generation")

    folder = place(url)
    folder.mkdir(parents=True)
    (folder / "a").write_text("1")
    bucket.upload(folder)
    bucket._blob(folder / "a").upload_from_string("2")
    with monkeypatch.context() as patch:
        patch.setattr(Blob, "download_to_filename", replaced)
        bucket.fetch(folder)
    bucket.upload(folder)
    assert objects(served) == {"a": b"2"}
    bucket.fetch(folder)
    assert (folder / "a").read_text() == "2"


def test_while_a_workdir_is_held_it_is_uploaded_again_and_again_and_at_the_end(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_S", 0.05)
    with held(place(url)) as folder:
        (folder / "a").write_text("1")
        deadline = time.monotonic() + 60
        while "a" not in objects(served) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert objects(served)["a"] == b"1"
        monkeypatch.setattr(bucket, "UPLOAD_S", 600)
        time.sleep(0.2)
        (folder / "b").write_text("2")
    assert objects(served) == {"a": b"1", "b": b"2"}


def test_mirrors_of_killed_processes_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import time; from opd_jax.runtime import bucket; print(bucket._mirrors()[0], flush=1)"
    words = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    another_process()
    older = tmp_path / f"{bucket._PREFIX}older"  # of an older version, which may live
    older.mkdir()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        theirs = Path(process.stdout.readline().strip())
        (theirs / "runs").mkdir()
        ours = bucket._mirrors()[0]
        assert {*tmp_path.iterdir()} == {older, theirs, ours}
        process.kill()
    assert (theirs / "runs").is_dir()
    another_process()
    ours = bucket._mirrors()[0]
    assert {*tmp_path.iterdir()} == {older, ours}
    another_process()
    assert {*tmp_path.iterdir()} == {older}


def test_a_path_of_this_machine_imports_nothing() -> None:
    code = (
        "import sys, opd_jax.train, opd_jax.view\n"
        "from pathlib import Path\n"
        "from opd_jax.runtime import bucket\n"
        "assert bucket.place('runs/a', name='--workdir') == Path('runs/a')\n"
        "bucket.upload(Path('runs/a')), bucket.fetch(Path('runs/a'))\n"
        "print([name for name in ('google.cloud', 'gcsfs', 'fsspec') if name in sys.modules])"
    )
    assert run_python(code) == "[]"


# --- Checkpoints


def tree(seed: float) -> dict[str, jax.Array]:
    return {"w": jax.numpy.arange(12.0) * seed, "n": jax.numpy.int32(7)}


def test_checkpoints_come_back_to_the_bit_and_the_newest_are_kept(url: str, served: Any) -> None:
    checkpoints = Checkpoints(place(url) / "checkpoints", keep=2)
    assert (checkpoints.latest(), checkpoints.restore_latest(tree(0))) == (None, None)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {"cursor": step})
    checkpoints.close()
    another_process()
    again = Checkpoints(place(url) / "checkpoints", keep=2)
    assert saved_steps(again.directory) == [2, 3]
    assert not any(name.startswith("checkpoints/1/") for name in objects(served))
    step, arrays, meta = again.restore_latest(tree(0))
    assert (step, meta) == (3, {"cursor": 3})
    np.testing.assert_array_equal(arrays["w"], tree(3)["w"])
    assert again.shapes(2) == {"w": (12,), "n": ()}
    again.close()


def test_a_save_that_was_killed_counts_for_nothing_and_goes_with_the_next(
    url: str, served: Any
) -> None:
    checkpoints = Checkpoints(place(url) / "checkpoints", keep=9)
    for step in (1, 2):
        checkpoints.save(step, tree(step), {})
    checkpoints.close()
    del served.objects[BUCKET]["some/run/checkpoints/2/commit_success.txt"]
    another_process()
    again = Checkpoints(place(url) / "checkpoints", keep=9)
    assert again.restore_latest(tree(0))[0] == 1
    again.save(3, tree(3), {})
    again.close()
    steps = {name.split("/")[1] for name in objects(served) if name.startswith("checkpoints/")}
    assert (saved_steps(again.directory), steps) == ([1, 3], {"1", "3"})


def test_a_hard_kill_loses_no_line_that_a_checkpoint_covers_and_none_stands_twice(
    url: str, served: Any
) -> None:
    folder = place(url)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    lines = JsonlWriter(folder / "metrics.jsonl", resume_step=None)
    for step in (1, 2, 3):
        lines.write(step, {"loss": 0.5})
        if step == 2:
            checkpoints.save(step, tree(step), {})
            checkpoints.wait()
    names = [name.removeprefix("some/run/") for name in served.written]
    assert names.index("metrics.jsonl") < names.index("checkpoints/2/commit_success.txt")
    checkpoints.close()
    bucket.upload(folder)  # half a minute passes
    another_process()

    folder = place(url)
    again = Checkpoints(folder / "checkpoints", keep=2)
    assert again.latest() == 2
    lines = JsonlWriter(folder / "metrics.jsonl", resume_step=2)
    for step in (3, 4):
        lines.write(step, {"loss": 0.5})
    again.save(4, tree(4), {})
    again.close()
    written = objects(served)["metrics.jsonl"].splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2, 3, 4]


# --- The lease


def leave(url: str, *, age_s: float = 0.0, at: str = "", **owner: Any) -> None:
    """A lease that another process might have left."""
    content = dataclasses.asdict(dataclasses.replace(Owner.this_process(), **owner))
    text = json.dumps({"owner": content, "heartbeat": time.time() - age_s, "folder": at or url})
    bucket._blob(place(url, is_new=True) / FILE).upload_from_string(text)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


HOLD = """
import sys, time
from opd_jax.runtime import bucket, lease
lease.HEARTBEAT_S = 0.05
lease.EXPIRES_S = float(sys.argv[2])
with lease.held(bucket.place(sys.argv[1], name="--workdir")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(url: str, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """A living process that holds the lease with frequent heartbeats; parameter: `EXPIRES_S`."""
    expires_s = str(getattr(request, "param", EXPIRES_S))
    words, pipe = [sys.executable, "-c", HOLD, url, expires_s], subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_with_the_same_workdir_is_refused_until_the_first_is_gone(
    url: str, served: Any, holder: Any
) -> None:
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is working in") as error:
        held(place(url)).__enter__()
    assert f"`{url}`" in printed(str(error.value))
    first = json.loads(objects(served)[FILE])
    time.sleep(0.5)
    assert json.loads(objects(served)[FILE])["heartbeat"] > first["heartbeat"]
    holder.kill()
    holder.wait()
    with held(place(url)):
        assert json.loads(objects(served)[FILE])["owner"]["pid"] != holder.pid
    assert objects(served) == {}


@pytest.mark.parametrize("is_released", [False, True])
def test_a_process_that_lost_its_lease_ends(
    url: str, served: Any, holder: Any, is_released: bool
) -> None:
    if is_released:
        with served.lock:  # between two heartbeats
            del served.objects[BUCKET][f"some/run/{FILE}"]
    else:
        leave(url, host="elsewhere")
    assert holder.wait(60) == WORLD
    (line,) = holder.stderr.read().splitlines()
    assert f"the lease on `{url}` was lost" in line
    assert (FILE in objects(served)) != is_released


@pytest.mark.parametrize("holder", [2.0], indirect=True)
def test_a_process_that_cannot_renew_its_lease_ends(url: str, served: Any, holder: Any) -> None:
    time.sleep(1)
    before = served.contents()
    served.is_closed = True  # to all
    try:
        assert holder.wait(60) == WORLD
    finally:
        served.is_closed = False
    (line,) = holder.stderr.read().splitlines()
    assert f"the lease on `{url}` was lost" in line
    assert served.contents().keys() == before.keys()


def test_without_a_lease_that_was_renewed_in_time_nothing_is_uploaded(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRES_S", 0.2)  # less than HEARTBEAT_S
    holding = held(place(url))
    folder = holding.__enter__()
    time.sleep(0.3)
    (folder / "a").write_text("1")
    with pytest.raises(WorldFailed, match="not renewed in time"):
        Checkpoints(folder / "checkpoints", keep=1).save(1, tree(1), {})
    with pytest.raises(WorldFailed, match="not renewed in time"):
        holding.__exit__(None, None, None)
    assert objects(served) == {}
    bucket.upload(folder)  # nobody holds it
    assert objects(served) == {"a": b"1"}


@pytest.mark.parametrize(
    "left",
    [
        lambda: {"pid": dead_pid()},
        lambda: {"host": "elsewhere", "age_s": EXPIRES_S + 1},
        lambda: {"at": f"gs://{BUCKET}/another/run"},  # it came with a copy
    ],
)
def test_a_lease_that_is_nobodys_is_taken_over(url: str, served: Any, left: Any) -> None:
    leave(url, **left())
    with held(place(url)):
        owner = json.loads(objects(served)[FILE])["owner"]
        assert owner == dataclasses.asdict(Owner.this_process())
    assert FILE not in objects(served)


@pytest.mark.parametrize("is_left", [False, True])
def test_a_lease_whose_answer_was_lost_is_held(url: str, served: Any, is_left: bool) -> None:
    if is_left:
        leave(url, pid=dead_pid())
    served.lost = 1
    with held(place(url)):
        owner = json.loads(objects(served)[FILE])["owner"]
        assert (owner, served.lost) == (dataclasses.asdict(Owner.this_process()), 0)
    assert objects(served) == {}


@pytest.mark.parametrize("is_left", [False, True])
def test_of_many_at_once_one_gets_the_lease(url: str, served: Any, is_left: bool) -> None:
    def claim(number: int) -> str:
        owner = dataclasses.replace(Owner.this_process(), host=f"machine {number}")
        claim = _Claim(folder, "--workdir", ours=owner, told=True)
        ready.wait()
        while (answer := claim.step()) == "again":
            pass
        return answer

    folder, count = place(url), 6
    if is_left:
        leave(url, pid=dead_pid())
    ready = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(claim, range(count)))
    assert sorted(answers) == ["", *["wait"] * (count - 1)]
    owner = json.loads(objects(served)[FILE])["owner"]
    assert owner["host"] == f"machine {answers.index('')}"


# --- Models


def test_a_model_is_fetched_once_and_again_where_it_was_replaced(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = place(url)
    source.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "original/x.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"{name} 1")
    bucket.upload(source)
    folder = model_folder(url)
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert files == {"config.json", "model.safetensors"}
    before = (folder / "model.safetensors").stat().st_mtime_ns

    (source / "config.json").write_text("config.json 2")
    (source / "model.safetensors").with_name("generation_config.json").write_text("{}")
    bucket.upload(source)
    (folder / "config.json").write_text("")  # and a fetch that the disk has lost
    bucket.model_folder.cache_clear()
    assert model_folder(url) == folder
    assert (folder / "config.json").read_text() == "config.json 2"
    assert (folder / "generation_config.json").is_file()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before

    for text in ("", '{"config.json": 1', "[]"):
        (folder / ".fetched.json").write_text(text)
        (folder / "config.json").write_text("config.json 3")  # as long as what is there
        bucket.model_folder.cache_clear()
        assert model_folder(url) == folder
        assert (folder / "config.json").read_text() == "config.json 2"


def test_a_model_is_uploaded_with_its_config_last(url: str, served: Any) -> None:
    folder = place(url)
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    bucket.upload(folder)
    assert served.written[-1] == "some/run/config.json"
    assert not hf.is_needed("pytorch_model.bin")


# --- What cannot be had


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gs://nowhere/run", "no such bucket .*; create it, or correct the name"),
        (f"gs://{FORBIDDEN}/run", r"no permission .*; give .* roles that docs/scaling\.md names"),
        ("gs://runs", "expected gs://BUCKET/PATH"),
        ("gs://runs/a/../b", "expected gs://BUCKET/PATH"),
        ("s3://runs/a", "is a URL"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_line(url: str, given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        place(given)
    assert given in printed(str(error.value))
    assert "`--workdir`" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_had_in_an_open_bucket_is_told_with_the_flag(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(url)  # it opens the bucket
    monkeypatch.setattr(served, "is_closed", True)
    with pytest.raises(ValueError, match=r"^`--workdir`: `.*/some/run`: no permission"):
        place(url)


def test_an_export_that_may_not_be_written_is_refused_before_anything_is_read(
    url: str, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")  # of no run
    out = place(url, is_new=True)
    with monkeypatch.context() as patch:
        patch.setattr(served, "is_read_only", True)
        with pytest.raises(ValueError, match="no permission") as error:
            export(tmp_path, out)
    assert url in printed(str(error.value))
    bucket._blob(out / ".probe").upload_from_string("")  # as a kill leaves it
    bucket.check_may_write(out)
    assert objects(served) == {}


def test_without_credentials_or_the_extra_a_line_says_what_to_do(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket._open.cache_clear()
    with monkeypatch.context() as patch:
        patch.delenv("STORAGE_EMULATOR_HOST")
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        with pytest.raises(ValueError, match="gcloud auth application-default login"):
            place(url)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(ValueError, match=r"pip install 'opd-jax\[gcs\]'"):
            place(url)


def test_credentials_need_no_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from google.cloud import storage

    names = ("client_id", "client_secret", "refresh_token")
    key, content = tmp_path / "key.json", {"type": "authorized_user", **dict.fromkeys(names, "x")}
    key.write_text(json.dumps(content))
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    monkeypatch.setattr(storage.Client, "get_bucket", lambda client, name, **_: name)
    bucket._open.cache_clear()
    assert bucket._open("some-bucket") == "some-bucket"
    bucket._open.cache_clear()


def test_a_server_that_is_away_from_the_start_is_asked_for_as_long_as_any(
    url: str, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:9")  # nobody listens
    with pytest.raises(WorldFailed, match=r"`--workdir`.* now: Timeout of 0\.5s exceeded"):
        place(url)


@pytest.mark.parametrize(
    ("method", "part", "ask"),
    [
        ("GET", "/o?", lambda path: bucket.fetch(path.parent)),  # the list
        ("GET", "alt=media", lambda path: bucket.fetch(path.parent)),
        ("GET", "alt=media", lambda path: bucket.Object(path).read()),
        ("POST", "", lambda path: bucket.Object(path).write("new", generation=1)),
        ("DELETE", "", lambda path: bucket.Object(path).delete()),
    ],
    ids=["list", "fetch", "read", "write", "delete"],
)
def test_a_server_that_goes_away_is_asked_for_as_long_as_any(
    url: str,
    served: Any,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
    method: str,
    part: str,
    ask: Any,
) -> None:
    path = place(url, is_new=True) / "a"
    bucket.Object(path).write("text", generation=0)
    monkeypatch.setattr(served, "away", (method, part))
    with pytest.raises(WorldFailed, match=r"cannot be reached now: Timeout of 0\.5s exceeded"):
        ask(path)


def test_a_server_that_is_away_is_no_mistake(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.api_core.exceptions import ServiceUnavailable

    def away(*_: Any, **__: Any) -> Any:
        raise ServiceUnavailable("try again")

    folder = place(url)
    monkeypatch.setattr(bucket._bucket(folder), "list_blobs", away)
    with pytest.raises(WorldFailed, match=r"cannot be reached now: 503 try again"):
        bucket.fetch(folder)
    bucket._open.cache_clear()
    assert lease._read(place(url) / FILE) is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(0, WorldFailed), (502, WorldFailed), (503, WorldFailed), (404, ValueError)],
)
def test_a_machine_whose_token_is_late_is_no_mistake_and_one_without_is(
    url: str, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[Exception]
) -> None:
    from google.auth.compute_engine import Credentials, _metadata
    from google.auth.exceptions import TransportError

    def answer(**_: Any) -> Any:
        if not status:
            raise TransportError("no route to the metadata server")
        return SimpleNamespace(status=status, data=b"", headers={})

    folder = place(url)
    monkeypatch.setattr(_metadata, "ExponentialBackoff", lambda total_attempts: [1])
    renew = lambda *_, **__: Credentials().refresh(answer)  # noqa: E731
    monkeypatch.setattr(bucket._bucket(folder), "list_blobs", renew)
    with pytest.raises(kind, match="metadata"):
        bucket.fetch(folder)
    bucket._open.cache_clear()


@pytest.mark.parametrize(("is_retryable", "kind"), [(True, WorldFailed), (False, ValueError)])
def test_whoever_gives_tokens_says_whether_to_ask_again(
    url: str, monkeypatch: pytest.MonkeyPatch, is_retryable: bool, kind: type[Exception]
) -> None:
    from google.auth.exceptions import RefreshError

    def renew(*_: Any, **__: Any) -> Any:
        raise RefreshError("no token", retryable=is_retryable)

    folder = place(url)
    monkeypatch.setattr(bucket._bucket(folder), "list_blobs", renew)
    with pytest.raises(kind, match="no token"):
        bucket.fetch(folder)
    bucket._open.cache_clear()


def test_the_heartbeat_goes_on_after_a_token_was_refused(
    url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.auth.exceptions import RefreshError

    refused = list[int]()

    def refuse(*given: Any, **options: Any) -> Any:
        if len(refused) < 3:
            refused.append(1)
            raise RefreshError("no token")
        return get_blob(*given, **options)

    def heartbeat() -> float:
        return json.loads(objects(served)[FILE])["heartbeat"]

    folder = place(url)
    get_blob = bucket._bucket(folder).get_blob
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.5)
    with held(folder):
        monkeypatch.setattr(bucket._bucket(folder), "get_blob", refuse)
        first, deadline = heartbeat(), time.monotonic() + 60
        while heartbeat() == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (heartbeat() > first, len(refused)) == (True, 3)
    bucket._open.cache_clear()
