"""The documentation's blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r" *```(\w*)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")
_SEPARATORS = {";", "&&", "||", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file, from the project's root.
        line: of its fence, counted from 1.
        language: what stands after the fence; nothing for commands.
        text: without indentation.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def begins(self) -> str:
        """Its first line, which the table of tests knows it by."""
        return self.text.partition("\n")[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: the block that begins with {self.begins!r}"


def pages() -> list[Path]:
    """README.md, the results of the benchmarks, and every page of the site."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, those within tabs too."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.fullmatch(line.rstrip())
        if opened is None and fence:
            opened, lines = (number, fence[1]), []
        elif opened is not None and line.strip() == "```":
            text = textwrap.dedent("\n".join(lines))
            found.append(Block(str(page.relative_to(ROOT)), *opened, text))
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{page}:{opened}: the block has no end"
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script: words without assignments, redirections' targets and a loop's frame.

    A variable of a loop stands for its first value. Comments are left out.
    """
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words: list[str] = []
        for token in [*reader, ";"]:
            if token not in _SEPARATORS:
                words.append(token)
                continue
            if words[:1] == ["for"]:
                variables[words[1]] = words[3]
                words = []
            while words and (words[0] in {"do", "done"} or _ASSIGNMENT.fullmatch(words[0])):
                words = words[1:]
            if words:
                yield [_filled(word, variables) for word in words]
            words = []


def _filled(word: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    return word


def inline(page: Path, program: str) -> Iterator[str]:
    """The commands of a program in the running text, without those that are cut short or show their syntax."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(rf"`({program} [^`]+)`", prose):
        if not re.search(r"…|\.\.\.|\[-|\b[A-Z]+\.\.\.", code):
            yield " ".join(code.split())
