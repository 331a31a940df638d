"""The search environment: how answers are scored, the turns, and the published question sets."""

import dataclasses
import hashlib
import json
import random
import re
from collections import Counter

import pytest

from opd_jax.envs.search import env as search_env
from opd_jax.envs.search.answers import exact_match, f1
from opd_jax.envs.search.env import FAILURES, SearchEnv, parse_response, shorten
from opd_jax.envs.search.players import Random, searches_left
from opd_jax.envs.search.questions import Question, digest, panel
from opd_jax.envs.search.record import Record, documents
from opd_jax.envs.search.retrieval import Passage, RetrievalError
from opd_jax.envs.search.searchqa import SearchQA, open_retriever, open_searchqa
from opd_jax.envs.search.searchqa_data import SETS, questions
from opd_jax.envs.turns import before_invented_turn

PASSAGES = (
    Passage("brandt", "Ilse Brandt", "Ilse Brandt was a clockmaker born in Marnfeld."),
    Passage("marnfeld", "Marnfeld", "Marnfeld is a town on the river Ode.\nIt has a market."),
    Passage("ode", "Ode", "The Ode is a river. " + "It flows on and on. " * 30),
    Passage("tern", "Tern", "The Tern is a river without a town."),
    Passage("alder", "Alder", "The Alder is a river with a mill."),
)
TWO_HOPS = Question(
    id="test/1",
    type="bridge",
    text="Which river flows through the birthplace of Ilse Brandt?",
    answers=("the Ode", "River Ode"),
    supporting=("brandt", "marnfeld"),
)
OPEN = dataclasses.replace(TWO_HOPS, id="test/2", supporting=())


class Words:
    """Finds the passages that share the most words with a query."""

    waits = False

    def search(self, queries, *, top):
        return [self._best(set(re.findall(r"\w+", query.lower())), top) for query in queries]

    def _best(self, words, top):
        def shared(passage):
            return len(words & set(re.findall(r"\w+", passage.contents.lower())))

        return sorted(filter(shared, PASSAGES), key=shared, reverse=True)[:top]


class Dead:
    """A search engine that is down."""

    waits = False

    def search(self, queries, *, top):
        raise RetrievalError("no answer from nowhere")


SETTINGS = {
    "retriever": Words(),
    "max_turns": 16,
    "max_searches": 8,
    "passages": 3,
    "passage_words": 40,
    "retry_wrong": False,
}


def make_env(**settings):
    return SearchEnv(panels={"test": lambda: (TWO_HOPS, OPEN)}, **{**SETTINGS, **settings})


def search(query):
    return f"<thought>Let me see.</thought>\n<action>search[{query}]</action>"


def answer(text):
    return f"<thought>I know.</thought>\n<action>answer[{text}]</action>"


# Answers


