"""How the roles of a task are read: from columns or a Jinja2 template, images in which form; the keys of a spec's parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tap_flower.errors import SpecError
from tap_flower.plain import did_you_mean, shown

_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    key: (words, types)
    for keys, words, types in (
        (
            "name backbone kind domain format split path config data fit background delimiter encoding quote escape",
            "a text: put it in quotes",
            (str,),
        ),
        ("tasks modalities labels mean std missing by", "a list", (list, tuple)),
        ("part", "two fractions", (list, tuple)),
        ("columns templates image", "`key: value` lines", (Mapping,)),
        ("train validation test", "a source or a list of them", (list, tuple, Mapping)),
        ("classes", "a list of names, or their number", (list, tuple, int)),
        ("rows", "numbers", (list, tuple, int)),
        ("margin", "a number", (int, float)),
        ("batch_size size", "a whole number", (int,)),
        ("shuffle", "true or false", (bool,)),
        ("revision", "a text", (str, int, float, date)),
    )
    for key in keys.split()
}
"""Key -> (what its value is, in words, and in types); `null` stands for a key that is not there."""
LIKE_MISSING = frozenset({"na", "n/a", "nan", "null", "none", "nil", "missing", "unknown", "?", "-", "--", "."})
"""Words, in small letters, that often stand for a value that is not there."""
FITS = ("crop", "pad", "squeeze")


def is_missing(value: object) -> bool:
    """Whether a column's value stands for none: null, or not a number."""
    return value is None or value != value


def _printed(value: object) -> object:
    """What a template's `{{ }}` may put into a text."""
    if not isinstance(value, str | int | float | Decimal | date | time | timedelta | Undefined):
        raise UndefinedError(f"a {type(value).__name__} is no text: name one of its parts, or join them")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, finalize=_printed)
"""A template is somebody's text, and runs in a sandbox."""
_ENVIRONMENT.globals.clear()  # a name is that of a column
del _ENVIRONMENT.filters["random"]  # a row has one text


@dataclass(frozen=True)
class ImageForm:
    """What the images of a task are made into before a model gets them.

    Attributes:
        size: side of the square image in pixels, a multiple of 8; 0 is what the backbone's own processor says.
        fit: `crop` (the largest square in the middle), `pad` (the whole image, with `background` beside it) or `squeeze`
            (each side is scaled by its own factor); nothing is what the backbone's own processor says.
        mean: mean of each of the three channels, of pixels between 0 and 1; nothing is the processor's.
        std: standard deviation of each channel, of pixels between 0 and 1; nothing is the processor's.
        background: colour behind transparent pixels and beside padded images: a name, or `#rrggbb`.

    Raises:
        SpecError: a value is out of its bounds.
    """

    size: int = 0
    fit: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    background: str = "white"

    def __post_init__(self) -> None:
        if self.size and (not 8 <= self.size <= 4096 or self.size % 8):
            raise SpecError(f"size {shown(self.size)}: use a multiple of 8 from 8 to 4096")
        if self.fit and self.fit not in FITS:
            raise SpecError(f"fit {shown(self.fit)}: use one of {', '.join(FITS)}")
        for name, values, low in (("mean", self.mean, 0.0), ("std", self.std, 1e-3)):
            numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= 1 for x in values)
            if values and (len(values) != 3 or not numbers):
                raise SpecError(
                    f"{name} {shown(list(values))}: give three numbers from {low:g} to 1, red, green and blue"
                )
        if self.background == "white":
            return
        from PIL import ImageColor  # a node without images does not need it

        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise SpecError(f"background {shown(self.background)}: give a colour's name, or #rrggbb") from error

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to the backbone's processor."""
        return bool(self.size and self.fit and self.mean and self.std)


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
        """The template over the values of a row's columns.

        A missing value is undefined there, in lists and mappings too: `default` and `is defined` deal with it, and all
        else raises. So does whatever a filter of the template raises.
        """
        return _compiled(self.template).render({name: _defined(name, value) for name, value in values.items()})


