"""A server for this machine alone: the page, and the OpenAI protocol.

It listens on 127.0.0.1. A page of another site cannot use it through the reader's browser: requests under another host
name (DNS rebinding) and from pages of another origin are refused, and no header allows one to read what is answered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from lorafa.chat.engine import BusyError, Engine, Job
from lorafa.chat.options import Options
from lorafa.chat.page import page
from lorafa.chat.replies import ChatReply, CompletionReply, Reply
from lorafa.chat.requests import (
    Request,
    RequestError,
    chat_request,
    completion_request,
    messages_of,
    options_of,
    parse_json,
)
from lorafa.chat.speakers import Row
from lorafa.errors import ConfigError, DataError, LoraError, did_you_mean, first_line

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
"""The names of this machine for itself; any port goes with them, as tunnels change it."""
MOST_BYTES = 2**20
"""A body of a request."""
PATIENCE = 60.0
"""Seconds in which a client has to send, or to take, the next part."""


class Server(ThreadingHTTPServer):
    """Serves what an engine answers. Use :func:`serving`."""

    daemon_threads = True
    request_queue_size = 128
    """Connections that wait to be taken: with the usual five, clients that come together are turned away."""

    def __init__(self, engine: Engine, options: Options, port: int, system: str | None) -> None:
        """Begin to listen; raises OSError."""
        self.engine, self.options = engine, options
        self.began = int(time.time())
        self.html = page(engine.speakers, options, system).encode()
        super().__init__((LOOPBACK, port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called, as the library's own would."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours, and nothing else gets here."""