def other_normalize(text):
    """As in SQuAD: only ASCII punctuation and the three articles go."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def other_f1(answer, gold):
    a, g = other_normalize(answer), other_normalize(gold)
    if a == g:
        return 1.0
    if a and {" ".join(a), " ".join(g)} & {"yes", "no", "noanswer"}:
        return 0.0
    left, common = list(g), 0
    for word in a:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(g)
    return 2 * precision * recall / (precision + recall)


def test_scores_agree_with_an_independent_count():
    rng = random.Random(0)
    vocabulary = ["the", "A", "an", "Ode,", "ode", "river", "yes", "no", "U.S.", "us", "'"]
    vocabulary += ["“ode”", "Odé", "rock-n-roll", "rocknroll", "another"]
    seen = Counter()
    for _ in range(3000):
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 4))) for _ in range(3)]
        mine = f1(texts[0], texts[1:])
        assert mine == pytest.approx(max(other_f1(texts[0], gold) for gold in texts[1:]))
        exact = exact_match(texts[0], texts[1:])
        assert exact == any(other_normalize(texts[0]) == other_normalize(g) for g in texts[1:])
        assert mine == 1.0 or not exact
        seen[exact, 0 < mine < 1] += 1
    assert min(seen[True, False], seen[False, True], seen[False, False]) > 100


# Responses


def test_a_thought_may_name_the_passages_and_what_follows_the_action_may_not():
    thought = "<thought>It said <information>\n<information> x\nResult: y\nUser: z"
    for part in (
        thought,
        f"{thought}</thought>",
        f"{thought}</thought>\n<action>search[a]</action>",
    ):
        assert before_invented_turn(part, SearchEnv.invented)[1] is False
    acts = "<action>search[a]</action>"
    for reply in ("<information>", "\nResult: Doc", "\nYou: <thought>", " Result: <information>"):
        for before in (acts, f"{thought}</thought>{acts}", f"{thought}{acts}"):
            assert before_invented_turn(before + reply, SearchEnv.invented)[1] is True


def test_the_first_action_block_counts():
    for response, parsed in (
        (search("river Ode"), ("search", "river Ode", "")),
        (answer("Ode"), ("answer", "Ode", "")),
        ("<action> Search [ two\n lines ] </action>", ("search", "two lines", "")),
        ("<ACTION>answer[a [b] c]</ACTION>", ("answer", "a [b] c", "")),
        (search("first") + "<information>made up" + answer("x"), ("search", "first", "")),
        ("Result: <information>made up</information>" + answer("x"), ("", "", "no_action")),
        (
            "<thought>It said\n<information> x\nResult: y</thought>" + answer("y"),
            ("answer", "y", ""),
        ),
        ("<thought>open <action>answer[z]</action>", ("answer", "z", "")),
        ("You: " + search("named"), ("search", "named", "")),
        ("so\nUser: and?\n" + answer("x"), ("", "", "no_action")),
        ("<think>" + answer("x") + "</think>" + search("first"), ("search", "first", "")),
        ("", ("", "", "empty")),
        (" \n\t", ("", "", "empty")),
        ("search[river]", ("", "", "no_action")),
        ("<action>search[river]", ("", "", "no_action")),
        ("<action>look up[river]</action>", ("", "", "bad_action")),
        ("<action>search river</action>", ("", "", "bad_action")),
        ("<action>search[x] answer</action>", ("", "", "bad_action")),
        ("<action></action>", ("", "", "bad_action")),
        ("<action>search[ ]</action>", ("", "", "no_argument")),
        ("<action>answer[]</action>", ("", "", "no_argument")),
    ):
        assert parse_response(response) == parsed


# Episodes


def test_an_episode_from_question_to_answer():
    env = make_env()
    first = env.reset("test", 0)
    assert env.task.goal == TWO_HOPS.text
    assert env.task.scene == first.text
    assert first.text in first.message
    assert TWO_HOPS.text in first.message
    assert not first.done

    born = env.step(search("Ilse Brandt born"))
    assert (born.failure, born.end, born.action) == ("", "", "search[Ilse Brandt born]")
    assert documents(born.text)[0] == ("Ilse Brandt", PASSAGES[0].text)
    river = env.step(search("Marnfeld river"))
    shown = documents(river.text)
    assert shown[0] == ("Marnfeld", PASSAGES[1].text)
    assert len(shown) == 3
    assert searches_left(river.text) == 6

    last = env.step(answer("ode"))
    assert (last.end, last.success, last.score, last.failure) == ("success", True, 1.0, "")
    assert last.measures == {"f1": 1.0}
    with pytest.raises(ValueError, match="call `reset`"):
        env.step(answer("ode"))


def test_a_wrong_answer_ends_the_episode_unless_one_may_go_on():
    env = make_env()
    env.reset("test", 0)
    last = env.step(answer("the river Oder and river Ode"))
    assert (last.end, last.score, last.failure) == ("wrong_answer", 0.0, "")
    # Words: river oder and river ode, against river ode.
    assert last.measures["f1"] == pytest.approx(2 * 2 / (5 + 2))
    more = make_env(retry_wrong=True)
    assert search_env.MORE_ANSWERS in more.system
    assert search_env.MORE_ANSWERS not in env.system
    more.reset("test", 0)
    wrong = more.step(answer("Tern"))
    assert (wrong.end, wrong.text, wrong.score) == ("", search_env.WRONG, 0.0)
    assert more.step(answer("Ode")).success


def test_every_failure_of_the_table_is_told_and_searches_are_counted():
    env = make_env(max_searches=2, max_turns=8)
    assert len(env.reset("test", 0).admissible) == 2
    responses = {
        "empty": " ",
        "no_action": "I would search for rivers.",
        "bad_action": "<action>river</action>",
        "no_argument": search(""),
        "no_passages": search("zebra quagga"),  # counts as a search
        "": search("river"),
        "no_searches_left": search("river"),
    }
    assert responses.keys() - {""} == FAILURES.keys()
    for failure, response in responses.items():
        observation = env.step(response)
        assert observation.failure == failure
        assert not observation.done
        assert observation.message == observation.text
        if failure:
            assert observation.text.startswith(FAILURES[failure])
            assert observation.oracle == ""
    assert (documents(observation.text), searches_left(observation.text)) == ([], 0)
    assert observation.admissible == (search_env.ADMISSIBLE["answer"],)
    assert env.step("").end == "turn_limit"  # turns that fail are turns


def test_a_search_engine_that_is_down_breaks_the_episode_not_the_run():
    env = make_env(retriever=Dead())
    env.reset("test", 0)
    broken = env.step(search("river"))
    assert (broken.end, broken.failure, broken.success) == ("broken", "", False)
    assert "nowhere" in broken.text
    assert not env.reset("test", 1).done


def test_long_passages_are_cut_between_words_and_keep_their_lines():
    env = make_env(passage_words=6, passages=5)
    env.reset("test", 0)
    shown = dict(documents(env.step(search("river flows")).text))
    assert shown["Ode"] == "The Ode is a river. It ..."
    assert shown["Marnfeld"] == "Marnfeld is a town on the ..."
    assert shorten("one two\nthree", 3) == "one two\nthree"
    assert shorten("one two\nthree four", 3) == "one two\nthree ..."


def test_the_oracle_knows_which_searches_helped():
    env = make_env(passages=1)
    env.reset("test", 0)
    labels = [
        env.step(response).oracle
        for response in (
            search("Tern"),  # not what is needed
            search("tern"),  # and again
            search("Brandt clockmaker"),
            search("Marnfeld market"),
            search("Ode on flows"),  # nothing is missing any more
            answer("Ode"),
        )
    ]
    assert labels == ["WEAK", "STRONG", "SKIP", "SKIP", "STRONG", "SKIP"]
    env.reset("test", 0)
    assert env.step(answer("Tern")).oracle == "STRONG"
    env.reset("test", 1)  # the same question without recorded passages
    assert env.step(search("Tern")).oracle == ""
    assert env.step(answer("Ode")).oracle == ""


def test_a_reset_forgets_the_episode_before():
    def play(env):
        return [env.reset("test", 0), *map(env.step, (search("Tern"), search("Tern"), answer("x")))]

    env, fresh = make_env(), make_env()
    assert play(env) == play(env) == play(fresh)


def test_a_record_has_the_titles_shown_and_how_each_query_ended():
    # What FactbookQA said.
    found = """<information>
