"""Which updates a trace holds. `tests/test_train.py` traces those of a run."""

from pathlib import Path

import jax
import pytest

from opd_jax.runtime.profile import Profile


@pytest.mark.parametrize(
    ("asked", "done", "ran", "traced"),
    [
        (range(2, 4), 0, range(1, 6), {2, 3}),
        (range(2, 4), 2, range(3, 6), {3}),  # the run was resumed
        (range(2, 9), 0, range(1, 4), {2, 3}),  # it was stopped
        (range(2, 4), 3, range(4, 6), set()),
        (range(0), 0, range(1, 3), set()),
    ],
)
def test_the_trace_holds_what_runs_of_the_updates_asked_for(
    asked: range, done: int, ran: range, traced: set[int], tmp_path: Path
) -> None:
    profile = Profile(tmp_path, asked, done=done)
    for update in ran:
        profile.begin(update)
        with jax.profiler.TraceAnnotation(f"update {update}"):
            pass
        profile.end(update)
    profile.close()
    files = list(tmp_path.rglob("*.xplane.pb"))
    assert len(files) == bool(traced)
    planes = [p for f in files for p in jax.profiler.ProfileData.from_file(str(f)).planes]
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert {n for n in range(10) if f"update {n}" in names} == traced