@contextmanager
def serving(engine: Engine, options: Options, port: int, system: str | None = None) -> Iterator[Server]:
    """A server that listens inside the block; it answers while its ``serve_forever`` runs.

    Args:
        options: what holds where a request says nothing.
        port: 0 takes any free one.
        system: what the page begins with.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        server = Server(engine, options, port, system)
    except OSError as error:
        raise ConfigError(
            f"Port {port} cannot be had: {error.strerror or error}. Give another one, or --port 0 for any that is free."
        ) from error
    try:
        yield server
    finally:
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lorafa", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/v1/models": self._models}, self._model)

    def do_POST(self) -> None:
        ways = {
            "/v1/chat/completions": lambda: self._complete(chat_request, ChatReply),
            "/v1/completions": lambda: self._complete(completion_request, CompletionReply),
            "/answers": self._side_by_side,
        }
        self._answer(ways)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: what clients send would reach the terminal."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library itself refuses, in the shape of all errors."""
        self._refuse(RequestError(message or HTTPStatus(code).phrase, code))

    # ---- from request to reply

    def _answer(self, ways: Mapping[str, Callable[[], None]], other: Callable[[str], None] | None = None) -> None:
        """Go the way of the path, and turn what is wrong into a reply."""
        try:
            self._require_own()
            path = urlsplit(self.path).path
            if self.command == "GET" and ("Content-Length" in self.headers or "Transfer-Encoding" in self.headers):
                self.close_connection = True  # a body that is not read is not the next request
            if path in ways:
                ways[path]()
            elif other is not None:
                other(path)
            else:
                raise RequestError(f"There is nothing to post to at {path!r}.", 404)
        except RequestError as error:
            self._refuse(error)
        except BusyError as error:
            self._refuse(RequestError(str(error), 503))
        except DataError as error:  # the conversation cannot be put to this model
            self._refuse(RequestError(str(error)))
        except OSError:  # the client is gone, or sends nothing more
            self.close_connection = True
        except Exception as error:
            self._refuse(RequestError(_failure(error), 500))

    def _require_own(self) -> None:
        """Raises RequestError for a request that a page of another site has made."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower().partition(":")[0] not in HOSTS:
            raise RequestError(
                f"This server answers under {' and '.join(HOSTS)} alone, and was called {hosts[:1] or 'nothing'}.", 403
            )
        for origin in self.headers.get_all("Origin") or []:
            if origin.lower() != f"http://{hosts[0].lower()}":
                raise RequestError("Requests from pages of other origins are refused.", 403)
        if self.command == "POST" and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise RequestError("Requests from pages of other sites are refused.", 403)

    def _body(self) -> dict[str, Any]:
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise RequestError(f"The body is to be application/json, found {kind}: send Content-Type.", 415)
        said = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(said) != 1:
            raise RequestError("The length of the body is to be said: send one Content-Length.", 411)
        if not (said[0].isascii() and said[0].isdigit()):
            raise RequestError("Content-Length is no number.")
        if len(said[0]) > 12 or (length := int(said[0])) > MOST_BYTES:
            raise RequestError(f"The body is longer than {MOST_BYTES} bytes. Send less.", 413)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client has gone")
        return parse_json(body)

    # ---- what there is

    def _page(self) -> None:
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        )
        self._send(self.server.html, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _models(self) -> None:
        names = self.server.engine.speakers.by_name
        self._send_json({"object": "list", "data": [self._described(name) for name in names]})

    def _model(self, path: str) -> None:
        name = unquote(path.removeprefix("/v1/models/"))
        if not path.startswith("/v1/models/"):
            raise RequestError(f"There is nothing at {path!r}.", 404)
        self._require_model(name)
        self._send_json(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.began, "owned_by": "lorafa"}

    def _require_model(self, name: str) -> None:
        known = self.server.engine.speakers.by_name
        if name not in known:
            raise RequestError(
                f"The model {name!r} does not exist.{did_you_mean(name, known)} There are: {', '.join(known)}.",
                404, "model", "model_not_found",
            )  # fmt: skip

    def _complete(self, read: Callable[[Mapping[str, Any], Options], Request], reply: type[Reply]) -> None:
        request = read(self._body(), self.server.options)
        self._require_model(request.model)
        job = self.server.engine.submit(self._rows(request))
        made = reply(request, job)
        if not request.stream:
            self._send_json(made.whole())
            return
        lines = (f"data: {json.dumps(chunk)}\n\n" for chunk in made.chunks())
        self._stream(job, lines, "text/event-stream; charset=utf-8", "data: {}\n\n", "data: [DONE]\n\n")

    def _rows(self, request: Request) -> list[Row]:
        speakers = self.server.engine.speakers
        speaker, places = speakers.find(request.model), range(request.choices)
        if request.messages:
            return [speakers.row(speaker, request.messages, request.options, place) for place in places]
        return [
            speakers.row_of_text(speaker, text, request.options, place) for text in request.texts for place in places
        ]

    def _side_by_side(self) -> None:
        """For the page: several conversations, each with its own model, answered in one batch.

        A line of the reply is an object with the model and new text, or why its answer has ended.
        """
        body, speakers = self._body(), self.server.engine.speakers
        asked = body.get("conversations")
        if not isinstance(asked, dict) or not asked:
            raise RequestError("conversations is an object with messages for each model.", param="conversations")
        options, rows = options_of(body, self.server.options), []
        for name, messages in asked.items():
            self._require_model(name)
            found = messages_of(messages, f"conversations.{name}")
            asked_before = sum(turn.role == "user" for turn in found) - 1
            rows.append(speakers.row(speakers.find(name), found, options, asked_before))
        job = self.server.engine.submit(rows)
        names = list(asked)

        def lines() -> Iterator[str]:
            for place, text, finish in job:
                yield json.dumps({"model": names[place], "text": text, "finish": finish}) + "\n"

        self._stream(job, lines(), "application/x-ndjson; charset=utf-8", "{}\n")

    # ---- sending

    def _stream(self, job: Job, lines: Iterable[str], kind: str, error_line: str, last: str = "") -> None:
        """Send lines as they come; the end of the connection is the end of the reply. Who goes away stops the job."""
        self.close_connection = True
        self._head(200, kind, {"Connection": "close"})
        try:
            for line in lines:
                self.wfile.write(line.encode())
            self.wfile.write(last.encode())
        except OSError:
            job.stop()
        except Exception as error:  # the head is sent, so it can only be said in its own line
            refused = RequestError(_failure(error), 500).body()
            self.wfile.write(error_line.replace("{}", json.dumps(refused)).encode())

    def _refuse(self, error: RequestError) -> None:
        self.close_connection = True  # what is left of the request is not read as another one
        self._send_json(error.body(), error.status, {"Connection": "close"})

    def _send_json(self, value: Mapping[str, Any], status: int = 200, more: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), "application/json", more or {}, status)

    def _send(self, body: bytes, kind: str, more: Mapping[str, str], status: int = 200) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **more})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, kind: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        always = {
            "Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
        }  # fmt: skip
        for name, value in {**always, **more}.items():
            self.send_header(name, value)
        self.end_headers()


def _failure(error: Exception) -> str:
    """What is said of an error that no request is to blame for."""
    return str(error) if isinstance(error, LoraError) else f"{type(error).__name__}: {first_line(error)}"
