"""The figures of episodes, and the tables that show them."""

import json
from collections.abc import Sequence

import pytest

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.report.figures import macro_average, summarize
from opd_jax.report.intervals import mean_interval, wilson_interval
from opd_jax.report.tables import judge_table, results_table, table
from opd_jax.runtime.exits import WorldFailed


def episode(
    actions: Sequence[str], *, end: str, score: float, failed: int = 0, **measures: float
) -> Conversation:
    """One turn for each action; the last `failed` of them failed."""
    made = Conversation(task=None, end=end, score=score, measures=measures)
    for index, action in enumerate(actions):
        failure = "rejected" if index >= len(actions) - failed else ""
        made.turns.append(Turn("", (), "", "stop_token", action, failure, "", ""))
    return made


EPISODES = [
    episode(["go", "take", "go", "go"], end="success", score=1.0),  # two repeated
    episode(["look"], end="turn_limit", score=0.5, failed=1),
    episode(["go", "look", "", ""], end="turn_limit", score=0.0, failed=2),  # "" repeats nothing
    episode(["look", "look"], end="context", score=0.25),  # one repeated
    episode(["go"], end="success", score=1.0),
]


def cells(text: str) -> list[list[str]]:
    """The cells of a table, without its rule and what is below it."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [found[0], *found[2:]]


# --- Figures


def test_figures_by_hand() -> None:
    figures = summarize(EPISODES)
    assert figures == {
        "success": 2 / 5,
        "ci95": list(wilson_interval(2, 5)),
        "score": pytest.approx(2.75 / 5),
        "score_ci95": list(mean_interval([1.0, 0.5, 0.0, 0.25, 1.0])),
        "turns": 12 / 5,
        "repeated": 3 / 12,
        "failed": 3 / 12,
        "n": 5,
        "broken": 0,
        "wins": "10001",
        "measures": {},
    }
    json.dumps(figures)


def test_measures_are_means_over_all_episodes() -> None:
    measured = [{"f1": 0.5}, {}, {}, {"f1": 1.0, "em": 1.0}]
    episodes = [episode(["go"], end="success", score=1.0, **measures) for measures in measured]
    assert summarize(episodes)["measures"] == {"em": 0.25, "f1": 0.375}


def test_a_macro_average_counts_every_split_the_same() -> None:
    few = [episode(["a", "a"], end="success", score=1.0, failed=1, f1=0.3)] * 2
    many = [episode(["a"], end="turn_limit", score=0.5, f1=0.1)] * 8
    parts = [summarize(few), summarize(many) | {"broken": 3}]
    # 2 of 2 and 0 of 8: the low end comes from the first, the high end from the second.
    low, high = wilson_interval(2, 2)[0], wilson_interval(0, 8)[1]
    assert macro_average(parts) == {
        "success": 0.5,
        "ci95": pytest.approx([0.5 - (1 - low) / 2, 0.5 + high / 2]),
        "score": 0.75,
        "score_ci95": [0.75, 0.75],  # no score differs from the others of its split
        "turns": 1.5,
        "repeated": 0.25,
        "failed": 0.25,
        "n": 10,
        "broken": 3,
        "measures": {"f1": pytest.approx(0.2)},
    }


def test_broken_episodes_are_counted_and_left_out() -> None:
    broken = episode(["go", "go"], end="broken", score=0.0, failed=1, f1=1.0)
    figures = summarize([broken, *EPISODES, broken])
    assert figures == summarize(EPISODES) | {"broken": 2, "wins": "-10001-"}
    assert "broken" not in results_table({"expert": {"s": summarize(EPISODES)}})
    header, row = cells(results_table({"expert": {"s": figures}}))
    assert (header[-1], row[-1]) == ("broken", "2")
    with pytest.raises(WorldFailed, match="environments of all 2 episodes broke"):
        summarize([broken, broken])


def test_episodes_that_do_not_fit_count_as_broken_and_all_of_them_are_a_mistake() -> None:
    unfit = Conversation(task=None, end="context")
    figures = summarize([unfit, *EPISODES])
    assert figures == summarize(EPISODES) | {"broken": 1, "wins": "-10001"}
    with pytest.raises(ValueError, match=r"`rollout.context_tokens`: none of 2 episodes fits"):
        summarize([unfit, unfit])
    with pytest.raises(WorldFailed, match="environments of all 2"):
        summarize([unfit, Conversation(task=None, end="broken")])


def test_episodes_without_a_turn_have_figures() -> None:
    figures = summarize([Conversation(task=None, end="failed") for _ in range(3)])
    assert [figures[name] for name in ("success", "turns", "repeated", "failed")] == [0] * 4
    assert figures["ci95"][0] == 0 < figures["ci95"][1] < 1


# --- Tables


def test_a_table_is_aligned_markdown() -> None:
    rows = [{"who": "a|b", "rate": 0.123456, "n": 400}, {"who": "[c]\nd", "rate": None}]
    assert table(rows, ["who", "rate", "n"]).splitlines() == [
        "| who   |   rate |   n |",
        "| ----- | -----: | --: |",
        "| a\\|b  | 0.1235 | 400 |",
        "| [c] d |      - |   - |",
    ]
    assert table([], ["who"]).splitlines() == ["| who |", "| --: |"]


def test_the_table_has_a_row_for_everybody_and_split() -> None:
    figures = summarize(EPISODES)
    results = {"before": {"a": figures, "b": figures}, "expert": {"a": figures, "b": None}}
    header, *rows = cells(results_table(results))
    assert [row[:2] for row in rows] == [["before", "a"], ["before", "b"], ["expert", "a"]]
    assert ", ".join(header[2:]) == "success, 95 % interval, score, turns, repeated, failed, n"
    assert rows[0][2:] == ["40.0%", "11.8% to 76.9%", "0.55", "2.4", "25.0%", "25.0%", "5"]


def test_it_is_said_plainly_that_somebody_never_acted() -> None:
    nothing = summarize([episode(["", ""], end="turn_limit", score=0.0, failed=2)])
    once = summarize([episode(["go", ""], end="turn_limit", score=0.0, failed=1)])
    said = results_table({"before": {"a": nothing, "b": once}, "after": {"a": once}})
    assert [line for line in said.splitlines() if line and not line.startswith("|")] == [
        "before on a: no turn held an action that could be carried out."
    ]


def test_the_table_shows_scores_and_measures_where_they_say_something() -> None:
    def won(**measures: float) -> list[Conversation]:
        first = episode(["go"], end="success", score=1.0, **measures)
        return [first, episode(["go"], end="lost", score=0.0)]

    assert "score" not in results_table({"a": {"s": summarize(won())}})
    measured = {"a": {"s": summarize(won(f1=0.25))}, "b": {"s": summarize(EPISODES)}}
    header, *rows = cells(results_table(measured))
    assert header[3:6] == ["95 % interval", "score", "f1"]
    assert [row[5] for row in rows] == ["0.125", "-"]


@pytest.mark.parametrize(
    ("digest", "shown"),
    [("0123", "s"), ("generated-0123", "s (generated)"), ("FactbookQA-0123", "s (FactbookQA)")],
)
def test_tables_say_what_the_tasks_are(digest: str, shown: str) -> None:
    judged = {"balanced_accuracy": 0.5, "ci95": [0.4, 0.6], "always_skip": 0.3, "n": 9}
    judged |= {"precision": 0.25, "recall": None}
    results = {"before": {"s": summarize(EPISODES) | {"digest": digest, "judge": judged}}}
    assert cells(results_table(results))[1][1] == shown
    row = ["before", shown, "0.50", "0.40 to 0.60", "0.30", "0.25", "", "9"]
    assert cells(judge_table(results))[1] == row
    assert judge_table({"before": {"s": summarize(EPISODES)}}) == ""
    asked_nothing = dict.fromkeys(judged) | {"n": 0}
    results = {"before": {"s": summarize(EPISODES) | {"judge": asked_nothing}}}
    assert cells(judge_table(results))[1] == ["before", "s", "", "", "", "", "", "0"]
