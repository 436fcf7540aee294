"""Prompts as Jinja2 templates over the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


class PromptError(ValueError):
    """A template cannot be rendered for a row."""


@cache
def problem(template: str) -> str | None:
    """What is wrong with a template's syntax, or None."""
    try:
        _ENVIRONMENT.parse(template)
    except TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno} of {template!r})"
    return None


@cache
def variables(template: str) -> frozenset[str]:
    """The columns that a template reads."""
    return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(template)))


def render(template: str, row: Mapping[str, Any]) -> str:
    """The prompt for a row.

    Args:
        template: Jinja2; it runs in a sandbox.
        row: column -> value.

    Raises:
        PromptError: the template fails on this row.
    """
    try:
        return _compiled(template).render(row)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise PromptError(f"{error} (template {template!r})") from error


@cache
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)
