"""Figures of episodes, and the tables of them."""

import json
from collections.abc import Sequence

import pytest
from scipy.stats import binomtest, sem, t

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.report.figures import judge_table, macro_average, results_table, summarize


def episode(actions: Sequence[str], *, end: str, score: float, failed: int = 0) -> Conversation:
    """One turn for each action; the last `failed` of them failed."""
    made = Conversation(task=None, end=end, score=score)
    for index, action in enumerate(actions):
        failure = "rejected" if index >= len(actions) - failed else ""
        made.turns.append(Turn("", (), "", "stop_token", action, failure, "", ""))
    return made


EPISODES = [
    episode(["go", "take", "go", "go"], end="success", score=1.0),  # two repeated
    episode(["look"], end="turn_limit", score=0.5, failed=1),
    episode(["go", "look", "", ""], end="turn_limit", score=0.0, failed=2),  # nothing is no action
    episode(["look", "look"], end="context", score=0.25),  # one repeated
    episode(["go"], end="success", score=1.0),
]


def test_figures_by_hand() -> None:
    figures = summarize(EPISODES)
    low, high = binomtest(2, 5).proportion_ci(0.95, method="wilson")
    scores = [1.0, 0.5, 0.0, 0.25, 1.0]
    half = t.ppf(0.975, 4) * sem(scores)
    assert figures == {
        "success": 2 / 5,
        "ci95": pytest.approx([low, high]),
        "score": pytest.approx(2.75 / 5),
        "score_ci95": pytest.approx([0.55 - half, 0.55 + half]),
        "turns": 12 / 5,
        "repeated": 3 / 12,
        "failed": 3 / 12,
        "n": 5,
        "broken": 0,
        "measures": {},
    }
    json.dumps(figures)


def test_measures_are_means_over_all_episodes() -> None:
    episodes = [episode(["go"], end="success", score=1.0) for _ in range(4)]
    episodes[0].measures = {"f1": 0.5}
    episodes[3].measures = {"f1": 1.0, "em": 1.0}
    episodes.append(episode(["go"], end="broken", score=0.0))
    episodes[4].measures = {"f1": 1.0}
    assert summarize(episodes)["measures"] == {"em": 0.25, "f1": 0.375}


def test_a_macro_average_counts_every_split_the_same() -> None:
    few, many = (
        [episode(["a", "a"], end="success", score=1.0, failed=1)] * 2,
        [episode(["a"], end="turn_limit", score=0.5)] * 8,
    )
    for one in (*few, *many):
        one.measures = {"f1": 0.3 if one.success else 0.1}
    parts = [summarize(played) for played in (few, many)]
    parts[1]["broken"] = 3
    average = macro_average(parts)
    expected = {"success": 0.5, "score": 0.75, "turns": 1.5, "repeated": 0.25, "failed": 0.25}
    assert {name: average[name] for name in expected} == expected
    assert (average["n"], average["broken"]) == (10, 3)
    assert average["measures"] == {"f1": pytest.approx(0.2)}
    assert average.keys() == parts[0].keys()
    # 2 of 2 and 0 of 8: what could be less is in the first, what could be more in the second.
    first = binomtest(2, 2).proportion_ci(0.95, method="wilson")
    second = binomtest(0, 8).proportion_ci(0.95, method="wilson")
    ends = [0.5 - (1 - first.low) / 2, 0.5 + second.high / 2]
    assert average["ci95"] == pytest.approx(ends)
    assert average["score_ci95"] == [0.75, 0.75]  # no score differs from the others of its split


def test_broken_episodes_are_counted_and_left_out() -> None:
    broken = episode(["go", "go"], end="broken", score=0.0, failed=1)
    figures = summarize([broken, *EPISODES, broken])
    assert figures == summarize(EPISODES) | {"broken": 2}
    assert "broken" not in results_table({"expert": {"s": summarize(EPISODES)}})
    header, _, row = results_table({"expert": {"s": figures}}).splitlines()
    assert header.split("|")[-2].strip() == "broken"
    assert row.split("|")[-2].strip() == "2"
    with pytest.raises(ValueError, match="environments of all 2 episodes broke"):
        summarize([broken, broken])


def test_episodes_without_a_turn_have_figures() -> None:
    silent = [Conversation(task=None, end="context") for _ in range(3)]
    figures = summarize(silent)
    assert (figures["success"], figures["turns"], figures["repeated"], figures["failed"]) == (
        *(0, 0, 0, 0),
    )
    assert figures["ci95"][0] == 0
    assert 0 < figures["ci95"][1] < 1


def test_the_table_has_a_row_for_everybody_and_split() -> None:
    figures = summarize(EPISODES)
    text = results_table({"before": {"a": figures, "b": figures}, "expert": {"a": figures}})
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["before", "a"], ["before", "b"], ["expert", "a"]]
    assert rows[0][2:] == [
        *("success", "95 % interval", "score", "turns", "repeated", "failed", "n"),
    ]
    assert rows[2][2:] == ["40.0%", "11.8% to 76.9%", "0.55", "2.4", "25.0%", "25.0%", "5"]


def test_it_is_said_plainly_that_somebody_never_acted() -> None:
    nothing = summarize([episode(["", ""], end="turn_limit", score=0.0, failed=2)])
    once = summarize([episode(["go", ""], end="turn_limit", score=0.0, failed=1)])
    said = results_table({"before": {"a": nothing, "b": once}, "after": {"a": once}})
    assert [line for line in said.splitlines() if line and not line.startswith("|")] == [
        "before on a: no turn held an action that could be carried out."
    ]


def columns(results: dict[str, dict]) -> list[str]:
    header = results_table(results).splitlines()[0]
    return [cell.strip() for cell in header.strip("|").split("|")]


def test_the_table_shows_scores_and_measures_where_they_say_something() -> None:
    won = [episode(["go"], end="success", score=1.0), episode(["go"], end="lost", score=0.0)]
    assert "score" not in columns({"expert": {"s": summarize(won)}})
    partly = summarize([*won, episode(["go"], end="lost", score=-0.5)])
    assert "score" in columns({"expert": {"s": partly}})
    won[0].measures = {"f1": 0.25}
    measured = {"a": {"s": summarize(won)}, "b": {"s": summarize(EPISODES)}}
    assert columns(measured)[3:6] == ["95 % interval", "score", "f1"]
    rows = results_table(measured).splitlines()[2:]
    assert [row.split("|")[6].strip() for row in rows] == ["0.125", "-"]


@pytest.mark.parametrize(
    ("digest", "shown"),
    [("0123", "s"), ("generated-0123", "s (generated)"), ("FactbookQA-0123", "s (FactbookQA)")],
)
def test_tables_say_what_the_tasks_are(digest: str, shown: str) -> None:
    figures = summarize(EPISODES) | {"digest": digest}
    judged = {"balanced_accuracy": 0.5, "ci95": [0.4, 0.6], "always_skip": 0.3, "n": 9}
    figures["judge"] = judged | {"precision": None, "recall": None}
    results = {"before": {"s": figures}}
    for text in (results_table(results), judge_table(results)):
        assert text.splitlines()[2].split("|")[2].strip() == shown
