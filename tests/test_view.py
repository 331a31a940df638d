"""The viewer, in a real browser: what is shown, what can be done, and on what."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, open_browser
from episodes import VERDICTS, episode, write_episodes

from opd_jax import view

SUCCEEDED, FAILED, PLAIN, LATER = range(4)
EPISODES = [
    episode(0, success=True, end="success", verdicts=["SKIP", "WEAK"], who="before", update=0),
    episode(1, verdicts=["STRONG", "DET_FAIL", "SKIP"]),
    {
        "messages": [
            {"role": "user", "content": "Plainly asked."},
            {"role": "assistant", "content": "Plainly answered."},
        ]
    },
    episode(3, verdicts=["WEAK"] * 12, update=20),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    view.view(write_episodes(folder / "some.jsonl", EPISODES))
    return folder / "some.html"


def text_of(browser: Browser, selector: str) -> str:
    browser.frames()
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


def attribute(browser: Browser, selector: str, name: str) -> str | None:
    element = f"document.querySelector({json.dumps(selector)})"
    return browser.evaluate(f"{element}?.getAttribute({json.dumps(name)})")


def shown(x: float) -> str:
    """A number as the page writes it: three digits, at most four of them behind the point."""
    return f"{round(float(f'{x:.3g}'), 4):g}".replace("-", "−")


def listed(browser: Browser) -> list[int]:
    """The episodes in the list."""
    seen = "[...document.querySelectorAll('#list li')].filter(r => r.checkVisibility())"
    return browser.evaluate(f"{seen}.map(r => Number(r.dataset.episode))")


def chosen(browser: Browser) -> int:
    return int(attribute(browser, "li:has([aria-current])", "data-episode") or -1)


def focused(browser: Browser) -> str:
    """The token that has the focus, or the turn."""
    what = "document.activeElement.dataset.token ?? document.activeElement.ariaLabel"
    return browser.evaluate(what)


def set_filter(browser: Browser, name: str, value: str) -> None:
    field = f"document.querySelector('#filters [name={name}]')"
    browser.evaluate(
        f"(f => {{ f.value = {json.dumps(value)}; f.dispatchEvent(new Event('input', "
        f"{{bubbles: true}})); }})({field})"
    )


# --- The command


def test_it_says_what_it_wrote(in_process: Callable, tmp_path: Path) -> None:
    source = write_episodes(tmp_path / "some.jsonl", EPISODES)
    out = tmp_path / "new" / "page.html"
    said = in_process(view.main, source, f"--out={out}")
    assert said == f"4 episodes written to {out} ({out.stat().st_size / 1e6:.1f} MB)\n"


def test_of_a_workdir_it_shows_all_files(in_process: Callable, tmp_path: Path) -> None:
    (tmp_path / "episodes").mkdir()
    for k, one in enumerate(EPISODES):
        write_episodes(tmp_path / "episodes" / f"{k}.jsonl", [one])
    assert in_process(view.main, tmp_path).startswith("4 episodes written to ")
    assert (tmp_path / "episodes.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "arguments are required: FILE|WORKDIR; see --help"),
        (["FOLDER/some.jsonl", "--ot=x"], "unrecognized arguments: --ot=x"),
        (["FOLDER/none.jsonl"], "does not exist; give an episode file, or a workdir"),
        (["FOLDER"], "has no episodes/*.jsonl"),
        (["FOLDER/some.jsonl", "--out=FOLDER/some.jsonl"], "is what is to be shown"),
        (["FOLDER/some.jsonl", "--out=FOLDER"], "a path cannot be used"),
        (["FOLDER/bad.jsonl"], "line 1: not an object with a list `messages`"),
        (["FOLDER/binary.jsonl"], "is not a text file"),
        (["FOLDER/empty.jsonl"], "holds no episode"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_episodes(tmp_path / "some.jsonl", EPISODES)
    (tmp_path / "bad.jsonl").write_text("[]\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        view.main([word.replace("FOLDER", str(tmp_path)) for word in words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


# --- The page


def test_without_a_browser_these_tests_fail_and_say_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssertionError, match="sudo apt-get install chromium"):
        Browser()


def test_it_asks_for_nothing_and_its_code_runs(browser: Browser, page: Path) -> None:
    browser.open(page)
    for key in "njcnjcpkc":
        browser.press(key, "ArrowRight", "ArrowLeft", "Escape")
    assert browser.requests == [page.as_uri()]
    assert browser.errors == []


def test_each_turn_shows_what_is_known_of_it(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("n")
    expected = EPISODES[FAILED]
    turns = browser.evaluate("[...document.querySelectorAll('.turn')].map(t => t.textContent)")
    assert len(turns) == 3 + 1
    for k, (turn, said) in enumerate(zip(expected["turns"], turns, strict=False)):
        assert f"Observation {k} of episode 1." in said
        assert turn["verdict"] in said
        assert f"environment {turn['label']}" in said
        assert turn["action"] in said
        assert "confidence 0.8" in said
        for word, score in turn["judge"].items():
            assert f"{word}{shown(score)}" in said
    assert "unknown_action" in turns[1]
    assert "weight 1.28 = z 1.6 · i 1 · c 0.8" in turns[0]
    assert "Nothing happens." in turns[3]
    response = "".join(expected["student_tokens"]["text"][:12])
    assert browser.evaluate("document.querySelector('.response').textContent") == response
    facts = text_of(browser, "#head")
    for fact in ("train-1", "update 10", "no success", "ended by turn_limit", "z 1.6"):
        assert fact in facts
    label = attribute(browser, "#chart svg", "aria-label") or ""
    divergence = expected["student_tokens"]["divergence"][12:24]
    assert f"1: {shown(sum(divergence) / 12)} nats DET_FAIL" in label
    # A shape for each verdict, one of the judge's and one of the environment's a turn.
    assert browser.evaluate("document.querySelectorAll('#chart .mark').length") == 6


def test_a_plain_conversation_is_shown_without_colours_or_chart(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    browser.press("n", "n")
    assert chosen(browser) == PLAIN
    assert "Plainly asked." in text_of(browser, "#turns")
    assert "Plainly answered." in text_of(browser, "#turns")
    hidden = "['chart', 'colours'].map(id => document.getElementById(id).hidden)"
    assert browser.evaluate(hidden) == [True, True]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("success", "true", [SUCCEEDED]),
        ("success", "false", [FAILED, PLAIN, LATER]),
        ("verdict", "WEAK", [SUCCEEDED, LATER]),
        ("verdict", "DET_FAIL", [FAILED]),
        ("failures", "true", [FAILED]),
        ("failures", "false", [SUCCEEDED, PLAIN, LATER]),
        ("when", "train, update 20", [LATER]),
        ("when", "before, update 0", [SUCCEEDED]),
    ],
)
def test_a_filter_lists_those_that_pass(
    name: str, value: str, expected: list[int], browser: Browser, page: Path
) -> None:
    browser.open(page)
    assert listed(browser) == [SUCCEEDED, FAILED, PLAIN, LATER]
    options = f"[...document.querySelectorAll('#filters [name={name}] option')].map(o => o.value)"
    assert value in browser.evaluate(options)
    set_filter(browser, name, value)
    assert listed(browser) == expected
    assert text_of(browser, "#count") == f"{len(expected)} of 4 episodes"
    assert chosen(browser) == expected[0]
    set_filter(browser, name, "")
    assert len(listed(browser)) == 4


def test_text_is_searched_in_all_messages_and_filters_combine(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("/", *"PLAINLY answ")  # keys of a search field are text
    assert listed(browser) == [PLAIN]
    set_filter(browser, "text", "observation 1 of episode")
    assert listed(browser) == [SUCCEEDED, FAILED, LATER]
    set_filter(browser, "verdict", "SKIP")
    assert listed(browser) == [SUCCEEDED, FAILED]
    set_filter(browser, "text", "nowhere")
    assert listed(browser) == []
    assert text_of(browser, "#count") == "0 of 4 episodes"


# --- Tokens


def painted(browser: Browser) -> list[dict[str, Any]]:
    """Opacity and hue (red − blue) of each token's background, and whether it is underlined."""
    return browser.evaluate(
        "[...document.querySelectorAll('[data-token]')].map(t => {"
        "const style = getComputedStyle(t), part = style.backgroundColor.match(/[\\d.]+/g);"
        "return {opacity: part.length < 4 ? 1 : Number(part[3]), warm: part[0] - part[2],"
        "underlined: style.textDecorationLine === 'underline'}; })"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_tokens_are_coloured_by_what_is_chosen(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    columns = EPISODES[SUCCEEDED]["student_tokens"]
    ratio = [
        s - t for s, t in zip(columns["student_logprob"], columns["teacher_logprob"], strict=True)
    ]
    seen = {}
    for name, values in (
        ("divergence", columns["divergence"]),
        ("weight", columns["weight"]),
        ("log_ratio", ratio),
    ):
        browser.click(f"label:has([value={name}])")
        seen[name] = painted(browser)
        assert len(seen[name]) == len(values)
        # The farther from 0, the stronger; below 0 in another hue.
        by_size = sorted(zip(map(abs, values), seen[name], strict=True), key=lambda pair: pair[0])
        strengths = [token["opacity"] for _, token in by_size]
        assert strengths == sorted(strengths)
        assert strengths[-1] > strengths[0]
        for value, token in zip(values, seen[name], strict=True):
            assert token["opacity"] < 0.02 or (token["warm"] > 0) == (value > 0)
            assert not token["underlined"]
    assert seen["divergence"] != seen["weight"]
    assert any(value < 0 for value in ratio)
    browser.click("label:has([value=agrees])")
    assert [not token["underlined"] for token in painted(browser)] == columns["agrees"]


def test_the_legend_says_what_the_colours_are(browser: Browser, page: Path) -> None:
    browser.open(page)
    legends = {}
    for name in ("divergence", "weight", "log_ratio", "agrees"):
        legends[name] = " ".join(text_of(browser, "#legend").split())
        browser.press("c")
    scales = browser.evaluate("index.scales")
    assert legends["divergence"].startswith("0 ")
    assert legends["divergence"].endswith(f" {scales['divergence']:g} nats")
    assert legends["log_ratio"].startswith(f"−{scales['log_ratio']:g} ")
    assert "student − teacher" in legends["log_ratio"]
    assert "teaches nothing" in legends["weight"]
    assert "first choices of teacher and student differ" in legends["agrees"]
    assert browser.evaluate("document.querySelector('input:checked').value") == "divergence"


def card(browser: Browser) -> str:
    return text_of(browser, "#card") if browser.evaluate("!card.hidden") else ""


def expected_rows(token: int) -> list[list[str]]:
    top = EPISODES[SUCCEEDED]["student_tokens"]["top"][token]
    return [
        [text.replace(" ", "␣"), f"{100 * teacher:.1f} %", f"{100 * student:.1f} %"]
        for text, teacher, student in top
    ]


ROWS = (
    "[...document.querySelectorAll('#card tbody tr')]"
    ".map(row => [...row.children].map(cell => cell.textContent))"
)


def test_hovering_shows_the_top_five(browser: Browser, page: Path) -> None:
    browser.open(page)
    for token in (3, 14):
        browser.hover(f'[data-token="{token}"]')
        assert browser.evaluate(ROWS) == expected_rows(token)
        divergence = EPISODES[SUCCEEDED]["student_tokens"]["divergence"][token]
        assert f"divergence {shown(divergence)}" in " ".join(card(browser).split())
    browser.hover(".observation")
    assert card(browser) == ""


def test_a_tap_shows_the_top_five_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=844)
    browser.tap('[data-token="5"]')
    browser.wait("!card.hidden")
    assert browser.evaluate(ROWS) == expected_rows(5)
    inside = "(b => b.left >= 0 && b.right <= innerWidth && b.bottom <= innerHeight)"
    assert browser.evaluate(f"{inside}(card.getBoundingClientRect())")
    browser.tap("#head")
    browser.wait("card.hidden")


def test_a_number_that_is_not_finite_stands_out(browser: Browser, tmp_path: Path) -> None:
    broken = episode(0)
    broken["student_tokens"]["divergence"][2] = float("nan")
    view.view(write_episodes(tmp_path / "a.jsonl", [broken]))
    browser.open(tmp_path / "a.html")
    assert attribute(browser, ".odd", "data-token") == "2"
    browser.hover('[data-token="2"]')
    assert "NaN" in card(browser)


def test_an_episode_of_which_nothing_is_finite_is_shown(browser: Browser, tmp_path: Path) -> None:
    broken = episode(0, verdicts=["WEAK", "SKIP"], z=None)
    columns = broken["student_tokens"]
    for name in ("teacher_logprob", "divergence", "weight"):
        columns[name] = [None] * len(columns["text"])
    columns["top"] = [[[word, None, share] for word, _, share in top] for top in columns["top"]]
    for turn in broken["turns"]:
        turn |= {"intervention": None, "confidence": None}
    view.view(write_episodes(tmp_path / "a.jsonl", [broken]))
    browser.open(tmp_path / "a.html")
    assert browser.evaluate("document.querySelectorAll('.odd').length") == len(columns["text"])
    browser.hover('[data-token="2"]')
    said = " ".join(card(browser).split())
    student = columns["student_logprob"][2]
    for words in ("divergence", "weight", "log p, teacher"):
        assert f"{words} not finite" in said
    assert f"log p, student {shown(student)}" in said
    assert {row[1] for row in browser.evaluate(ROWS)} == {"not finite"}
    browser.press("c", "c", "c", "c")  # every colour
    everything = "document.body.innerText"
    assert "NaN" not in browser.evaluate(everything)
    assert "undefined" not in browser.evaluate(everything)


# --- Keys


def test_keys_go_through_episodes_turns_and_tokens(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("n")
    assert chosen(browser) == FAILED
    browser.press("p", "p")
    assert chosen(browser) == SUCCEEDED
    browser.press("n", "n", "n", "n")
    assert chosen(browser) == LATER
    turns = []
    for key in "jjjk":
        browser.press(key)
        turns.append(focused(browser))
    assert turns == ["Turn 0", "Turn 1", "Turn 2", "Turn 1"]
    top = "document.activeElement.getBoundingClientRect().top"
    assert 0 < browser.evaluate(top) < 200
    browser.press("ArrowRight")
    assert focused(browser) == "12"  # the first of turn 1
    assert "turn 1" in card(browser)
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert focused(browser) == "13"
    browser.press("ArrowLeft", "ArrowLeft")
    assert focused(browser) == "11"  # the last of turn 0
    browser.press("j")
    assert focused(browser) == "Turn 1"
    assert card(browser) == ""
    browser.press("ArrowRight", "Escape")
    assert card(browser) == ""


def test_the_keys_are_said_and_the_tab_key_reaches_tokens(browser: Browser, page: Path) -> None:
    browser.open(page)
    said = " ".join(text_of(browser, "#keys").split())
    for part in ("n p episode", "j k turn", "← → token", "c colour", "/ search"):
        assert part in said
    assert browser.evaluate("document.getElementById('keys').getBoundingClientRect().bottom <= 800")
    reached = (
        "[...document.querySelectorAll('[data-token][tabindex=\"0\"]')].map(t => t.dataset.token)"
    )
    assert browser.evaluate(reached) == ["0", "12"]


def test_next_and_previous_keep_to_the_filter(browser: Browser, page: Path) -> None:
    browser.open(page)
    set_filter(browser, "verdict", "WEAK")
    browser.press("n")
    assert chosen(browser) == LATER
    assert text_of(browser, "#place") == "2 of 2"
    assert browser.evaluate("document.getElementById('next').disabled")


# --- Hostile text, screens, size


def test_hostile_text_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    hostile = (
        "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 2'>"
        "<!-- <script> \u2028 {{data}} {{script}} &lt; <b>bold</b>"
    )
    one = episode(0, verdicts=["WEAK"], task={"id": hostile, "split": hostile}, who=hostile)
    one["messages"] = [
        {"role": role, "content": hostile} for role in ("system", "user", "assistant", "user")
    ]
    one["end"], one["measures"] = hostile, {hostile: 1.0}
    one["turns"][0] |= {"action": hostile, "failure": hostile, "label": hostile, "stop": hostile}
    one["turns"][0] |= {"verdict": hostile, "judge": {hostile: -1.0}}
    one["student_tokens"]["text"][0] = hostile
    one["student_tokens"]["top"][0] = [[hostile, 0.5, 0.5]] * 5
    plain = {"messages": [{"role": "assistant", "content": hostile}]}
    path = write_episodes(tmp_path / "a.jsonl", [one, plain])
    view.view(path)
    browser.open(tmp_path / "a.html")
    browser.evaluate("document.querySelector('details').open = true")
    browser.hover('[data-token="0"]')
    for selector in (
        *("#list .title", "#head h2", ".system .text", ".observation", '[data-token="0"]'),
        *(".action", ".failed", ".after .text", ".score"),
    ):
        text = f"document.querySelector({json.dumps(selector)}).textContent"
        assert hostile[:60] in browser.evaluate(text), selector
    assert "<b>bold</b>" in card(browser).replace("␣", " ")
    browser.press("n")
    assert hostile in browser.evaluate("document.querySelector('.response').textContent")
    assert browser.evaluate("window.taken") is None
    assert browser.evaluate("document.querySelectorAll('img, b b, main script').length") == 0
    assert browser.requests == [(tmp_path / "a.html").as_uri()]
    assert browser.errors == []


# Texts whose contrast with what lies behind them is below 4.5 (WCAG AA).
FAINT = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const over = (...colours) => {
    paint.clearRect(0, 0, 1, 1);
    for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || element.disabled) continue;
    if (!element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest("svg, script, noscript, option, [hidden]")) continue;
    const behind = [], style = getComputedStyle;
    for (let e = element; e; e = e.parentElement) behind.unshift(style(e).backgroundColor);
    const text = light(over(...behind, style(element).color)), ground = light(over(...behind));
    const contrast = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    if (contrast < 4.5) faint.push([contrast, element.className, element.textContent]);
  }
  return faint;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_text_is_readable_and_nothing_is_cut_off(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    ground = browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 384) == dark
    for _ in range(4):
        for _ in range(4):
            assert browser.evaluate(FAINT) == []
            browser.press("c")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.press("n", "ArrowRight")


def test_on_a_phone_the_list_opens_and_closes(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=844)
    seen = "document.getElementById('episodes').checkVisibility({visibilityProperty: true})"
    assert not browser.evaluate(seen)
    browser.click("#open")
    assert browser.evaluate(seen)
    browser.click(f'[data-episode="{LATER}"] button')
    assert not browser.evaluate(seen)
    assert chosen(browser) == LATER


def test_verdicts_have_shapes_and_words_and_not_only_colours(browser: Browser, page: Path) -> None:
    browser.open(page)
    shapes = set()
    for verdict in (*VERDICTS, "DET_FAIL"):
        chip = f"document.body.appendChild(verdictChip('{verdict}'))"
        words, shape, filled = browser.evaluate(
            f"(chip => [chip.textContent, chip.querySelector('.mark').innerHTML,"
            f"getComputedStyle(chip.querySelector('.mark')).fill !== 'none'])({chip})"
        )
        assert words == verdict
        shapes.add((shape, filled))
    assert len(shapes) == 4


@pytest.fixture(scope="module")
def long_episodes() -> list[dict[str, Any]]:
    """Eight episodes of 12,000 tokens, every other one in a single turn."""
    forms: list[dict[str, Any]] = [
        {"verdicts": ["WEAK"], "tokens_per_turn": 12_000},
        {"verdicts": ["WEAK", "SKIP", "STRONG"] * 10, "tokens_per_turn": 400},
    ]
    made = [episode(k, **form) for k, form in enumerate(forms)]
    return [{**made[k % 2], "update": k} for k in range(8)]


def test_long_episodes_are_drawn_one_at_a_time_and_in_pieces(
    browser: Browser,
    long_episodes: list[dict[str, Any]],
    tmp_path: Path,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    assert all(len(e["student_tokens"]["text"]) == 12_000 for e in long_episodes)
    view.view(write_episodes(tmp_path / "a.jsonl", long_episodes))
    browser.open(tmp_path / "a.html")
    drawn = "document.querySelectorAll('[data-token]').length"
    record_testsuite_property("viewer_ready_ms", int(attribute(browser, "html", "data-ready") or 0))
    assert browser.evaluate("parsed.size") == 1
    browser.wait("document.documentElement.hasAttribute('data-drawn')")
    assert browser.evaluate(drawn) == 12_000
    response = "document.querySelector('.response').textContent"
    assert browser.evaluate(response) == "".join(long_episodes[0]["student_tokens"]["text"])
    # A key draws what it goes to; the rest comes later.
    browser.evaluate("choose(1), 0")
    assert browser.evaluate("parsed.size") == 2
    assert (
        browser.evaluate("(choose(0), document.querySelectorAll('[data-token]').length)") < 12_000
    )
    browser.evaluate("choose(1), goToTurn(29)")
    assert focused(browser) == "Turn 29"


def test_a_page_has_at_most_20_mb_and_says_what_it_left_out(
    browser: Browser, long_episodes: list[dict[str, Any]], in_process: Callable, tmp_path: Path
) -> None:
    source = write_episodes(tmp_path / "a.jsonl", long_episodes + long_episodes[:2])
    said = in_process(view.main, source)
    out = tmp_path / "a.html"
    assert out.stat().st_size <= 20_000_000
    written, left_out = said.splitlines()
    assert written.startswith("10 episodes")
    assert left_out.startswith("Left out, to stay within 20 MB: the top five tokens of ")
    browser.open(out)
    assert text_of(browser, "#left-out") == left_out
    assert "top five tokens of this episode were left out" in text_of(browser, "#head")
    browser.evaluate("choose(7)")  # the newest
    assert "left out" not in text_of(browser, "#head")