Doc 1 (Title: Uruguay: Elevation)
highest point: Cerro Catedral 514 m
Doc 2 (Title: St. Lucia: Elevation)
highest point: Mount Gimie 948 m
</information>
Searches left: 1."""
    record = Record()
    for action, text in (
        ("search[Cerro Catedral]", found),
        ("search[zzqq]", "No passage holds any of these words.\nSearches left: 0."),
        ("search[U.S.]", "There are no searches left. Answer the question.\nSearches left: 0."),
        ("answer[Uruguay]", "The answer is wrong."),
    ):
        record.read(action, text)
    assert record.lists() == {
        "seen": ["Uruguay: Elevation", "St. Lucia: Elevation"],
        "held": [],
        "changed": [],
        "tried": [
            "search[Cerro Catedral]: 2 found: Uruguay: Elevation; St. Lucia: Elevation",
            "search[zzqq]: No passage holds any of these words.",
            "search[U.S.]: There are no searches left.",
            "answer[Uruguay]: The answer is wrong.",
        ],
    }


def test_the_record_says_what_the_messages_said_and_begins_anew():
    env = make_env(max_searches=2, retry_wrong=True)
    for _ in range(2):
        env.reset("test", 0)
        assert not any(env.record().values())
        responses = [search("Tern river"), "I see.", search("Tern river"), search("x"), answer("y")]
        said = [env.step(response) for response in responses]
        kept = env.record()
        assert kept["seen"] == ["Tern", "Marnfeld", "Ode"]
        assert all(f"(Title: {title})" in said[0].text for title in kept["seen"])
        commands = [line.partition("]: ")[0] + "]" for line in kept["tried"]]
        assert commands == [seen.action for seen in said if seen.action]


def test_random_play_keeps_to_the_protocol():
    ends, failures = Counter(), Counter()
    env = make_env(max_turns=5, retry_wrong=True)
    for seed in range(80):
        observation = env.reset("test", seed % 2)
        player = Random(env.task.goal, rng=random.Random(seed))
        while not observation.done:
            observation = env.step(player.respond(observation))
            failures[observation.failure] += 1
        ends[observation.end] += 1
    assert ends.keys() == {"success", "turn_limit"}
    assert failures.keys() <= {"", "no_passages"}


def test_the_prompt_states_protocol_and_numbers():
    env = make_env(passages=2, max_searches=7)
    assert "2 best passages" in env.system
    assert "7 searches" in env.system
    # The demonstration follows the protocol it explains.
    shown = re.findall(r"You: (.*?)(?:\nResult|\Z)", env.system, re.DOTALL)
    kinds = [parse_response(response)[0] for response in shown]
    assert kinds == ["search", "search", "answer"]


@pytest.mark.parametrize("name", ["max_turns", "max_searches", "passages", "passage_words"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
        make_env(**{name: 0})


def test_unknown_splits_and_indices_are_named():
    with pytest.raises(ValueError, match="expected one of test; got 'dev'"):
        make_env().size("dev")
    for index in (-1, 2):
        with pytest.raises(ValueError, match=r"expected 0\.\.1; got"):
            make_env().reset("test", index)


# Panels


def some_questions(count):
    return [Question(f"q/{n}", "t", f"Question {n}?", (f"{n}",)) for n in range(count)]


def test_a_panel_does_not_depend_on_the_order_of_the_questions():
    asked = some_questions(200)
    shuffled = random.Random(0).sample(asked, len(asked))
    assert panel(asked, 50) == panel(shuffled, 50)
    assert panel(asked, 50) == panel(asked, 120)[:50]
    assert len(panel(asked, 500)) == 200
    numbers = [int(q.id.partition("/")[2]) for q in panel(asked, 50)]
    assert 60 < sum(numbers) / 50 < 140  # from the whole range
    with pytest.raises(ValueError, match="'q/3' twice"):
        panel([*asked, asked[3]], 10)


def test_the_digest_covers_every_question():
    asked = panel(some_questions(30), 30)
    for count in (29, 30):
        text = "\n".join(f"{q.id}\t{q.text}\t{q.answers[0]}" for q in asked[:count])
        assert digest(asked[:count]) == hashlib.sha256(text.encode()).hexdigest()


# The published sets


def write_set(folder, file, count):
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "id": f"{path.stem}_{n}",
            "question": f" who is number {n} of {file}? ",
            "golden_answers": [f"Number {n}", f"No. {n}"],
            "metadata": {"source": file},
        }
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def published(tmp_path):
    """A folder in FlashRAG's layout with sets of different sizes."""
    for count, file in enumerate(SETS.values(), start=3):
        write_set(tmp_path, file, count)
    for file in ("nq/train.jsonl", "hotpotqa/train.jsonl"):
        write_set(tmp_path, file, 20)
    return tmp_path


