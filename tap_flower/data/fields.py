"""What the roles of a task (image, text, label, target) are read from: columns of a row, or a Jinja2 template over them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tap_flower.errors import SpecError
from tap_flower.plain import shown

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
"""A template is somebody's text, and runs in a sandbox."""


@dataclass(frozen=True)
class Field:
    """What a role is read from: columns of a row, joined with a space where there are several, or a template over them."""

    columns: tuple[str, ...] = ()
    template: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns that it needs."""
        return self.columns or _variables(self.template)

    def rendered(self, values: Mapping[str, object]) -> str:
        """The template over the values of a row's columns; raises whatever a filter of the template raises."""
        return _compiled(self.template).render(values)


def fields_of(columns: Mapping[str, Any], templates: Mapping[str, Any]) -> dict[str, Field]:
    """Role -> what it is read from, by `columns` and `templates` of a client spec; templates come first."""
    found = {role: Field((names,) if isinstance(names, str) else tuple(names)) for role, names in columns.items()}
    return found | {role: Field(template=text) for role, text in templates.items()}


def check_columns(columns: Mapping[Any, Any], templates: Mapping[Any, Any], where: str) -> None:
    """Checks that roles are read from texts, before `fields_of` takes them.

    Raises:
        SpecError: one is not; `where` begins the message.
    """
    for role, names in columns.items():
        listed = names if isinstance(names, list | tuple) else [names]
        if not listed or not all(isinstance(name, str) for name in listed):
            raise SpecError(f"{where} reads {shown(role)} from {shown(names)}: name a column, or list several")
    for role, text in templates.items():
        if not isinstance(text, str) or not text:
            raise SpecError(f"{where} has the template {shown(text)} for {shown(role)}: write a text")


def check_fields(fields: Mapping[str, Field], roles: Collection[str], where: str) -> None:
    """Checks that a task's roles are read, and nothing else.

    Raises:
        SpecError: a role is missing or unknown, a template is wrong, or an image or label is read from several columns;
            `where` begins the message.
    """
    if missing := sorted(set(roles) - fields.keys()):
        raise SpecError(f"{where} names no column for {', '.join(missing)}: add it under `columns`")
    for role, read in fields.items():
        if role not in roles:
            raise SpecError(f"{where} reads {shown(role)}, which it does not have: use {', '.join(sorted(roles))}")
        if role in ("image", "label") and len(read.columns) != 1:
            raise SpecError(
                f"{where} reads {role} from {read.template or list(read.columns)!r}: name one column for it"
            )
        if read.template and (problem := _problem(read.template)):
            raise SpecError(f"{where} has a template for {role} that is wrong: {problem}")


@lru_cache(maxsize=1024)
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)


@lru_cache(maxsize=1024)
def _variables(template: str) -> tuple[str, ...]:
    return tuple(sorted(meta.find_undeclared_variables(_ENVIRONMENT.parse(template))))


def _problem(template: str) -> str | None:
    """What is wrong with a template's syntax, or None."""
    try:
        _compiled(template)
    except TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno} of {template!r})"
    except Exception as error:  # what Python's compiler raises where it is nested too deeply, or has endless numbers
        return f"{type(error).__name__}: {error} (in {shown(template)})"
    return None
