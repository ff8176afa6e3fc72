"""The server as clients see it: models, answers whole and streamed, and who is not let in."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lorafa.chat.decoding import Answer, write
from lorafa.chat.engine import Engine
from lorafa.chat.options import Options
from lorafa.chat.server import MOST_BYTES, Server, serving
from lorafa.data.records import Message
from lorafa.errors import ConfigError
from toys.speakers import make_speakers

SPEAKERS, ALONE = make_speakers(), make_speakers()
"""The same model again: one thread alone may use a model, and that is the engine's."""
DEFAULTS = Options(max_new_tokens=8)
USER = [{"role": "user", "content": "One?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Engine(SPEAKERS) as engine, serving(engine, DEFAULTS, 0, "Be <b>brief</b>.") as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def send(
    server: Server, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    found = reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    connection.close()
    return found


def post(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    status, headers, found = send(
        server, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    if not headers["content-type"].startswith("text/event-stream"):
        return status, json.loads(found)
    *events, last = found.decode().split("\n\n")
    assert (last, events[-1]) == ("", "data: [DONE]")
    return status, [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def answer(name: str, options: Options = DEFAULTS, place: int = 0, text: str | None = None) -> Answer:
    speaker = ALONE.find(name)
    if text is None:
        one = ALONE.row(speaker, (Message("user", "One?"),), options, place)
    else:
        one = ALONE.row_of_text(speaker, text, options, place)
    made = Answer(ALONE, one)
    write(ALONE.model, [made])
    return made


def usage(answers: Sequence[Answer], prompts: int = 1) -> dict[str, int]:
    asked, written = sum(len(one.row.prompt) for one in answers[:prompts]), sum(one.tokens for one in answers)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def test_the_base_and_each_adapter_is_a_model(server: Server) -> None:
    status, _, body = send(server, "GET", "/v1/models")
    found = json.loads(body)
    assert (status, found["object"]) == (200, "list")
    assert [one["id"] for one in found["data"]] == ["tiny", "german", "french"]
    status, _, body = send(server, "GET", "/v1/models/german")
    assert (status, json.loads(body)) == (200, found["data"][1])
    assert send(server, "GET", "/v1/models/spanish")[0] == 404


@pytest.mark.parametrize("name", ["tiny", "german", "french"])
def test_an_answer_is_that_of_the_model_that_is_named(name: str, server: Server) -> None:
    expected = answer(name)
    status, found = post(server, CHAT, model=name, messages=USER)
    assert status == 200
    assert (found["object"], found["model"], found["usage"]) == ("chat.completion", name, usage([expected]))
    (choice,) = found["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", expected.text)
    assert choice["finish_reason"] == expected.finish


def test_a_stream_is_the_same_answer_in_parts(server: Server) -> None:
    expected = answer("german")
    _, chunks = post(server, CHAT, model="german", messages=USER, stream=True, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    assert "".join(parts) == expected.text
    assert len(parts) > 4
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(parts) - 1) + [
        expected.finish
    ]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage([expected]))
    _, without = post(server, CHAT, model="german", messages=USER, stream=True)
    assert [chunk["choices"] for chunk in without] == [chunk["choices"] for chunk in chunks[:-1]]


def test_several_drawn_answers_differ_and_come_again_with_their_seed(server: Server) -> None:
    asked: dict[str, Any] = {
        "model": "french", "messages": USER, "n": 3, "temperature": 1.0, "top_p": 0.95, "seed": 4, "max_tokens": 5,
    }  # fmt: skip
    expected = [answer("french", Options(5, 1.0, 0.95, 4), place) for place in range(3)]
    _, found = post(server, CHAT, **asked)
    assert [choice["message"]["content"] for choice in found["choices"]] == [one.text for one in expected]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert len({one.text for one in expected}) == 3
    assert found["usage"] == usage(expected)
    _, chunks = post(server, CHAT, **asked, stream=True)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == [one.text for one in expected]


def test_lengths_and_stops_are_those_of_the_request(server: Server) -> None:
    _, found = post(server, CHAT, model="tiny", messages=USER, max_completion_tokens=3)
    assert (found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]) == (3, "length")
    whole = answer("tiny", Options(max_new_tokens=30)).text
    stop = whole[3:5]
    _, found = post(server, CHAT, model="tiny", messages=USER, max_tokens=30, stop=[stop])
    assert found["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"


def test_texts_are_continued(server: Server) -> None:
    expected = [answer("german", text=text) for text in ("one two", "three")]
    _, found = post(server, TEXT, model="german", prompt=["one two", "three"])
    assert found["object"] == "text_completion"
    assert [choice["text"] for choice in found["choices"]] == [one.text for one in expected]
    assert found["usage"] == usage(expected, prompts=2)
    _, chunks = post(server, TEXT, model="german", prompt="one two", stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[0].text


def test_requests_that_come_together_all_get_their_own_answers(server: Server) -> None:
    names, found = ["tiny", "german", "french"] * 4, {}

    def ask(number: int) -> None:
        found[number] = post(server, CHAT, model=names[number], messages=USER)[1]["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: answer(name).text for name in names}
    assert [found[number] for number in range(len(names))] == [expected[name] for name in names]


def test_conversations_side_by_side_for_the_page(server: Server) -> None:
    conversations = {"german": USER, "tiny": USER}
    status, headers, body = send(
        server, "POST", "/answers", json.dumps({"conversations": conversations, "max_tokens": 6}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    assert (status, headers["content-type"]) == (200, "application/x-ndjson; charset=utf-8")
    lines = [json.loads(line) for line in body.decode().splitlines()]
    for name in conversations:
        own, expected = [line for line in lines if line["model"] == name], answer(name, Options(6))
        assert "".join(line["text"] for line in own) == expected.text
        assert [line["finish"] for line in own][-1] == expected.finish
    status, _, body = send(server, "POST", "/answers", b'{"conversations": {"nobody": []}}', {
        "Content-Type": "application/json"})  # fmt: skip
    assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")


def test_the_page_needs_nothing_from_elsewhere_and_its_texts_are_escaped(server: Server) -> None:
    status, headers, body = send(server, "GET", "/")
    page = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "Be &lt;b&gt;brief&lt;/b&gt;." in page
    assert "innerHTML" not in page
    assert not [word for word in ("http://", "https://", "src=", "@import", "url(") if word in page]


# ---- what is refused


def refused(found: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = found
    error = json.loads(body)["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert "access-control-allow-origin" not in headers
    return status, error["message"]


def test_a_model_that_is_not_there(server: Server) -> None:
    status, found = post(server, CHAT, model="germa", messages=USER)
    assert status == 404
    assert found["error"] == {
        "message": "The model 'germa' does not exist. Did you mean 'german'? There are: tiny, german, french.",
        "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"temperature": 9}, 400, "temperature is a number from 0 to 2"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, 400, "leaves no room for an answer"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(body: dict[str, Any], status: int, text: str, server: Server) -> None:
    found = post(server, CHAT, **({"model": "tiny", "messages": USER} | body))
    assert (found[0], text in found[1]["error"]["message"]) == (status, True)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{}", 415),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        (JSON, b"no json", 400),
        (JSON, b"[1]", 400),
        (JSON | {"Content-Length": str(MOST_BYTES + 1)}, b"", 413),
        (JSON | {"Content-Length": "-1"}, b"", 400),
        (JSON | {"Content-Length": "9" * 30}, b"", 413),
        (JSON | {"Transfer-Encoding": "chunked"}, b"2\r\n{}\r\n0\r\n\r\n", 411),
        (JSON | {"Origin": "http://evil.example"}, b"{}", 403),
        (JSON | {"Origin": "null"}, b"{}", 403),
        (JSON | {"Origin": "http://localhost:1"}, b"{}", 403),
        (JSON | {"Sec-Fetch-Site": "cross-site"}, b"{}", 403),
        (JSON | {"Sec-Fetch-Site": "same-site"}, b"{}", 403),
        (JSON | {"Host": "evil.example"}, b"{}", 403),
        (JSON | {"Host": "127.0.0.1.evil.example"}, b"{}", 403),
    ],
)
def test_what_is_not_let_in(headers: dict[str, str], body: bytes, status: int, server: Server) -> None:
    assert refused(send(server, "POST", CHAT, body, headers))[0] == status


def test_its_own_page_is_let_in_under_both_names_and_through_a_tunnel(server: Server) -> None:
    body = json.dumps({"model": "tiny", "messages": USER, "max_tokens": 1}).encode()
    for host in (f"127.0.0.1:{server.server_port}", "localhost:9999", "LOCALHOST"):
        headers = JSON | {"Host": host, "Origin": f"http://{host.lower()}", "Sec-Fetch-Site": "same-origin"}
        assert send(server, "POST", CHAT, body, headers)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/../etc/passwd", 404), ("GET", CHAT, 404), ("POST", "/", 404),
     ("OPTIONS", CHAT, 501), ("PUT", "/", 501), ("DELETE", "/v1/models/tiny", 501)],
)  # fmt: skip
def test_what_there_is_not(method: str, path: str, status: int, server: Server) -> None:
    assert refused(send(server, method, path, headers=JSON))[0] == status


def test_a_page_of_another_host_gets_nothing_by_get_either(server: Server) -> None:
    for path in ("/", "/v1/models"):
        assert refused(send(server, "GET", path, headers={"Host": "evil.example:80"}))[0] == 403


def test_the_body_of_a_get_is_not_taken_for_a_request(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", "/v1/models", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["object"]) == (200, "list")
    assert connection.sock is not None
    assert connection.sock.recv(100) == b""  # and the connection is over
    connection.close()


def test_a_client_that_goes_away_ends_its_answer(server: Server) -> None:
    jobs = []
    submit = server.engine.submit

    def remember(rows: Any) -> Any:
        jobs.append(submit(rows))
        return jobs[-1]

    server.engine.submit = remember  # type: ignore[method-assign]
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        body = {"model": "french", "messages": USER, "max_tokens": 450, "stream": True, "temperature": 2, "n": 2}
        connection.request("POST", CHAT, json.dumps(body).encode(), JSON)
        connection.getresponse().read(200)
        connection.sock and connection.sock.close()
        connection.close()
        assert post(server, CHAT, model="tiny", messages=USER)[0] == 200  # when the batch before it is over
    finally:
        del server.engine.submit
    assert "cancelled" in {one.finish for one in jobs[0].answers}


def test_an_error_of_the_model_is_said_and_the_next_request_is_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafa.chat import engine

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write", fails)
        status, found = post(server, CHAT, model="tiny", messages=USER)
        assert (status, found["error"]["type"], found["error"]["message"]) == (
            500, "server_error", "RuntimeError: out of memory",
        )  # fmt: skip
        _, _, body = send(server, "POST", CHAT, json.dumps(
            {"model": "tiny", "messages": USER, "stream": True}).encode(), JSON)  # fmt: skip
        assert json.loads(body.decode().splitlines()[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert post(server, CHAT, model="tiny", messages=USER)[0] == 200


def test_a_port_that_is_taken_is_an_error(server: Server) -> None:
    with (
        pytest.raises(ConfigError, match=f"Port {server.server_port} cannot be had"),
        serving(server.engine, DEFAULTS, server.server_port),
    ):
        pass
