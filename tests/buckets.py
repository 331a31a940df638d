"""A server of Google Cloud Storage on this machine.

The emulator answers, with three things of the real server that it lacks: preconditions on an
object's generation, the generation of what is read, and a bucket that may not be used.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

from opd_jax.runtime import bucket

BUCKET, FORBIDDEN = "runs", "forbidden"


class _Refused(Exception):
    """The status to answer with."""


class _Storage(Storage):
    """Attributes:
    condition: the generation that the request asks for, "0" for none; "" if it does not.
    served: the generation of what was read, "" if nothing was.
    written: names of all objects, in the order in which they were written.
    lost: how many of the next writes are done, and answered as if they were not.
    is_closed: whether all requests are refused.
    away: a method and a part of a URL; such requests are answered with "try again".
    is_read_only: whether all writes are refused.
    """

    condition = served = ""
    lost = 0
    away = ("", "")
    is_closed = is_read_only = False

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self.lock, self.written = threading.Lock(), list[str]()

    def check(self, bucket: str, name: str) -> str:
        found = self.objects.get(bucket, {}).get(name, {}).get("generation", "0")
        if self.condition not in ("", found):
            raise _Refused(412)
        return found

    def create_file(self, bucket, name, content, *more) -> None:
        if self.is_read_only:
            raise _Refused(403)
        self.check(bucket, name)
        super().create_file(bucket, name, content, *more)
        self.written.append(name)
        if self.lost:
            self.lost -= 1
            raise _Refused(503)

    def delete_file(self, bucket, name) -> None:
        self.check(bucket, name)
        super().delete_file(bucket, name)

    def get_file(self, bucket, name, show_error=False) -> bytes:
        self.served = self.check(bucket, name)
        return super().get_file(bucket, name, show_error)

    def contents(self) -> dict[str, bytes]:
        """What the bucket holds, by name."""
        with self.lock:
            self.condition = ""
            return {name: self.get_file(BUCKET, name) for name in self.objects.get(BUCKET, {})}

    def _write_config_to_file(self) -> None:
        pass  # it would write all that it knows after each object


class _Handler(RequestHandler):
    def _answer(self, method: str) -> None:
        with self.storage.lock:
            query = parse_qs(urlparse(self.path).query)
            self.storage.condition = query.get("ifGenerationMatch", [""])[0]
            self.storage.served = ""
            try:
                if f"/b/{FORBIDDEN}" in self.path or self.storage.is_closed:
                    raise _Refused(403)
                if self.storage.away[0] == method and self.storage.away[1] in self.path:
                    raise _Refused(503)
                Router(self).handle(method)
            except _Refused as refused:
                self.send_error(refused.args[0])

    def end_headers(self) -> None:
        if self.storage.served:
            self.send_header("X-Goog-Generation", self.storage.served)
        super().end_headers()

    do_GET = lambda self: self._answer("GET")  # noqa: E731
    do_POST = lambda self: self._answer("POST")  # noqa: E731
    do_PUT = lambda self: self._answer("PUT")  # noqa: E731
    do_DELETE = lambda self: self._answer("DELETE")  # noqa: E731
    do_PATCH = lambda self: self._answer("PATCH")  # noqa: E731


@contextlib.contextmanager
def serving() -> Iterator[tuple[_Storage, dict[str, str]]]:
    """Serves an empty bucket; yields what it holds, and the environment variables to find it."""
    storage = _Storage()
    create_bucket(BUCKET, storage)
    with ThreadingHTTPServer(("localhost", 0), partial(_Handler, storage)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}"
        # tensorstore has a name of its own for it, and wants a token. gcsfs would ask Google's own
        # servers what kind of bucket it is, and whether this machine is theirs.
        yield (
            storage,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "NO_GCE_CHECK": "true",
            },
        )
        server.shutdown()


@pytest.fixture(scope="module")
def served() -> Iterator[_Storage]:
    """A bucket for this process; what it holds."""
    with serving() as (storage, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        bucket._open.cache_clear()  # of another module's server
        yield storage


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A request is repeated for half a second, and no bucket is open yet."""
    monkeypatch.setattr(bucket, "_PATIENCE_S", 0.5)
    bucket._again.cache_clear()
    bucket._open.cache_clear()
    yield
    bucket._again.cache_clear()
    bucket._open.cache_clear()


def another_process() -> None:
    """Forgets all mirrors, as a process does that begins."""
    bucket._mirrors.cache_clear()
    bucket._same.clear()
    bucket._generations.clear()
