"""`bench` times the programs that the plan counts."""

import jax
import pytest

from opd_jax.bench import bench
from opd_jax.config import load
from opd_jax.plan.chips import LOCAL, find
from opd_jax.plan.programs import plan_run

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_every_program_of_an_update_is_run_and_its_time_counts_as_often_as_it_runs(
    small: tuple[str, ...],
) -> None:
    config = load("quickstart:method=opd,runlocal", [*small])
    result = bench(config, runs=1)
    plan = plan_run(config, find(LOCAL, local_chips=1))
    planned = [program for program in plan.programs if program.runs]
    rows = result["programs"]
    assert [(row["program"], row["runs"]) for row in rows] == [(p.name, p.runs) for p in planned]
    for row, program in zip(rows, planned, strict=True):
        assert row["seconds of an update"] == pytest.approx(row["runs"] * row["ms"] / 1e3)
        assert row["GB/s"] * row["ms"] == pytest.approx(sum(program.moved.values()) / 1e6)
        # The peaks of a CPU are not known.
        assert ("share" in row) == ("MFU" in row) == (jax.default_backend() != "cpu")
    seconds = {row["program"]: row["seconds of an update"] for row in rows}
    assert result["seconds of an update"] == pytest.approx(sum(seconds.values()))
    playing = ("copy to sample with", "first message", "observation", "sampling")
    rollout = sum(seconds[name] for name in playing if name in seconds)
    assert rollout > seconds["sampling"] > 0
    sampled = config.rollout.batch * plan.work.sampled
    assert result["sampled tokens per second of rollout"] == pytest.approx(sampled / rollout)
