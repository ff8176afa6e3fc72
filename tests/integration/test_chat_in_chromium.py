"""The page of `lorafa chat --serve` in a browser: typed into, streamed to, stopped, given texts that are no HTML."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lorafa.chat.decoding import Answer, write
from lorafa.chat.engine import Engine
from lorafa.chat.options import Options
from lorafa.chat.server import Server, serving
from lorafa.data.records import Message
from toys.browser import Browser, browsing
from toys.chats import turns
from toys.speakers import make_speakers

HOSTILE = '<img src=x onerror="window.hacked = 1"></script><script>window.hacked = 1</script>'
DEFAULTS = Options(max_new_tokens=12)
NAMES = ["tiny", "german", "french"]


def endless() -> Any:
    """Answers go on until they are as long as they may be."""
    return make_speakers(ends=())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Engine(endless()) as engine, serving(engine, DEFAULTS, 0, HOSTILE) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(opened: Browser, server: Server) -> Browser:
    opened.open(server.address)
    opened.complaints.clear()
    opened.asked.clear()
    return opened


def answer(name: str, *messages: Message) -> str:
    speakers = endless()
    one = Answer(speakers, speakers.row(speakers.find(name), messages, DEFAULTS))
    write(speakers.model, [one])
    return one.text


def shown(page: Browser, turn: int = 0) -> dict[str, str]:
    """Model -> what stands in its column of a turn."""
    cells = f"[...document.querySelectorAll('section')[{turn}].querySelectorAll('[data-model]')]"
    return dict(page.value(f"{cells}.map(cell => [cell.dataset.model, cell.textContent])"))


def ask(page: Browser, question: str) -> None:
    page.value("document.getElementById('question').focus()")
    page.type(question, enter=True)


def done(page: Browser, turns_done: int) -> None:
    page.until(f"document.querySelectorAll('section[data-done]').length === {turns_done}")


def test_everyone_answers_side_by_side_and_remembers_its_own_answers(page: Browser, server: Server) -> None:
    page.click("summary")
    page.value("document.getElementById('system').value = ''")
    ask(page, "One?")
    done(page, 1)
    first = {name: answer(name, *turns(("user", "One?"))) for name in NAMES}
    assert shown(page) == first
    assert len({*first.values()}) == 3
    ask(page, "Two?")
    done(page, 2)
    assert shown(page, 1) == {
        name: answer(name, *turns(("user", "One?"), ("assistant", first[name]), ("user", "Two?"))) for name in NAMES
    }
    page.click("#reset")
    assert page.value("document.querySelectorAll('section').length") == 0
    page.click("#models label:nth-of-type(2) input")
    ask(page, "One?")
    done(page, 1)
    assert shown(page) == {name: first[name] for name in ("tiny", "french")}
    assert page.complaints == []
    assert {*page.asked} == {f"{server.address}answers"}


def test_texts_of_models_readers_and_commands_are_no_html(
    page: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.value("document.getElementById('system').value") == HOSTILE
    monkeypatch.setattr(type(server.engine.speakers), "decode", lambda *_: HOSTILE)
    ask(page, HOSTILE)
    done(page, 1)
    assert shown(page) == dict.fromkeys(NAMES, HOSTILE)
    assert page.value("document.querySelector('.question').textContent") == HOSTILE
    assert page.value("[document.images.length, window.hacked === undefined]") == [0, True]


def test_answers_come_as_they_are_written_and_stop_when_they_are_told_to(
    page: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, take = threading.Event(), Answer.take

    def slowly(self: Answer, token: int) -> None:
        if self.tokens == 5:
            assert go.wait(20)
        take(self, token)

    monkeypatch.setattr(Answer, "take", slowly)
    page.value("document.getElementById('system').value = ''")
    page.value("document.getElementById('max_tokens').value = 400")
    ask(page, "One?")
    page.until("[...document.querySelectorAll('[data-model]')].every(cell => cell.textContent)")
    some = shown(page)
    assert all(len(text) < 12 for text in some.values())
    assert page.value("document.querySelectorAll('section[data-done]').length") == 0
    page.click("#stop")
    done(page, 1)
    go.set()
    assert shown(page) == some
    assert page.value("document.querySelector('section > .note').textContent") == "Stopped."
    page.value("document.getElementById('max_tokens').value = 3")
    ask(page, "Two?")
    done(page, 2)
    assert page.value("document.querySelectorAll('section:last-child .note').length") == 3  # cut off


def test_what_is_refused_is_said_and_the_question_stays(page: Browser) -> None:
    ask(page, "a" * 600)
    done(page, 1)
    assert "leaves no room for an answer" in page.value("document.querySelector('.error').textContent")
    assert page.value("document.getElementById('question').value") == "a" * 600
    page.value("document.getElementById('question').value = ''")
    page.value("document.getElementById('system').value = ''")
    ask(page, "One?")
    done(page, 2)
    assert shown(page, 1)["tiny"] == answer("tiny", *turns(("user", "One?")))


def test_the_page_fits_a_phone_and_is_dark_where_the_reader_is(page: Browser, server: Server) -> None:
    page.open(server.address, width=390)
    page.value("document.getElementById('system').value = ''")
    ask(page, "One?-without-any-space " * 2 + "-" * 200)
    done(page, 1)
    assert page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.value(paper)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.value(paper) != light
    page.call("Emulation.setEmulatedMedia", features=[])


def test_a_page_of_another_origin_gets_nothing(
    page: Browser, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that the reader has open beside it, with this server's address in its script."""
    with Engine(replace(server.engine.speakers)) as other, serving(other, DEFAULTS, 0) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.01,))
        thread.start()
        page.call("Page.setBypassCSP", enabled=True)
        page.open(site.address)
        page.call("Page.setBypassCSP", enabled=False)
        submitted: list[Any] = []
        monkeypatch.setattr(server.engine, "submit", submitted.append)
        for kind in ("application/json", "text/plain"):
            for mode in ("cors", "no-cors"):
                said = page.value(
                    f"fetch('{server.address}v1/completions', {{method: 'POST', mode: '{mode}', headers: "
                    f"{{'Content-Type': '{kind}'}}, body: '{{\"model\": \"tiny\", \"prompt\": \"a\"}}'}})"
                    ".then(reply => reply.status, error => 'refused')"
                )
                assert said == "refused"
        assert submitted == []
        seen = page.value(f"fetch('{server.address}v1/models').then(reply => reply.text(), error => 'refused')")
        assert seen == "refused"
        site.shutdown()
        thread.join()
