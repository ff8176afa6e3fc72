"""From what a model answers to a program: the code in it, whole or a body that goes under what was asked."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator, Sequence

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|```|\Z)", flags=re.DOTALL)
_FENCE = re.compile(r"^[ \t]*```.*$\n?", flags=re.MULTILINE)
_CODE = re.compile(r"(?:import|from|def|class|async def)\b|@\w")
"""How the first line of a program begins, where words may stand before it."""
INDENT = 4
"""Blanks of a step, in what is asked and so in what goes under it."""


def program_of(answer: str, prompt: str, entry_point: str) -> str:
    """The program that an answer makes of a prompt: a signature with a docstring, and what stands before it.

    An answer that defines the function is taken as it is, behind what the prompt has before the function (its imports);
    any other is the function's body. Of an answer with fences that is what they hold; words before and after code are
    left out. What the program needs and another fence defines, a function or an import, is put before the function.
    Where nothing can be read as Python, what comes nearest is returned all the same: it is wrong.
    """
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", flags=re.MULTILINE)
    texts = list(_codes(answer))
    before = prompt[: max((match.start() for match in defines.finditer(prompt)), default=0)]
    whole = [text for each in texts if defines.search(text := textwrap.dedent(each))]
    for text in whole:
        if (code := _readable(text, defines)) is not None:
            return before + _helpers(before + code, answer) + f"{code}\n"
    if whole:
        return f"{before}{whole[0]}\n"
    bodies = [body for text in texts for body in _bodies(text)]
    for body in bodies:
        if _parses(program := f"{prompt.rstrip()}\n{body}\n"):
            return before + _helpers(program, answer) + program.removeprefix(before)
    for body in bodies:  # words after the code
        for shorter in _without_ends(body):
            if _parses(program := f"{prompt.rstrip()}\n{shorter}\n"):
                return before + _helpers(program, answer) + program.removeprefix(before)
    return f"{prompt.rstrip()}\n{bodies[0]}\n"


def _helpers(program: str, answer: str) -> str:
    """The statements of an answer's fences that bind names which the program reads and nobody binds, and names which
    those statements read in turn; in their order, and nothing else of the fences."""
    if not _parses(program):
        return ""
    blocks = [text for block in _FENCED.findall(answer) if _parses(text := textwrap.dedent(block))]
    statements = [statement for block in blocks for statement in ast.parse(block).body]
    of_name: dict[str, ast.stmt] = {}
    for statement in statements:
        for name in _bound_by(statement):
            of_name.setdefault(name, statement)
    taken, read = list[ast.stmt](), list[ast.stmt](ast.parse(program).body)
    while missing := [name for name in _missing([*read, *taken]) if name in of_name]:
        taken.append(of_name[missing[0]])
    try:
        return "".join(f"{ast.unparse(statement)}\n\n\n" for statement in statements if statement in taken)
    except RecursionError:  # deeper than can be written, where it could be read
        return ""


def _bound_by(statement: ast.stmt) -> set[str]:
    """The names that a statement on the outermost level gives something to."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(one.asname or one.name).partition(".")[0] for one in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _missing(statements: Sequence[ast.stmt]) -> list[str]:
    """The names that statements read and nothing in them binds, without those that Python has itself."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {name for node in nodes if isinstance(node, ast.stmt) for name in _bound_by(node)}
    bound |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    read = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return [name for name in dict.fromkeys(read) if name not in bound and not hasattr(builtins, name)]


def _codes(answer: str) -> Iterator[str]:
    """What may be the code of an answer, the likeliest first."""
    fenced = [block for block in _FENCED.findall(answer) if block.strip()]
    if answer.count("```") == 1 and answer.partition("```")[0].strip():  # the prompt had opened it
        yield answer.partition("```")[0]
    yield from fenced
    if len(fenced) > 1:
        yield "\n".join(fenced)
    yield _FENCE.sub("", answer)


def _readable(text: str, defines: re.Pattern[str]) -> str | None:
    """The code of a text: from a line that begins like some, as far as it can be read and defines the function."""
    if _parses(text):
        return text
    lines = text.splitlines()
    for first in (at for at, line in enumerate(lines) if _CODE.match(line)):
        for code in _without_ends("\n".join(lines[first:])):
            if not defines.search(code):
                break
            if _parses(code):
                return code
    return None


def _without_ends(text: str) -> Iterator[str]:
    """The text, and what is left of it as its last lines are taken away one by one."""
    lines = text.splitlines()
    for count in range(len(lines), 0, -1):
        if lines[count - 1].strip():
            yield "\n".join(lines[:count])


def _bodies(text: str) -> Iterator[str]:
    """A text as the body of a function: as it stands where it is indented, one step in, or with a first line that has
    lost its blanks."""
    text = text.expandtabs(INDENT).strip("\n").rstrip()
    if text[:1].isspace():
        yield text
    yield textwrap.indent(textwrap.dedent(text), " " * INDENT)
    first, _, rest = text.partition("\n")
    yield " " * INDENT + first.lstrip() + ("\n" + rest if rest else "")


def _parses(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of brackets that are too deep
        return False
