"""Checkpoints: what is saved is restored bit for bit, or refused with a reason."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.runtime import processes
from opd_jax.runtime.checkpoint import Checkpoints, saved_steps
from opd_jax.runtime.exits import DISK


def train_state(seed: int) -> dict:
    """Parameters in two dtypes, AdamW state after an update, single and stacked keys."""
    key = jax.random.key(seed)
    params = {
        "layers": {"w": jax.random.normal(key, (4, 5)), "norm": jnp.arange(5, dtype=jnp.bfloat16)},
        "head": [jax.random.normal(key, (7,)), jnp.int8(seed)],
    }
    floats = {"layers": params["layers"], "head": params["head"][:1]}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = tx.update(floats, tx.init(floats), floats)
    return {
        "params": params,
        "opt_state": opt_state,
        "rng": key,
        "row_rngs": jax.random.split(key, 3),
        "step": jnp.uint32(seed),
    }


def bits(tree) -> list:
    """Structure, dtypes and raw bytes of a tree."""
    leaves = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )
    raw = [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(leaves)]
    return [jax.tree.structure(tree), *raw]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def two_saved(directory: Path) -> Path:
    """A directory with checkpoints 10 and 20, closed."""
    checkpoints = Checkpoints(directory, keep=5)
    checkpoints.save(10, train_state(10), {"cursor": 10})
    checkpoints.save(20, train_state(20), {"cursor": 20})
    checkpoints.close()
    return directory


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def restore(directory: Path, tree: Any, **options: Any) -> Any:
    """Restores the newest checkpoint as a new process would."""
    checkpoints = Checkpoints(directory, keep=5)
    try:
        return checkpoints.restore_latest(tree, **options)
    finally:
        checkpoints.close()


def test_the_best_is_kept_besides_the_newest_until_another_is(directory: Path) -> None:
    checkpoints, state = Checkpoints(directory, keep=2), {"w": jnp.zeros(3)}
    kept = []
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5), (7, 5), (8, 5)):
        checkpoints.best = best
        checkpoints.save(step, state, {})
        checkpoints.wait()
        kept.append(saved_steps(directory))
    checkpoints.close()
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8]]


def test_a_round_trip_is_bit_equal_and_prints_nothing(directory, capfd, caplog):
    state = train_state(3)
    meta = {"cursor": 7, "rng": {"state": 2**127 - 1}, "seen": ["a", None, 0.1], "done": False}
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(5, state, meta)
    checkpoints.close()
    step, arrays, restored_meta = restore(directory, abstract(state))
    assert (step, restored_meta) == (5, meta)
    assert bits(arrays) == bits(state)
    assert bits(jax.random.split(arrays["rng"])) == bits(jax.random.split(state["rng"]))
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if "orbax" in record.pathname] == []


def test_nothing_saved_restores_nothing_and_creates_nothing(directory):
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.restore_latest(abstract(train_state(0))) is None
    with pytest.raises(ValueError, match="no checkpoint 4"):
        checkpoints.restore(4, abstract(train_state(0)))
    checkpoints.close()
    assert not directory.exists()


def test_the_newest_are_kept(directory):
    checkpoints = Checkpoints(directory, keep=2)
    for step in (1, 2, 5, 9):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"step": step})
        assert checkpoints.latest() == step
    checkpoints.close()
    assert sorted(int(path.name) for path in directory.iterdir()) == [5, 9]
    for step in (5, 9):
        arrays, meta = checkpoints.restore(step, {"x": jnp.zeros(3, jnp.int32)})
        assert (arrays["x"].tolist(), meta) == ([step] * 3, {"step": step})
    with pytest.raises(ValueError, match=r"no checkpoint 2 .*\[5, 9\]"):
        checkpoints.restore(2, {"x": jnp.zeros(3, jnp.int32)})


def test_a_saved_step_is_never_written_again(two_saved):
    checkpoints = Checkpoints(two_saved, keep=5)
    before = files_in(two_saved)
    for step in (15, 20):
        with pytest.raises(ValueError, match="greater than 20"):
            checkpoints.save(step, train_state(0), {})
    with pytest.raises(ValueError, match="`meta`"):
        checkpoints.save(30, train_state(0), {"path": Path()})
    checkpoints.close()
    assert files_in(two_saved) == before


def test_arrays_may_be_donated_while_a_save_is_under_way(directory):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1024, 1024))
    checkpoints = Checkpoints(directory, keep=3)
    for number in (1, 2, 3):
        x = step(x)
        checkpoints.save(number, {"x": x}, {})
        x = step(x)
    for number in (1, 2, 3):
        arrays, _ = checkpoints.restore(number, abstract({"x": x}))
        np.testing.assert_array_equal(arrays["x"], 2 * number - 1)
    checkpoints.close()


def test_restoring_follows_the_sharding_asked_for(directory):
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    columns = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
    x = jax.random.normal(jax.random.key(0), (2 * len(devices), 3 * len(devices)))
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, {"x": jax.device_put(x, rows)}, {})
    for sharding in (rows, columns, jax.sharding.SingleDeviceSharding(devices[-1])):
        target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
        restored = checkpoints.restore(1, target)[0]["x"]
        assert restored.sharding.is_equivalent_to(sharding, 2)
        assert bits(restored) == bits(x)
    checkpoints.close()


def bytes_read() -> int:
    """Bytes that this process has read since it started."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_part_is_restored_without_reading_the_rest(directory):
    rng = np.random.default_rng(0)
    part = {"params": {"layers": {"w": jnp.asarray(rng.normal(size=(4, 500)), jnp.bfloat16)}}}
    moments = [jnp.asarray(rng.normal(size=(1000, 2000)), jnp.float32) for _ in range(2)]
    checkpoints = Checkpoints(directory, keep=1)
    whole = {**part, "opt_state": moments, "rng": jax.random.key(0)}
    checkpoints.save(1, whole, {"cursor": 1})
    checkpoints.wait()

    before = bytes_read()
    step, arrays, meta = checkpoints.restore_latest(abstract(part), partial=True)
    read = bytes_read() - before
    assert (step, meta) == (1, {"cursor": 1})
    assert bits(arrays) == bits(part)
    assert read < moments[0].nbytes / 10
    shapes = checkpoints.shapes(1)
    assert shapes["params/layers/w"] == (4, 500)
    assert shapes["opt_state/1"] == (1000, 2000)

    before = bytes_read()
    checkpoints.restore_latest(abstract(whole))
    assert bytes_read() - before > moments[0].nbytes
    checkpoints.close()


