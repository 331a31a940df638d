"""A client of a retrieval server, in the protocol of Search-R1.

A request is a POST of `{"queries": [str], "topk": int, "return_scores": true}`. The reply is
`{"result": [[item]]}`, a list for each query. An item is `{"document": {...}, "score": float}`, or
the document itself if scores were not asked for.
"""

import contextlib
import functools
import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException

from opd_jax.envs.search.retrieval import Passage, RetrievalError, passage_from
from opd_jax.runtime.exits import WorldFailed
from opd_jax.runtime.fields import check_within
from opd_jax.runtime.signals import signalled

_BLOCK_BYTES = 1 << 16
_SHOWN_BYTES = 200  # of what a server says about an error
_BUSY = (408, 425, 429)  # statuses that ask the client to come back
_MOST_WAIT_S = 30.0
# What a server is asked to see whether it answers at all.
_FIRST_QUERY = "first query"


class _Refused(RetrievalError):
    """The server does not answer this request, and would answer another."""


@dataclass(eq=False)
class _Query:
    """A query that waits for its passages."""

    text: str
    top: int
    found: Future[list[Passage]] = field(default_factory=Future)


class HttpRetriever:
    """Asks a retrieval server; threads that ask at the same time share requests.

    One request is under way at a time. Queries that arrive meanwhile share the next request: for a
    dense server many queries take hardly longer than one. The client ignores proxies set in the
    environment.

    Args:
      url: for example `http://127.0.0.1:8000/retrieve`.
      timeout_s: longest wait for one reply, in seconds.
      retry_minutes: the longest outage. While the server is away, busy (429) or fails (5xx), a
        request is sent again, for the last time so many minutes after it was first sent; 0: never.
        Then the outage is a `WorldFailed` of every query that waits. It is none if the server
        answers another query: it cannot answer that request, which counts as refused.
      wait_s: seconds before the first retry; doubled for each further one, up to 30 s. A longer
        `Retry-After` of the server is kept.
      batch: most queries in a request.

    Raises:
      ValueError: a setting is out of range, or the server refuses a first query.
      WorldFailed: it does not answer that query.
    """

    waits = True

    def __init__(
        self, url: str, *, timeout_s: float, retry_minutes: float, wait_s: float, batch: int
    ):
        check_within(0, retry_minutes=retry_minutes)
        check_within(1, batch=batch)
        for name, seconds in (("timeout_s", timeout_s), ("wait_s", wait_s)):
            if seconds <= 0:
                raise ValueError(f"`{name}`: expected seconds above 0, got {seconds}")
        if not _is_address(url):
            raise ValueError(
                f"`retriever`: expected an http:// or https:// address with a host, got {url!r}"
            )
        self._url, self._timeout_s, self._batch = url, timeout_s, batch
        self._retry_s, self._wait_s = 60 * retry_minutes, wait_s
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._waiting: deque[_Query] = deque()
        self._sending = threading.Lock()
        try:
            self.search([_FIRST_QUERY], top=1)
        except (RetrievalError, WorldFailed) as error:
            advice = (
                f"`retriever`: {error}; start a server there (python -m "
                "opd_jax.envs.search.retrieval_server) or correct the address"
            )
            raise (ValueError if isinstance(error, _Refused) else WorldFailed)(advice) from None

    def search(self, queries: Sequence[str], *, top: int) -> list[list[Passage]]:
        """For each query at most `top` passages, best first.

        A request that the server refuses is asked again query by query.

        Raises:
          RetrievalError: the server refuses one of these queries.
          WorldFailed: it was away for longer than `retry_minutes`.
        """
        asked = [_Query(query, top) for query in queries]
        self._waiting.extend(asked)
        for query in asked:
            with self._sending:
                while not query.found.done():  # another thread may have sent it along
                    self._send_waiting()
        return [query.found.result() for query in asked]

    def _send_waiting(self) -> None:
        """Send the queries that have waited longest; the caller holds `_sending`."""
        batch = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
        try:
            self._answer(batch)
        except BaseException as error:
            if isinstance(error, WorldFailed):  # who waits would only find the same outage
                while self._waiting:
                    batch.append(self._waiting.popleft())
            for query in batch:
                if not query.found.done():
                    query.found.set_exception(error)
            if not isinstance(error, (RetrievalError, WorldFailed)):
                raise

    def _answer(self, batch: Sequence[_Query]) -> None:
        """Asks the server for a batch, then, if it refuses, for each query alone."""
        try:
            results = self._request([q.text for q in batch], max(q.top for q in batch))
        except _Refused as error:
            if len(batch) == 1:
                batch[0].found.set_exception(error)
            else:
                for query in batch:
                    self._answer([query])
        else:
            for query, found in zip(batch, results, strict=True):
                query.found.set_result(found[: query.top])

    def _request(self, queries: list[str], top: int) -> list[list[Passage]]:
        """The passages for each query; the server is asked again while it may be away."""
        deadline, wait_s = time.monotonic() + self._retry_s, self._wait_s
        while True:
            least_s = 0.0
            try:
                return self._ask(queries, top)
            except urllib.error.HTTPError as error:
                said = _beginning(error)
                reason = f"status {error.code} {said}".strip()
                if error.code < 500 and error.code not in _BUSY:  # asking again would not help
                    raise _Refused(f"no answer from {self._url}: {reason}") from None
                least_s = _retry_after_s(error.headers.get("Retry-After", ""))
            except (OSError, HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._end_of(f"no answer from {self._url}: {reason}")
            if wait_s == self._wait_s:
                logging.getLogger(__name__).warning(
                    "%s does not answer (%s); asking again for up to %g minutes",
                    *(self._url, reason, self._retry_s / 60),
                )
            _pause(min(max(wait_s, least_s), left_s))
            wait_s = min(2 * wait_s, _MOST_WAIT_S)

    def _end_of(self, reason: str) -> Exception:
        """The error of a request that was sent as often as is allowed."""
        try:
            self._ask([_FIRST_QUERY], 1)
        except (OSError, HTTPException, ValueError):
            return WorldFailed(f"{reason}; `env.retry_minutes` = {self._retry_s / 60:g} are over")
        return _Refused(reason)

    def _ask(self, queries: list[str], top: int) -> list[list[Passage]]:
        # Nobody reads the scores, but Search-R1's dense server fails without this field.
        asked = {"queries": queries, "topk": top, "return_scores": True}
        return _passages(self._post(json.dumps(asked).encode()), len(queries))

    def _post(self, body: bytes) -> bytes:
        """The reply's body; TimeoutError if it is not complete in time."""
        deadline = time.monotonic() + self._timeout_s
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        parts = []
        with self._open(request, timeout=self._timeout_s) as reply:
            # The socket's timeout applies to each read, so bytes that trickle would never end.
            while part := reply.read1(_BLOCK_BYTES):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"timed out after {self._timeout_s} s")
        return b"".join(parts)


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def _beginning(error: urllib.error.HTTPError) -> str:
    """The first bytes of what a server says about an error."""
    with error, contextlib.suppress(OSError, HTTPException):
        return error.read(_SHOWN_BYTES).decode(errors="replace")
    return ""


