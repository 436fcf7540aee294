"""The words of README, documentation, docstrings, help texts, notebooks and the examples' READMEs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import textstat
import yaml

from .docs_blocks import ROOT, pages

_LISTED = [
    line.partition(" => ")
    for line in (ROOT / "tests" / "prose.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
BANNED = [(re.compile(phrase, re.IGNORECASE), remedy) for phrase, _, remedy in _LISTED]
_NOT_ENGLISH = [
    re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1$", re.DOTALL | re.MULTILINE),  # blocks of code
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^ *\|.*$", re.MULTILINE),  # tables
    re.compile(r"^---\n.*?^---$", re.DOTALL | re.MULTILINE),  # front matter
    re.compile(r"^(#|=== ).*$", re.MULTILINE),  # headings, titles of tabs
    re.compile(r"^:::.*$(\n {4}.*$)*", re.MULTILINE),  # the reference, which is docstrings
]

_LONG = re.compile(r"^ *```.*?^ *```|!\[[^\]]*\]|^ *\|[^\n]*", re.DOTALL | re.MULTILINE)
"""What may have long lines: code, texts of images, tables."""


def english(markdown: str, code: str = "") -> str:
    """The sentences of a page: no blocks of code, tables, headings or addresses, and `code` for code within a sentence."""
    for pattern in _NOT_ENGLISH:
        markdown = pattern.sub("", markdown)
    markdown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"`[^`]+`", code, markdown)


def documents() -> list[Path]:
    """Pages, and the READMEs of the examples and of the demo's backbone."""
    return [*pages(), *sorted(ROOT.glob("examples/*/README.md")), *sorted(ROOT.glob("tap_flower/assets/*/README.md"))]


def texts() -> Iterator[tuple[str, str]]:
    """(where it stands, text) of everything that somebody reads."""
    for page in documents():
        yield str(page.relative_to(ROOT)), re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for notebook in sorted(ROOT.glob("examples/**/*.ipynb")):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                yield str(notebook.relative_to(ROOT)), "".join(cell["source"])
    for folder in ("tap_flower", "client_app", "server_app", "tools", "benchmarks"):
        for module in sorted((ROOT / folder).rglob("*.py")):
            for line, text in documentation(module.read_text()):
                yield f"{module.relative_to(ROOT)}:{line}", text


def documentation(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings of a module, those after attributes too, and what is given as `help`: line, text."""
    for node in ast.walk(ast.parse(source)):
        for value in (
            [node.value] if isinstance(node, ast.Expr) else [node.value] if getattr(node, "arg", "") == "help" else []
        ):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value


def banned(text: str) -> list[str]:
    """What is banned in a text, with what to write instead."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [
        f"{found[0]!r}: {remedy}"
        for paragraph in paragraphs
        for phrase, remedy in BANNED
        if (found := phrase.search(paragraph))
    ]


def test_no_banned_phrase_comes_back() -> None:
    wrong = [f"{place}: {found}" for place, text in texts() for found in banned(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""The\n\npresets that\nthere are."""', True),
        ('def f():\n    """Adds.\n\n    The same.\n    """', True),
        ('x = 1\n"""Of states that a process remembers."""', True),
        ('option(help="rounds without a better one; 0: never")', True),
        ('"""It does the same."""\nx = "the presets that there are"', False),
    ],
)
def test_banned_phrases_are_found_in_docstrings_and_help_texts(source: str, found: bool) -> None:
    assert bool([banned(text) for _, text in documentation(source) if banned(text)]) is found


@pytest.mark.parametrize("name", ["README.md", "docs/concepts.md"])
def test_the_first_pages_are_easy_to_read(name: str) -> None:
    assert textstat.flesch_reading_ease(english((ROOT / name).read_text())) >= 50


def without_text(found: re.Match[str]) -> str:
    """The line breaks of what was found."""
    return "\n" * found[0].count("\n")


def test_lines_of_prose_are_short() -> None:
    """One sentence a line, broken at 120 characters at most; addresses of links and texts of images may be longer."""
    wrong = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages()
        if page.is_relative_to(ROOT / "docs") and page.name not in {"results.md", "reproduce.md", "sweeps.md"}
        for number, line in enumerate(_LONG.sub(without_text, page.read_text()).split("\n"), 1)
        if len(re.sub(r"\]\([^)]*\)", "]", line)) > 120
    ]
    assert not wrong


def test_every_page_opens_with_what_a_reader_can_do_after_it() -> None:
    """And with a short example; the page of results and the reference of the API have a manner of their own."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name != "results.md":
            first = re.sub(r"\A---\n.*?\n---\n", "", page.read_text(), flags=re.DOTALL).split("\n", 25)
            assert any(line.startswith("After this page") for line in first[1:3]), page
            assert any(line.startswith("```") for line in first[:8]), page


def test_the_pages_are_few_and_in_four_groups() -> None:
    groups = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert [name for group in groups for name in group] == ["Learn", "Guides", "Reference", "Project"]
    assert len(list((ROOT / "docs").glob("*.md"))) <= 20


def test_the_glossary_has_the_terms() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text()
    terms = "pair, component, server copy, personal model, teacher, evidence, margin, replacement, distillation, reach"
    assert [term for term in terms.split(", ") if f"**{term}**" not in page] == []


def test_proselint_finds_nothing(tmp_path: Path) -> None:
    """Without its rules on résumé, which take the verb for the noun, and on dates, which we have none of.

    RESULTS.md is left out, which is tables and their captions, and the card of the demo's backbone, which is generated.
    """
    off = dict.fromkeys(("typography.diacritical_marks", "dates_times"), False)
    (tmp_path / "config.json").write_text(json.dumps({"checks": off}))
    for page in documents():
        if {"benchmarks", "assets"} & set(page.relative_to(ROOT).parts):
            continue
        file = tmp_path / "pages" / page.relative_to(ROOT)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(english(page.read_text(), "CODE"))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("proselint")),
            "check",
            "--config", str(tmp_path / "config.json"),
            str(tmp_path / "pages"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
