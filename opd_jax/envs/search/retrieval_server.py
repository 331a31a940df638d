"""A retrieval server over a JSONL corpus, in the protocol of Search-R1.

    python -m opd_jax.envs.search.retrieval_server --corpus=wiki-18.jsonl --port=8000

It ranks with BM25 and needs no accelerator; a dense server with the same protocol can replace it.
To POST `/retrieve` with `{"queries": ["..."], "topk": 3, "return_scores": true}` it replies
`{"result": [[{"document": {"id": "...", "contents": "Title\\nText"}, "score": 7.1}]]}`, or the bare
documents if scores are not asked for.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opd_jax.envs.search.retrieval import BM25, load_bm25
from opd_jax.runtime.exits import reported
from opd_jax.runtime.files import local_path

PATH = "/retrieve"
_MOST_BYTES = 1 << 24


def answer(index: BM25, asked: Any, *, top: int) -> dict[str, list]:
    """The reply to a request.

    Args:
      index: what is searched.
      asked: the request, decoded.
      top: passages for each query if the request does not say.

    Raises:
      ValueError: the request does not have the form that the module describes.
    """
    if not isinstance(asked, dict):
        raise ValueError("expected a JSON object")
    queries = asked.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("`queries`: expected a list of strings")
    top = asked.get("topk") or top
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"`topk`: expected a positive whole number, got {top!r}")
    result = []
    for found in index.search_scored(queries, top=top):
        items: list[dict] = [{"id": p.id, "contents": p.contents} for p, _ in found]
        if asked.get("return_scores"):
            scores = [score for _, score in found]
            items = [
                {"document": document, "score": score}
                for document, score in zip(items, scores, strict=True)
            ]
        result.append(items)
    return {"result": result}


def make_server(index: BM25, *, host: str, port: int, top: int) -> ThreadingHTTPServer:
    """A server that has its address but does not serve yet; port 0 takes a free one.

    Raises:
      ValueError: the address cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds, for a client that connects and says nothing

        def do_POST(self) -> None:
            if self.path != PATH:
                return self._reply(404, {"error": f"expected a POST to {PATH}"})
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > _MOST_BYTES:
                return self._reply(400, {"error": f"expected 0..{_MOST_BYTES} bytes"})
            try:
                asked = json.loads(self.rfile.read(int(length)))
                self._reply(200, answer(index, asked, top=top))
            except ValueError as error:
                self._reply(400, {"error": str(error)})

        def _reply(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing; the original writes a line for each request."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"`--host`, `--port`: cannot serve on {host}:{port}: {error}") from None


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.envs.search.retrieval_server`."""
    usage = argparse.ArgumentParser(prog="python -m opd_jax.envs.search.retrieval_server")
    usage.add_argument("--corpus", required=True, help="JSONL, one passage a line")
    usage.add_argument("--port", type=int, required=True, help="0 takes a free one")
    usage.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    usage.add_argument("--topk", type=int, default=3, help="passages a query, if not asked for")
    flags = usage.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what `bm25s` does with JAX needs no more
    with reported():
        index = load_bm25(local_path(flags.corpus, name="--corpus"))
        server = make_server(index, host=flags.host, port=flags.port, top=flags.topk)
        host, port = server.server_address[:2]
        print(f"{len(index.passages)} passages at http://{host!s}:{port}{PATH}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.server_close()


if __name__ == "__main__":
    main(sys.argv[1:])