def test_arrays_asked_for_without_a_sharding_are_restored_to_the_host(directory):
    device = jax.devices()[-1]
    saved = {"host": jnp.arange(3, dtype=jnp.bfloat16), "there": jnp.arange(4), "count": 7}
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, saved, {})
    place = jax.sharding.SingleDeviceSharding(device)
    target = {
        "host": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        "there": jax.ShapeDtypeStruct((4,), jnp.int32, sharding=place),
    }
    _, arrays, _ = checkpoints.restore_latest(target, partial=True)
    checkpoints.close()
    assert type(arrays["host"]) is np.ndarray
    assert arrays["there"].devices() == {device}
    assert bits(arrays) == bits({name: saved[name] for name in target})


KILLED = """
import os, signal, sys
import jax
from opd_jax.runtime.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=3)
big = lambda seed: {"x": jax.random.normal(jax.random.key(seed), (4096, 4096)),
                    "rng": jax.random.key(seed)}
checkpoints.save(1, big(1), {"cursor": 1})
checkpoints.wait()
state = jax.block_until_ready(big(2))
checkpoints.save(2, state, {"cursor": 2})
while len(os.listdir(sys.argv[1])) < 2:  # the thread that writes has not begun
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_of_a_save_loses_only_that_save(directory):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory)],
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # The kill came during the write of 64 MiB.
    assert (directory / "2").exists() is False
    unfinished = [path.name for path in directory.iterdir() if path.name != "1"]
    assert len(unfinished) == 1

    saved = {"x": jax.random.normal(jax.random.key(1), (4096, 4096)), "rng": jax.random.key(1)}
    checkpoints = Checkpoints(directory, keep=3)
    step, arrays, meta = checkpoints.restore_latest(abstract(saved))
    assert (step, meta) == (1, {"cursor": 1})
    assert bits(arrays) == bits(saved)
    checkpoints.save(2, {"x": saved["x"] + 1}, {"cursor": 2})
    assert checkpoints.latest() == 2
    assert bits(checkpoints.restore(2, {"x": saved["x"]})[0]) == bits({"x": saved["x"] + 1})
    checkpoints.close()


def test_what_killed_saves_left_counts_for_nothing_and_goes_with_the_next_save(two_saved):
    left = [two_saved / f"{step}.orbax-checkpoint-tmp{end}" for step, end in ((30, ""), (7, "-12"))]
    for path in left:
        shutil.copytree(two_saved / "20", path)
    (two_saved / "40").write_text("a file")
    (two_saved / "notes").mkdir()
    assert saved_steps(two_saved) == [10, 20]
    # Who only reads removes nothing: it could be another's save under way.
    step, arrays, _ = restore(two_saved, abstract(train_state(0)))
    assert step == 20
    assert bits(arrays) == bits(train_state(20))
    assert all(path.exists() for path in left)
    checkpoints = Checkpoints(two_saved, keep=5)
    checkpoints.restore_latest(abstract(train_state(0)))  # as a run that resumes
    checkpoints.save(30, train_state(30), {})
    checkpoints.close()
    assert saved_steps(two_saved) == [10, 20, 30]
    assert {path.name for path in two_saved.iterdir()} == {"10", "20", "30", "40", "notes"}


def test_a_step_that_all_agreed_on_is_read_without_listing_again(two_saved, monkeypatch):
    checkpoints = Checkpoints(two_saved, keep=5)
    # As a process sees it whose view of a network file system is old.
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "first", lambda value: 20)
    monkeypatch.setattr("opd_jax.runtime.checkpoint.saved_steps", lambda directory: [10])
    step, arrays, _ = checkpoints.restore_latest(abstract(train_state(0)))
    checkpoints.close()
    assert step == 20
    assert bits(arrays) == bits(train_state(20))


FULL = """
import resource, signal, sys
import jax.numpy as jnp
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import reported
checkpoints = Checkpoints(sys.argv[1], keep=3)
checkpoints.save(1, {"x": jnp.ones(10)}, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with reported():
    checkpoints.save(2, {"x": jnp.arange(1 << 20)}, {})
    checkpoints.wait()
"""


def test_a_write_that_fails_is_told_once_and_older_checkpoints_stay(directory):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(directory)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == DISK, line
    assert line.startswith("error: the disk is full or cannot be written: ")
    assert saved_steps(directory) == [1]
    _, arrays, _ = restore(directory, {"x": jnp.zeros(10)})
    assert arrays["x"].tolist() == [1.0] * 10


def truncate(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        os.truncate(file, file.stat().st_size // 2)


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


DAMAGE = [
    (truncate, "state/d"),
    (delete, "state/d"),
    (truncate, "state/manifest.ocdbt"),
    (truncate, "state/_METADATA"),
    (delete, "state/_METADATA"),
    (truncate, "meta/metadata"),
    (delete, "meta"),
    (delete, "state"),
]


@pytest.mark.parametrize(("damage", "part"), DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_older_one_named(two_saved, damage, part, capfd):
    damage(two_saved / "20" / part)
    before = files_in(two_saved)
    checkpoints = Checkpoints(two_saved, keep=5)
    with pytest.raises(ValueError, match="cannot be restored") as error:
        checkpoints.restore_latest(abstract(train_state(0)))
    message = str(error.value)
    assert "\n" not in message
    assert f"checkpoint `{two_saved / '20'}`" in message
    assert f"older checkpoint `{two_saved / '10'}`, move `{two_saved / '20'}` away" in message
    assert files_in(two_saved) == before
    assert capfd.readouterr() == ("", "")

    # The advice works: the older one is intact, and the steps after it can be saved again.
    checkpoints.close()
    (two_saved / "20").rename(two_saved.parent / "20")
    step, arrays, meta = checkpoints.restore_latest(abstract(train_state(0)))
    assert (step, meta) == (10, {"cursor": 10})
    assert bits(arrays) == bits(train_state(10))
    checkpoints.save(20, train_state(20), {"cursor": 20})
    assert checkpoints.latest() == 20
    checkpoints.close()


def test_a_damaged_checkpoint_without_an_older_one_says_so(directory):
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, train_state(1), {})
    checkpoints.close()
    truncate(directory / "1" / "state" / "d")
    with pytest.raises(ValueError, match="no older checkpoint; start again with another"):
        restore(directory, abstract(train_state(0)))


def test_arrays_of_another_model_are_refused_by_name(two_saved):
    state = abstract(train_state(0))
    wide = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    half = jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)
    layers = state["params"]["layers"]
    cases = {
        "params/layers/w`.*4, 5.*4, 6": {"layers": {**layers, "w": wide}},
        "params/layers/w`.*float32.*bfloat16": {"layers": {**layers, "w": half}},
        "params/extra`.*absent there": {"extra": half},
        "params/layers/norm`.*absent was expected": {"layers": {"w": layers["w"]}},
    }
    checkpoints = Checkpoints(two_saved, keep=5)
    before = files_in(two_saved)
    for pattern, change in cases.items():
        other = {**state, "params": {**state["params"], **change}}
        with pytest.raises(ValueError, match=pattern) as error:
            checkpoints.restore_latest(other)
        assert "\n" not in str(error.value)
        assert f"`{two_saved / '20'}`" in str(error.value)
        if "was expected" not in pattern:  # a part may leave out what was saved
            with pytest.raises(ValueError, match=pattern):
                checkpoints.restore_latest({"params": other["params"]}, partial=True)
    assert files_in(two_saved) == before
    checkpoints.close()


def test_of_writes_that_the_disk_fails_asyncio_says_nothing_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import opd_jax.runtime.checkpoint as module

    module._quieten_orbax()
    full, bug = OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug of ours")
    for error in (full, bug):
        logging.getLogger("asyncio").error("never retrieved", exc_info=error)
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [bug]
