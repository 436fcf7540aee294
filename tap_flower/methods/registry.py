"""The methods by name, built in or installed. It is light: the server looks names up here, and builds no model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from tap_flower.errors import ConfigError
from tap_flower.methods import (
    apfl,
    disentafl,
    ditto,
    fedala,
    fedavg,
    feddat,
    fedper,
    fedprox,
    fedrep,
    fedsa_lora,
    local_only,
    per_fedavg,
    pfedme,
    tap,
    tap_published,
)
from tap_flower.methods.method import Method
from tap_flower.plain import did_you_mean

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        tap.METHOD,
        tap_published.METHOD,
        local_only.METHOD,
        fedavg.FEDAVG,
        fedavg.METHOD,
        disentafl.METHOD,
        fedprox.METHOD,
        fedper.METHOD,
        ditto.METHOD,
        pfedme.METHOD,
        per_fedavg.METHOD,
        fedrep.METHOD,
        fedala.METHOD,
        fedsa_lora.METHOD,
        apfl.METHOD,
        feddat.METHOD,
    )
}
"""Name -> method, of those that come with tap-flower."""
GROUP = "tap_flower.methods"
"""Entry points of other packages: name of a method -> `module:attribute` of its `Method`."""


@cache
def installed() -> Mapping[str, EntryPoint]:
    """Name -> entry point of the methods that other packages bring to this machine.

    Raises:
        ConfigError: two packages bring one name, or one of tap-flower's own.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in METHODS or (point.name in found and found[point.name].value != point.value):
            whose = "tap-flower" if point.name in METHODS else f"package {_package(found[point.name])}"
            raise ConfigError(f"package {_package(point)} brings method {point.name!r}, as {whose} does: uninstall one")
        found[point.name] = point
    return found


def find_method(name: str) -> Method:
    """The method of a name: one of tap-flower's, or one that a package on this machine brings.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    if name in METHODS:
        return METHODS[name]
    others = installed()
    if name not in others:
        known = [*METHODS, *others]
        raise ConfigError(
            f"unknown method {name!r}{did_you_mean(name, known)}: use one of {', '.join(known)}, or install the "
            f"package that brings it, on the server and on every node"
        )
    return _loaded(others[name])


def _loaded(point: EntryPoint) -> Method:
    where = f"method {point.name!r} of package {_package(point)} ({point.value})"
    try:
        method = point.load()
    except Exception as error:  # whatever the package raises while it is imported
        raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(method, Method) or method.name != point.name:
        what = f"a method named {method.name!r}" if isinstance(method, Method) else f"a {type(method).__name__}"
        raise ConfigError(f"{where} is {what}: it must be a tap_flower.methods.method.Method of that name")
    return method


def _package(point: EntryPoint) -> str:
    return repr(point.dist.name) if point.dist is not None else "of an unknown name"
