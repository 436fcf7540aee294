"""Prompts as Jinja2 templates over the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tap_flower.plain import shown

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


class PromptError(ValueError):
    """A template cannot be rendered for a row."""


@cache
def problem(template: str) -> str | None:
    """What is wrong with a template's syntax, or None."""
    try:
        _compiled(template)
    except TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno} of {template!r})"
    except Exception as error:  # what Python's compiler raises where it is nested too deeply, or has endless numbers
        return f"{type(error).__name__}: {error} (in {shown(template)})"
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
    except Exception as error:  # a TemplateError, or what a filter raises on a value
        raise PromptError(f"{error} (template {template!r})") from error


@cache
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)