def make_searchqa(folder, **settings):
    counts = {"train_questions": 30, "test_questions": 5}
    return SearchQA(folder=folder, **{**SETTINGS, **counts, **settings})


def test_the_seven_sets_are_splits_with_a_limited_number_of_questions(published):
    env = make_searchqa(published)
    assert {name: env.size(name) for name in SETS} == {
        name: min(count, 5) for count, name in enumerate(SETS, start=3)
    }
    observation = env.reset("bamboogle", 1)
    assert env.task.type == "bamboogle"
    number = re.search(r"number (\d+) of bamboogle/test.jsonl\?$", env.task.goal)[1]
    assert env.task.id == f"searchqa/bamboogle/test_{number}"
    assert observation.message.endswith(env.task.goal)
    assert env.step(answer(f"no {number}")).success


def test_training_questions_are_those_of_nq_and_hotpotqa(published):
    env = make_searchqa(published)
    assert env.size("train") == 30
    types = set()
    for index in range(30):
        last = env.reset("train", index)
        types.add(env.task.type)
    assert types == {"nq", "hotpotqa"}
    shorter = make_searchqa(published, train_questions=10)
    assert shorter.size("train") == 10
    assert shorter.reset("train", 9) == env.reset("train", 9) != last


@pytest.mark.parametrize(
    ("data", "shown"), [("", "got ''"), ("absent", "got 'absent'"), ("gs://bucket/searchqa", "")]
)
def test_the_questions_are_looked_for_before_a_server_is_waited_for(data, shown):
    away = {"retriever": "http://localhost:9", "timeout_s": 1.0, "retry_minutes": 0.0}
    counts = {"train_questions": 30, "test_questions": 5, "wait_s": 0.1, "batch": 1}
    with pytest.raises(ValueError, match=rf"`env\.data`: .*expected a folder.*{shown}"):
        open_searchqa(data=data, **{**SETTINGS, **counts, **away})


