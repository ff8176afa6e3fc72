"""A chat in a terminal or by a pipe: lines that are asked, lines that are commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafa.chat.conversation import Conversation
from lorafa.chat.drawing import drawing
from lorafa.chat.engine import Engine
from lorafa.chat.options import Options
from lorafa.chat.printable import printable
from lorafa.errors import ConfigError, LoraError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

HELP = """\
/adapters          who answers; /adapters NAME ... lets these alone answer, /adapters all everyone
/system TEXT       another system prompt, and begin anew; without a text none
/reset             begin anew
/help              this
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer
//text             asks "/text\""""


class Session:
    """Asks whoever answers, and shows the answers side by side."""

    def __init__(
        self, engine: Engine, options: Options, system: str | None, console: Console, notices: Console, *, strict: bool
    ) -> None:
        """Begin with everyone answering.

        Args:
            console: where answers go.
            notices: where everything else is said.
            strict: a question that cannot be asked ends the session with its error, as it should where nobody reads
                along; otherwise the error is shown and the next line is read.
        """
        self.engine, self.options, self.strict = engine, options, strict
        self.console, self.notices = console, notices
        self.conversation = Conversation(system)
        self.names = list(engine.speakers.by_name)
        self._commands: dict[str, Callable[[str], None]] = {
            "adapters": self._choose,
            "system": self._system,
            "reset": self._reset,
            "help": self._help,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Take lines until there are no more, or one says to leave.

        Raises:
            LoraError: a line cannot be answered, where the session is strict.
        """
        for line in lines:
            if not (line := line.strip()):
                continue
            if line == "/quit":
                return
            try:
                self._take(line)
            except LoraError as error:
                if self.strict:
                    raise
                self.notices.print("[bold red]error:[/bold red]", end=" ")
                text = printable(" ".join(str(error).split()))
                self.notices.print(text, markup=False, highlight=False, soft_wrap=True)

    def _take(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            self.ask(line[1:] if line.startswith("//") else line)
            return
        word, _, rest = line[1:].partition(" ")
        if word not in self._commands:
            known = [*self._commands, "quit"]
            raise ConfigError(
                f"There is no command /{word}.{did_you_mean(word, known)} There are: "
                f"{', '.join(f'/{one}' for one in known)}. To ask this, begin with //."
            )
        self._commands[word](rest.strip())

    def ask(self, question: str) -> None:
        """Ask everyone who is to answer, in one batch, and show the answers as they come.

        Ctrl-C ends the answers where they are; what was said so far is kept.

        Raises:
            DataError: the question cannot be put to one of them. Nobody was asked then.
        """
        speakers, asked = self.engine.speakers, self.conversation.asked
        rows = [
            speakers.row(speakers.find(name), self.conversation.messages(name, question), self.options, place=asked)
            for name in self.names
        ]
        job = self.engine.submit(rows)
        with _interrupting(job.stop), drawing(self.console, self.names) as shown:
            for place, text, finish in job:
                shown.add(place, text)
                if finish is not None:
                    shown.end(place)
        answers = dict(zip(self.names, job.answers, strict=True))
        self.conversation.add(question, {name: answer.text for name, answer in answers.items()})
        for name, answer in answers.items():
            if answer.finish == "length":
                self._say(f"{name}: cut off at {answer.tokens} tokens.")
        if any(answer.finish == "cancelled" for answer in answers.values()):
            self._say("Stopped.")

    # ---- commands

    def _choose(self, names: str) -> None:
        everyone = list(self.engine.speakers.by_name)
        if names:
            chosen = everyone if names == "all" else [self.engine.speakers.find(name).name for name in names.split()]
            self.names = list(dict.fromkeys(chosen))
        for name in everyone:
            what = " (the base)" if name == self.engine.speakers.base else ""
            self._say(f"{'*' if name in self.names else ' '} {name}{what}")

    def _system(self, text: str) -> None:
        self.conversation.reset(text or None)
        self._say("The system prompt is set, and the conversation begins anew." if text else "No system prompt now.")

    def _reset(self, _: str) -> None:
        self.conversation.reset(self.conversation.system)
        self._say("The conversation begins anew.")

    def _help(self, _: str) -> None:
        self._say(HELP)

    def _say(self, text: str) -> None:
        self.notices.print(printable(text), style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``stop`` inside the block, and only a second one is raised: nothing of what is heard gets lost."""
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
