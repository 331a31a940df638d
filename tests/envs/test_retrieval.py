"""BM25 against its formula; the client and the server against each other and against bad ones."""

import json
import math
import random
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from opd_jax.envs.search import retrieval_server
from opd_jax.envs.search.retrieval import BM25, Passage, RetrievalError, load_bm25, read_corpus
from opd_jax.envs.search.retrieval_client import HttpRetriever
from opd_jax.envs.search.searchqa import open_retriever
from opd_jax.runtime.exits import WorldFailed

ROOT = Path(__file__).parents[2]
WORDS = ["ode", "tern", "alder", "mill", "market", "clock", "river", "town", "the", "is", "of"]
COMMAND = [sys.executable, "-m", "opd_jax.envs.search.retrieval_server"]


def some_passages(count):
    rng = random.Random(0)
    return [
        Passage(
            f"p{n}",
            " ".join(rng.choices(WORDS, k=2)).title(),
            "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2)),
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def index():
    return BM25(some_passages(200))


@pytest.fixture
def serve():
    """Starts servers on free ports; returns the address of each."""
    started = []

    def start(server):
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/retrieve"

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def bm25_url(index, serve):
    return serve(retrieval_server.make_server(index, host="127.0.0.1", port=0, top=3))


def make_server(respond, address=("127.0.0.1", 0)):
    """A server that answers each request with `respond(handler, request)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            respond(self, json.loads(body))

        def log_message(self, format, *args):
            pass

    return ThreadingHTTPServer(address, Handler)


def reply(handler, content, status=200):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def echo(asked):
    """For each query passages with the query as their title."""
    documents = [[{"id": q, "contents": f"{q}\ntext"}] * asked["topk"] for q in asked["queries"]]
    return {"result": [[{"document": d, "score": 1.0} for d in found] for found in documents]}


def client(url, **settings):
    return HttpRetriever(
        url, **{"timeout_s": 20.0, "retry_minutes": 1.0, "wait_s": 0.01, "batch": 4, **settings}
    )


# Corpora


def test_a_corpus_is_read_in_both_forms(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [
        {"id": "0", "contents": '"Ode"\nThe Ode is a river.\nIt is short.'},
        {"id": 7, "title": "Tern", "text": "The Tern is one too."},
        {"contents": "Alder"},
        {"id": "\ud83d", "title": "half \ud83d", "text": "an emoji \ude00"},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert list(read_corpus(path)) == [
        Passage("0", "Ode", "The Ode is a river.\nIt is short."),
        Passage("7", "Tern", "The Tern is one too."),
        Passage("", "Alder", ""),
        Passage("?", "half ?", "an emoji ?"),
    ]


def test_what_is_wrong_with_a_corpus_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    for line in ("{", "[]", "3", '{"id": "1", "title": "x"}', '{"contents": 3}'):
        path.write_text('{"contents": "Ode\\ntext"}\n' + line)
        with pytest.raises(ValueError, match=r"corpus\.jsonl`, line 2: "):
            list(read_corpus(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one passage"):
        load_bm25(path)
    with pytest.raises(ValueError, match="no file"):
        load_bm25(tmp_path / "other.jsonl")


# BM25


def expected_scores(passages, query):
    """Lucene's BM25 with k1 = 1.5 and b = 0.75, in float64."""
    texts = [re.findall(r"\w\w+", passage.contents.lower()) for passage in passages]
    mean = sum(map(len, texts)) / len(texts)
    scores = [0.0] * len(texts)
    for word in re.findall(r"\w\w+", query.lower()):
        having = sum(word in text for text in texts)
        idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for n, text in enumerate(texts):
            count = Counter(text)[word]
            scores[n] += idf * count / (count + 1.5 * (0.25 + 0.75 * len(text) / mean))
    return scores


def test_scores_are_those_of_the_formula_best_first(index):
    rng = random.Random(1)
    for _ in range(50):
        query = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))  # some words twice
        expected = expected_scores(index.passages, query)
        (found,) = index.search_scored([query], top=5)
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx(sorted(expected, reverse=True)[:5], rel=1e-5)
        for passage, score in found:
            assert score == pytest.approx(expected[int(passage.id[1:])], rel=1e-5)


