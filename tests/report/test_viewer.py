"""The page of episodes: what is in it, what is left out, and that no text leaves its element."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from episodes import episode, write_episodes

from opd_jax.report.viewer import LIMIT_BYTES, make_page, read_episodes

HOSTILE = "</script><!-- <script>alert(1)</script>\u2028\ud800\"'&amp;"


class Data(HTMLParser):
    """The JSON elements of a page, as a browser finds them."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, Any] = {}
        self.scripts, self._name, self._text = 0, "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.scripts += tag == "script"
        self._name, self._text = dict(attrs).get("id", "") if tag == "script" else "", ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if self._name:
            self.found[self._name] = json.loads(self._text)
        self._name = ""


def test_a_page_holds_what_the_file_does_and_no_text_leaves_its_element() -> None:
    texts = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    episodes = [
        episode(0, task={"id": HOSTILE}, messages=texts, verdicts=["WEAK"]),
        {"messages": texts},
    ]
    page = make_page(episodes, title="a<b>")
    data = Data(page.html)
    assert data.scripts == 2 + 1 + 1  # two episodes, the list, the code
    assert data.found["episode-0"]["messages"] == texts
    assert data.found["index"]["episodes"][0]["title"] == HOSTILE
    assert data.found["index"]["title"] == "a<b>"
    assert (page.shown, page.left_out) == (2, "")
    columns = episodes[0]["student_tokens"]
    tokens = data.found["episode-0"]["tokens"]
    assert {name: tokens[name] for name in columns if name != "position"} == {
        name: columns[name] for name in columns if name != "position"
    }
    assert tokens["turn"] == [0] * 12


def test_numbers_that_are_not_finite_are_kept_by_name(tmp_path: Path) -> None:
    written = episode(0)
    written["student_tokens"]["divergence"][3] = math.nan
    written["turns"][0]["confidence"] = math.inf
    (read,) = read_episodes(write_episodes(tmp_path / "a.jsonl", [written]))
    data = Data(make_page([read], title="a").html).found
    assert data["episode-0"]["tokens"]["divergence"][3] == "NaN"
    assert data["episode-0"]["turns"][0]["confidence"] == "Infinity"
    assert data["index"]["scales"]["divergence"] > 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("[1]", "not an object with a list `messages`"),
        ('{"messages": [{"role": "user"}]}', "a message without `role` and `content`"),
        ('{"messages": [{"role": "user", "content": 1}]}', "`messages.content` is 1, not a text"),
        ('{"messages": [], "task": "a"}', '`task` is "a", not an object'),
        ('{"messages": [], "update": 1.5}', "`update` is 1.5, not a whole number"),
        ('{"messages": [], "turns": [{"verdict": 2}]}', "`turns.verdict` is 2, not a text"),
        ('{"messages": [], "student_tokens": {"position": []}}', "needs the columns"),
        ('{"messages": [], "student_tokens": {"text": 1}}', "`student_tokens.text` is 1"),
        ('{"messages": [], "turns": [3]}', "`turns` is not a list of objects"),
        (
            '{"messages": [], "student_tokens": {"position": [0], "text": ["a", "b"]}}',
            "the columns of `student_tokens` differ in length: position: 1, text: 2",
        ),
        (
            '{"messages": [], "student_tokens": {"position": [0], "text": ["a"]}}',
            "`student_tokens.position` lies outside `tokens.turn`, which has 0",
        ),
        (
            '{"messages": [], "tokens": {"turn": [0], "sampled_logprob": []},'
            ' "student_tokens": {"position": [0], "text": ["a"]}}',
            "the columns of `tokens` differ in length: turn: 1, sampled_logprob: 0",
        ),
    ],
)
def test_a_line_that_is_no_episode_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3") as raised:
        read_episodes(path)
    assert said in str(raised.value)


def test_without_episodes_there_is_no_page() -> None:
    with pytest.raises(ValueError, match="holds no episode"):
        make_page([], title="a")


def shown(page: str) -> dict[str, Any]:
    """Title of each episode in the page, and whether it has its top fives."""
    found = Data(page).found
    entries = found["index"]["episodes"]
    return {
        entry["title"]: "top" in found[f"episode-{k}"]["tokens"] for k, entry in enumerate(entries)
    }


def test_top_fives_are_left_out_first_then_episodes_of_the_earliest_updates() -> None:
    episodes = [
        episode(k, update=update, task={"id": f"{update}/{k}"}, tokens_per_turn=200)
        for k, update in enumerate([0, 0, 5, 5, 9, 9])
    ]
    everything = make_page(episodes, title="a")
    assert shown(everything.html) == dict.fromkeys(["0/0", "0/1", "5/2", "5/3", "9/4", "9/5"], True)
    without = [{**e, "student_tokens": {**e["student_tokens"], "top": []}} for e in episodes]
    for columns in (e["student_tokens"] for e in without):
        del columns["top"]
    bare, whole = len(make_page(without, title="a").html), len(everything.html)

    limit = (bare + whole) // 2
    page = make_page(episodes, title="a", limit_bytes=limit)
    assert len(page.html.encode()) <= limit
    some = shown(page.html)
    assert len(some) == 6
    assert some["9/4"]
    assert not some["0/1"]
    count = list(some.values()).count(False)
    assert f"the top five tokens of {count} of the episodes shown" in page.left_out
    assert page.left_out == Data(page.html).found["index"]["left_out"]

    limit = bare - 20_000
    page = make_page(episodes, title="a", limit_bytes=limit)
    assert len(page.html.encode()) <= limit
    assert page.shown < 6
    assert "0/1" not in shown(page.html)
    assert {"9/4", "9/5", "5/2"} <= shown(page.html).keys()
    assert f"{6 - page.shown} of 6 episodes, of update 0" in page.left_out

    with pytest.raises(ValueError, match=r"no episode of a fits in 0\.06 MB: the smallest has"):
        make_page(episodes, title="a", limit_bytes=60_000)


def test_the_limit_is_20_mb() -> None:
    assert LIMIT_BYTES == 20_000_000


def test_one_scale_serves_the_page_and_outliers_lie_beyond_it() -> None:
    episodes = [episode(k) for k in range(30)]
    for e in episodes:
        count = len(e["student_tokens"]["text"])
        e["student_tokens"]["divergence"] = [*([1.5] * (count - 1)), 1.7]
        e["student_tokens"]["weight"] = [0.0] * count
    episodes[0]["student_tokens"]["divergence"][0] = 300.0
    index = Data(make_page(episodes, title="a").html).found["index"]
    assert index["scales"]["divergence"] == 2.0
    assert index["scales"]["weight"] == 1.0
    assert index["signed"] == ["log_ratio"]