def test_dev_questions_are_those_of_nq_that_no_table_reports(published):
    env = make_searchqa(published)
    with pytest.raises(ValueError, match=r"no file `.*nq/dev\.jsonl`"):
        env.size("dev")
    question = {"id": "dev_7", "question": "Which?", "golden_answers": ["that"]}
    (published / "nq/dev.jsonl").write_text(json.dumps(question) + "\n")
    assert env.size("dev") == 1
    env.reset("dev", 0)
    assert env.task.id == "searchqa/nq/dev_7"


def test_a_split_is_read_at_its_first_use(published):
    (published / "musique/dev.jsonl").unlink()
    env = make_searchqa(published)
    assert env.size("nq") == 3
    with pytest.raises(ValueError, match=r"no file `.*musique/dev\.jsonl`"):
        env.size("musique")
    with pytest.raises(ValueError, match="train, nq, triviaqa"):
        env.size("test")


def test_a_line_that_is_no_question_is_named(published):
    file = published / "nq/test.jsonl"
    good = file.read_text()
    for line, said in (
        ('{"id": 1,', "Expecting"),
        ("[]", "expected .*golden_answers"),
        ('{"id": "1", "question": "q?"}', "expected .*golden_answers"),
        ('{"id": "1", "question": "q?", "golden_answers": []}', "expected .*golden_answers"),
        ('{"id": "1", "question": "q?", "golden_answers": "text"}', "expected .*golden_answers"),
        ('{"id": "1", "question": "q?", "golden_answers": [3]}', "expected .*golden_answers"),
        ('{"question": "q?", "golden_answers": ["a"]}', "expected .*golden_answers"),
        ('{"id": "1", "question": null, "golden_answers": ["a"]}', "expected .*golden_answers"),
    ):
        file.write_text(f"{good}{line}\n")
        with pytest.raises(ValueError, match=rf"nq/test\.jsonl`, line 4: {said}"):
            questions(published, "nq", 500)


def test_half_an_emoji_in_a_question_becomes_a_question_mark(published):
    half = {"id": "\ud83d", "question": "who \ud83d", "golden_answers": ["\ude00 x"]}
    (published / "nq/test.jsonl").write_text(json.dumps(half))
    read = questions(published, "nq", 500)
    assert read == (Question("searchqa/nq/?", "nq", "who ?", ("? x",)),)
    assert digest(read) == hashlib.sha256(b"searchqa/nq/?\twho ?\t? x").hexdigest()


def test_a_retriever_must_be_named_and_exist(tmp_path):
    settings = {"timeout_s": 1.0, "retry_minutes": 0.0, "wait_s": 0.1, "batch": 8}
    with pytest.raises(ValueError, match="`retriever`: expected the address"):
        open_retriever("", **settings)
    with pytest.raises(ValueError, match="no file"):
        open_retriever(str(tmp_path / "corpus.jsonl"), **settings)
    for address in ("localhost:8000/retrieve", "10.0.0.7:8000"):
        with pytest.raises(ValueError, match=f"`{address}` is no address .* http://{address}"):
            open_retriever(address, **settings)