def test_equal_scores_come_in_the_order_of_the_corpus():
    passages = [Passage(str(n), "Ode", "river") for n in range(300)]
    passages[120] = Passage("120", "Ode", "river ode")
    (found,) = BM25(passages).search(["ode"], top=4)
    assert [passage.id for passage in found] == ["120", "0", "1", "2"]


def test_only_passages_that_share_a_word_with_the_query_are_found(index):
    assert index.search(["zebra", "", "?!", "x"], top=3) == [[], [], [], []]
    small = BM25([Passage("0", "Ode", "river"), Passage("1", "Tern", "brook")])
    found = small.search(["brook ode zebra", "ode"], top=9)
    assert [[p.id for p in passages] for passages in found] == [["0", "1"], ["0"]]


def test_common_words_can_be_looked_for():
    passages = [Passage(code, f"Code {code}", f".{code}") for code in ("is", "no", "it", "de")]
    assert BM25(passages).search(["code .no"], top=1)[0][0].id == "no"


# Client and server


def test_a_server_answers_as_the_index_it_serves(index, bm25_url):
    rng = random.Random(2)
    remote = client(bm25_url)
    queries = [" ".join(rng.sample(WORDS, k=3)) for _ in range(11)] + ["zebra"]
    for top in (1, 3):
        assert remote.search(queries, top=top) == index.search(queries, top=top)
    assert remote.search([], top=3) == []


def post(url, body):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_replies_have_search_r1s_form(index, bm25_url):
    asked = {"queries": ["ode"], "topk": 2, "return_scores": True}
    (found,) = index.search_scored(["ode"], top=2)
    items = [
        {"document": {"id": p.id, "contents": f"{p.title}\n{p.text}"}, "score": score}
        for p, score in found
    ]
    assert post(bm25_url, json.dumps(asked).encode()) == (200, {"result": [items]})
    _, bare = post(bm25_url, json.dumps({"queries": ["ode", "tern"]}).encode())
    assert [len(found) for found in bare["result"]] == [3, 3]  # the server's default
    assert bare["result"][0][0].keys() == {"id", "contents"}


def test_a_bad_request_is_told_why(bm25_url):
    for body, said in (
        (b"not JSON", "Expecting value"),
        (b"[]", "expected a JSON object"),
        (b"{}", "`queries`: expected a list of strings"),
        (b'{"queries": "ode"}', "`queries`: expected a list of strings"),
        (b'{"queries": [1]}', "`queries`: expected a list of strings"),
        (b'{"queries": [], "topk": -1}', "`topk`: expected a positive whole number, got -1"),
        (b'{"queries": [], "topk": "3"}', "`topk`"),
    ):
        status, answer = post(bm25_url, body)
        assert status == 400
        assert said in answer["error"]
    assert post(bm25_url + "r", b"{}")[0] == 404
    assert post(bm25_url, b'{"queries": []}') == (200, {"result": []})  # it still answers