def _defined(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _defined(f"{name}.{key}", inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_defined(f"{name}[{place}]", inner) for place, inner in enumerate(value)]
    return _ENVIRONMENT.undefined(f"{name} has no value here", name=name) if is_missing(value) else value


def fields_of(columns: Mapping[str, Any], templates: Mapping[str, Any]) -> dict[str, Field]:
    """Role -> what it is read from, by `columns` and `templates` of a client spec; templates come first."""
    found = {
        role: Field(template=names["template"])
        if isinstance(names, Mapping)
        else Field((names,) if isinstance(names, str) else tuple(names))
        for role, names in columns.items()
    }
    return found | {role: Field(template=text) for role, text in templates.items()}


def check_columns(columns: Mapping[Any, Any], templates: Mapping[Any, Any], where: str) -> None:
    """Checks that roles are read from texts, before `fields_of` takes them.

    Raises:
        SpecError: one is not, or is read from both; `where` begins the message.
    """
    if both := sorted(map(str, columns.keys() & templates.keys())):
        raise SpecError(f"{where} reads {both[0]!r} from `columns` and from `templates`: keep one of the two")
    templates = dict(templates)
    for role, names in columns.items():
        if isinstance(names, Mapping) and names.keys() == {"template"}:
            templates[role] = names["template"]
            continue
        listed = names if isinstance(names, list | tuple) else [names]
        if not listed or not all(isinstance(name, str) for name in listed):
            raise SpecError(f"{where} reads {shown(role)} from {shown(names)}: name a column, or list several")
    for role, text in templates.items():
        if not isinstance(text, str) or not text:
            raise SpecError(f"{where} has the template {shown(text)} for {shown(role)}: write a text")


def check_fields(read_from: Mapping[str, Field], roles: Collection[str], where: str) -> None:
    """Checks that a task's roles are read, and nothing else.

    Raises:
        SpecError: a role is missing or unknown, a template is wrong, or an image or label is read from several columns;
            `where` begins the message.
    """
    if missing := sorted(set(roles) - read_from.keys()):
        raise SpecError(f"{where} names no column for {', '.join(missing)}: add it under `columns`")
    for role, read in read_from.items():
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


def image_form(values: Any, where: str) -> ImageForm:
    """Reads `image` of a task; `where` begins the message of a SpecError."""
    given = check_keys(values, ImageForm, f"{where}: image")
    try:
        return ImageForm(**given | {key: tuple(given[key]) for key in ("mean", "std") if key in given})
    except SpecError as error:
        raise SpecError(f"{where}: image has {error}") from error


def _as_number(value: object) -> str:
    """How YAML has a number that is written otherwise, such as 1e-3, which is a text there."""
    try:
        return f", written {float(value)!r}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def check_keys(values: Mapping[str, Any], schema: type, where: str) -> dict[str, Any]:
    """Checks that `values` has no key that the dataclass `schema` lacks, all that it needs, and values of the right types.

    Returns:
        The values that are not null; a revision as a text, since YAML reads one of digits alone as a number.

    Raises:
        SpecError: a key is unknown or missing, or a value is wrong; `where` begins the message.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"{where} is {shown(values)}: write `key: value` lines")
    known = [f.name for f in fields(schema)]
    if unknown := [key for key in values if key not in known]:
        near = did_you_mean(str(unknown[0]), known) or f": use {', '.join(known)}"
        raise SpecError(f"{where} has the unknown key {shown(unknown[0])}{near}")
    required = [f.name for f in fields(schema) if f.default is f.default_factory]  # both are MISSING
    if missing := [name for name in required if values.get(name) is None]:
        raise SpecError(f"{where} lacks {', '.join(missing)}")
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        words, types = _KINDS[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SpecError(f"{where} has {key} {shown(value)}: give {words}{_as_number(value) * (float in types)}")
        if isinstance(value, str) and "\0" in value:
            raise SpecError(f"{where} has {key} {shown(value)}: leave the zero byte out")
    return {key: str(value) if key == "revision" else value for key, value in given.items()}
