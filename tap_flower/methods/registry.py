"""The methods by name. It is light: the server looks names up here, and builds no model."""

from __future__ import annotations

from difflib import get_close_matches

from tap_flower.errors import ConfigError
from tap_flower.methods import disentafl, ditto, fedavg, fedper, fedprox, local_only, per_fedavg, pfedme, tap
from tap_flower.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        tap.METHOD,
        local_only.METHOD,
        fedavg.FEDAVG,
        fedavg.METHOD,
        disentafl.METHOD,
        fedprox.METHOD,
        fedper.METHOD,
        ditto.METHOD,
        pfedme.METHOD,
        per_fedavg.METHOD,
    )
}
"""Name -> method."""


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown method {name!r}{hint}: use one of {', '.join(METHODS)}")
    return METHODS[name]