def test_the_command_serves_a_corpus(index, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": p.id, "contents": p.contents}) for p in index.passages]
    corpus.write_text("\n".join(lines))
    words = [*COMMAND, f"--corpus={corpus}", "--port=0"]
    running = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = running.stdout.readline()
        url = re.fullmatch(r"200 passages at (http://127\.0\.0\.1:\d+/retrieve)\n", line)[1]
        settings = {"timeout_s": 20.0, "retry_minutes": 0.0, "wait_s": 0.1, "batch": 8}
        remote, local = open_retriever(url, **settings), open_retriever(str(corpus), **settings)
        assert remote.search(["ode mill"], top=3) == local.search(["ode mill"], top=3)
        assert open_retriever(url, **settings) is remote
    finally:
        running.terminate()
        running.wait()
        running.stdout.close()


def test_the_command_says_in_a_line_what_is_wrong(capsys):
    for flags, said in ((["--port=0"], "no file"), ([], "--port")):
        with pytest.raises(SystemExit) as stopped:
            retrieval_server.main(["--corpus=absent.jsonl", *flags])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_the_home_directory_of_a_corpus_is_understood(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell does not expand it behind a flag's "="
    with pytest.raises(SystemExit):
        retrieval_server.main(["--corpus=~/absent.jsonl", "--port=0"])
    assert f"no file `{tmp_path}/absent.jsonl`" in capsys.readouterr().err


def test_an_address_that_cannot_be_used_is_named(index, bm25_url):
    port = int(re.search(r":(\d+)/", bm25_url)[1])
    for taken in (port, 70000):
        with pytest.raises(ValueError, match=f"cannot serve on 127.0.0.1:{taken}"):
            retrieval_server.make_server(index, host="127.0.0.1", port=taken, top=3)


# Bad servers


def test_a_request_holds_at_most_a_batch(serve):
    sizes = []

    def respond(handler, asked):
        sizes.append((len(asked["queries"]), asked["topk"], asked["return_scores"]))
        reply(handler, echo(asked))

    remote = client(serve(make_server(respond)), batch=4)
    sizes.clear()
    queries = [f"query {n}" for n in range(10)]
    found = remote.search(queries, top=2)
    assert [[p.title for p in passages] for passages in found] == [[q, q] for q in queries]
    assert sizes == [(4, 2, True), (4, 2, True), (2, 2, True)]


def test_threads_that_ask_at_the_same_time_share_requests(serve):
    sizes, first, go_on = [], threading.Event(), threading.Event()

    def respond(handler, asked):
        sizes.append(len(asked["queries"]))
        if asked["queries"] == ["thread 0"]:
            first.set()
            assert go_on.wait(60)
        reply(handler, echo(asked))

    remote = client(serve(make_server(respond)), batch=3, timeout_s=60.0)
    sizes.clear()
    found = {}

    def ask(n):
        found[n] = remote.search([f"thread {n}"], top=1 + n)[0]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    threads[0].start()
    assert first.wait(60)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 60
    while len(remote._waiting) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sizes == [1, 3, 2]
    for n, passages in found.items():
        assert [p.title for p in passages] == [f"thread {n}"] * (1 + n)


def test_failed_requests_are_repeated_as_often_as_set(serve):
    calls, troubles = Counter(), []

    def respond(handler, asked):
        calls[asked["queries"][0]] += 1
        if troubles:
            troubles.pop(0)(handler)
        else:
            reply(handler, echo(asked))

    remote = client(serve(make_server(respond)))
    troubles += [
        lambda handler: reply(handler, {}, status=503),
        lambda handler: reply(handler, b"<html>"),
        lambda handler: handler.connection.close(),
        lambda handler: reply(handler, b"busy", status=429),
    ]
    assert remote.search(["patience"], top=1)[0][0].title == "patience"
    assert calls["patience"] == 5
    # Asking again would not help.
    troubles.append(lambda handler: reply(handler, b"no such thing", status=422))
    with pytest.raises(RetrievalError, match="status 422 no such thing"):
        remote.search(["nonsense"], top=1)
    assert calls["nonsense"] == 1
    assert remote.search(["after"], top=1)[0][0].title == "after"


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_may_say_when_to_come_back(serve, status):
    came = []

    def respond(handler, asked):
        came.append(time.monotonic())
        if len(came) == 2:
            handler.send_response(status)
            handler.send_header("Retry-After", "1")
            handler.end_headers()
        else:
            reply(handler, echo(asked))

    client(serve(make_server(respond))).search(["query"], top=1)
    assert len(came) == 3
    assert came[2] - came[1] >= 1


def test_asking_again_ends_with_the_budget(serve):
    asked_for = []

    def respond(handler, asked):
        asked_for.extend(asked["queries"])
        late = asked["queries"] == ["late"]
        reply(handler, b"out of memory" if late else echo(asked), status=500 if late else 200)

    remote = client(serve(make_server(respond)), retry_minutes=0.005)
    with pytest.raises(RetrievalError, match="status 500 out of memory"):
        remote.search(["late"], top=1)
    assert asked_for.count("late") > 1


def refusing(*refused, status):
    """A server that takes no request with one of these queries, and the requests that it got."""
    got = []

    def respond(handler, asked):
        got.append(asked["queries"])
        bad = set(refused) & set(asked["queries"])
        reply(handler, b"cannot embed" if bad else echo(asked), status=status if bad else 200)

    return make_server(respond), got


def together(remote, queries):
    """What each query gets, a title or an error, if all are asked in one request."""
    with ThreadPoolExecutor(len(queries)) as pool, remote._sending:
        asked = [pool.submit(remote.search, [query], top=1) for query in queries]
        deadline = time.monotonic() + 60
        while len(remote._waiting) < len(queries) and time.monotonic() < deadline:
            time.sleep(0.001)
        remote._send_waiting()
    return [future.exception() or future.result()[0][0].title for future in asked]


@pytest.mark.parametrize("status", [422, 500])
def test_a_query_that_the_server_cannot_answer_fails_alone(serve, status):
    server, got = refusing("bad", status=status)
    remote = client(serve(server), retry_minutes=0.0)
    got.clear()
    first, bad, last = together(remote, ["one", "bad", "two"])
    assert (first, last) == ("one", "two")
    assert isinstance(bad, RetrievalError)
    assert f"status {status} cannot embed" in str(bad)
    assert sorted(got[0]) == ["bad", "one", "two"]
    assert {("one",), ("two",), ("bad",)} <= {tuple(queries) for queries in got[1:]}


@pytest.mark.parametrize(("minutes", "attempts"), [(0.0, 1), (0.005, 2)])
def test_an_outage_is_that_of_all_who_wait(serve, minutes, attempts):
    got, away = [], []

    def respond(handler, asked):
        got.append(asked["queries"])
        reply(handler, b"away" if away else echo(asked), status=503 if away else 200)

    # The first pause would last longer than the budget: the second attempt comes at its end.
    remote = client(serve(make_server(respond)), retry_minutes=minutes, wait_s=60.0, batch=2)
    got.clear()
    away.append(1)
    # More than fit a request: those left out do not begin another outage.
    errors = together(remote, [f"query {n}" for n in range(5)])
    assert [type(error) for error in errors] == [WorldFailed] * 5
    assert f"status 503 away; `env.retry_minutes` = {minutes:g} are over" in str(errors[0])
    assert got == [got[0]] * attempts + [["first query"]]
    away.clear()
    assert remote.search(["after"], top=1)[0][0].title == "after"


def test_a_server_that_comes_back_is_waited_for(serve):
    gone = make_server(lambda handler, asked: reply(handler, echo(asked)))
    address = gone.server_address
    threading.Thread(target=gone.serve_forever, args=(0.01,), daemon=True).start()
    remote = client(f"http://127.0.0.1:{address[1]}/retrieve")
    gone.shutdown()
    gone.server_close()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(remote.search, ["query"], top=1)
        time.sleep(0.2)
        assert not found.done()
        serve(make_server(lambda handler, asked: reply(handler, echo(asked)), address))
        assert found.result(timeout=60)[0][0].title == "query"


def test_replies_are_read_with_and_without_scores_and_refused_in_another_form(serve):
    contents = []

    def respond(handler, asked):
        reply(handler, contents.pop() if contents else echo(asked))

    remote = client(serve(make_server(respond)), retry_minutes=0.0)
    contents.append({"result": [[{"id": "7", "contents": "x\ntext"}]]})
    assert remote.search(["query"], top=1) == [[Passage("7", "x", "text")]]
    for content in (
        [],
        {"result": "x"},
        {"result": []},
        {"result": [[], []]},
        {"result": [[3]]},
        {"result": [[{"document": 3}]]},
        {"result": [[{"document": {"id": "1"}, "score": 1.0}]]},
        {"result": [3]},
    ):
        contents.append(content)
        with pytest.raises(RetrievalError, match="no answer from http"):
            remote.search(["query"], top=1)


def silent(handler, stop):
    stop.wait(60)


def trickling(handler, stop):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    try:
        while not stop.wait(0.02):
            handler.wfile.write(b" ")
    except OSError:
        pass  # the client has gone


@pytest.mark.parametrize("hang", [silent, trickling])
def test_a_server_that_hangs_is_not_waited_for(serve, hang):
    started, stop = [], threading.Event()

    def respond(handler, asked):
        if started:
            hang(handler, stop)
        else:
            reply(handler, echo(asked))

    remote = client(serve(make_server(respond)), timeout_s=0.3, retry_minutes=0.0)
    started.append(True)
    try:
        with pytest.raises(WorldFailed, match="timed out"):
            remote.search(["query"], top=1)
    finally:
        stop.set()


def test_wrong_settings_are_named():
    server = make_server(reply)
    server.server_close()
    url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"  # nobody answers there
    for address, settings, said in (
        (url, {"timeout_s": 0.0}, "`timeout_s`: expected seconds above 0"),
        (url, {"wait_s": -1.0}, "`wait_s`: expected seconds above 0"),
        (url, {"retry_minutes": -1.0}, "`retry_minutes`: expected at least 0"),
        (url, {"batch": 0}, "`batch`: expected at least 1"),
        ("ftp://127.0.0.1/retrieve", {}, "expected an http"),
    ):
        with pytest.raises(ValueError, match=said):
            client(address, **settings)


def test_a_server_that_is_away_is_no_mistake_but_one_that_refuses_is(serve):
    server = make_server(reply)
    server.server_close()
    url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    with pytest.raises(WorldFailed, match=rf"`retriever`: no answer from {url}.*start a server"):
        client(url, retry_minutes=0.0)
    refusing = serve(make_server(lambda handler, asked: reply(handler, b"no page", status=404)))
    with pytest.raises(ValueError, match=r"`retriever`: no answer from .* status 404 no page"):
        client(refusing)


def test_an_error_whose_text_is_cut_off_is_asked_again(serve):
    answered = []

    def respond(handler, asked):
        if answered:
            answered.pop()
            handler.send_response(503)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.connection.close()
        else:
            reply(handler, echo(asked))

    remote = client(serve(make_server(respond)))
    answered.append(1)
    assert remote.search(["query"], top=1)[0][0].title == "query"


def test_a_document_that_is_none_costs_only_itself(serve, caplog):
    bad = [{"document": {"id": "1", "contents": None}}, {"document": None}, None]

    def respond(handler, asked):
        fine = echo(asked)["result"]
        reply(handler, {"result": [[*bad, *found] for found in fine]})

    remote = client(serve(make_server(respond)))
    for _ in range(2):
        found = remote.search(["a", "b"], top=2)
        assert [[p.title for p in passages] for passages in found] == [["a"] * 2, ["b"] * 2]
    told = [text for text in caplog.messages if "is left out" in text]
    assert len(told) == 2
    assert "strings; got the fields id, contents" in told[0]


@pytest.mark.parametrize(
    "url", ["http:///retrieve", "http://127.0.0.1:80a0/", "http://127.0.0.1:700000", "ftp://host/"]
)
def test_what_is_no_address_is_not_asked_again(url):
    with pytest.raises(ValueError, match=f"expected an http:// .* address with a host, got '{url}"):
        client(url, retry_minutes=5.0)