def _pause(seconds: float) -> None:
    """Sleeps; RetrievalError if the process got a signal, since it has to leave soon."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if signalled():
            raise RetrievalError("the process has to leave")
        time.sleep(min(left, 1.0))


def _retry_after_s(text: str) -> float:
    """The seconds that a `Retry-After` header asks to wait; 0 if it names none."""
    if text.isdecimal():
        return float(text)
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0


def _passages(body: bytes, count: int) -> list[list[Passage]]:
    """The passages of a reply; malformed documents are left out.

    Raises:
      ValueError: the reply's form is wrong, or all documents are none.
    """
    reply = json.loads(body)
    result = reply.get("result") if isinstance(reply, dict) else None
    if not isinstance(result, list) or [type(found) for found in result] != [list] * count:
        raise ValueError(f"expected `result` with a list for each of {count} queries")
    read = [[_passage(item) for item in found] for found in result]
    wrong = [part for found in read for part in found if isinstance(part, str)]
    if wrong and len(wrong) == sum(map(len, read)):
        raise ValueError(wrong[0])
    for why in wrong:
        _warn(why)
    return [[part for part in found if isinstance(part, Passage)] for found in read]


def _passage(item: object) -> Passage | str:
    """A passage, or why it is none."""
    document = item.get("document", item) if isinstance(item, dict) else None
    if not isinstance(document, dict):
        return f"expected a document, got a {type(document).__name__}"
    try:
        return passage_from(document)
    except ValueError as error:
        return str(error)


@functools.cache  # once for each reason
def _warn(why: str) -> None:
    logging.getLogger(__name__).warning("a document in a reply is left out: %s", why)
