"""Which tasks a run plays, and in which order."""

from pathlib import Path

import pytest

from opd_jax.envs.base import NoTasks
from opd_jax.experience.tasks import (
    Panel,
    TaskOrder,
    check_same_tasks,
    find_panels,
    store_tasks,
)


def train_tasks(size: int, *, seed: int, start: int, count: int) -> list[int]:
    order = TaskOrder("train", size=size, seed=seed, count=count, per_task=1)
    return [index for _, index in order.from_number(start)]


def test_an_epoch_holds_every_task_once_and_the_next_has_another_order() -> None:
    two = train_tasks(50, seed=3, start=0, count=100)
    assert sorted(two[:50]) == sorted(two[50:]) == list(range(50))
    assert two[:50] != two[50:]
    assert two[:50] != list(range(50))
    assert len({tuple(train_tasks(50, seed=seed, start=0, count=50)) for seed in range(5)}) == 5


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_tasks_drawn_in_batches_are_those_drawn_at_once(batch: int) -> None:
    at_once = train_tasks(20, seed=0, start=0, count=96)
    in_batches = [
        task
        for start in range(0, 96, batch)
        for task in train_tasks(20, seed=0, start=start, count=batch)
    ]
    assert in_batches[:96] == at_once
    # A run that resumes in the middle has drawn nothing before.
    assert train_tasks(20, seed=0, start=45, count=20) == at_once[45:65]


class Counted:
    """An environment with as many tasks as it is told."""

    def __init__(self, tasks: int):
        self.tasks = tasks

    def size(self, split: str) -> int:
        if split != "train":
            raise ValueError(f"no split {split!r}; there is train")
        return self.tasks

    def digest(self, split: str) -> str:
        return f"{split}-{self.tasks}"


def test_a_split_has_its_size_and_digest_or_the_setting_that_named_it_is_told() -> None:
    assert find_panels(Counted(3), {"train": "data.split"}) == {"train": Panel(3, "train-3")}
    with pytest.raises(ValueError, match=r"`data.split`.*'train' has no tasks"):
        find_panels(Counted(0), {"train": "data.split"})
    with pytest.raises(ValueError, match=r"`eval.splits`.*'dev'.*train"):
        find_panels(Counted(3), {"dev": "eval.splits"})


class Partial(Counted):
    """Has the data of some splits."""

    def size(self, split: str) -> int:
        if split not in ("a", "b", "c"):
            raise ValueError(f"no split {split!r}")
        if split in self.absent:
            raise NoTasks(f"no file {split}.jsonl")
        return self.tasks

    def __init__(self, absent: str):
        super().__init__(2)
        self.absent = absent


def test_a_benchmarks_missing_split_is_left_out_unless_all_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    splits = dict.fromkeys("abc", "eval.splits")
    for absent, left in (("", "abc"), ("b", "ac"), ("ac", "b")):
        assert [*find_panels(Partial(absent), splits, optional="abc")] == [*left]
    assert caplog.text.count("no file a.jsonl; split 'a' is left out") == 1
    with pytest.raises(ValueError, match=r"`eval.splits`: no file a.jsonl"):
        find_panels(Partial("abc"), splits, optional="abc")
    # Asked for by name, or unknown: a mistake.
    with pytest.raises(ValueError, match=r"`eval.splits`: no file b.jsonl"):
        find_panels(Partial("b"), splits, optional="ac")
    with pytest.raises(ValueError, match=r"`eval.splits`: no split 'd'"):
        find_panels(Partial(""), {"d": "eval.splits"}, optional="d")


def test_a_workdir_holds_the_tasks_of_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    check_same_tasks("train", Panel(3, "a"), tmp_path)  # nothing is known of it yet
    store_tasks({"train": Panel(3, "a"), "test": Panel(1, "b")}, tmp_path)
    assert capsys.readouterr().out == "train: 3 tasks, digest a\ntest: 1 tasks, digest b\n"
    check_same_tasks("train", Panel(3, "a"), tmp_path)
    with pytest.raises(ValueError, match=rf"`data.split`: .*{tmp_path}.*digest a then, c now"):
        check_same_tasks("train", Panel(3, "c"), tmp_path)
