"""Plans the runs of a sweep from a YAML file of methods, seeds and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tap_flower.config import Config, check_contradictions, client_specs, load_config, plain, read_yaml
from tap_flower.errors import ConfigError
from tap_flower.methods.registry import find_method
from tap_flower.plain import as_text, shown
from tap_flower.report.configuration import config_file, different, moved, recorded
from tap_flower.report.results import RESULTS

ROUNDS, STEPS = "rounds", "steps"
"""Budgets: every method with the steps that the configuration says, or each with as many as the published TAP makes."""
_COUNTED = "train.steps", "distill.iterations", "rounds", "clients_per_round"
"""Settings that the budget `steps` decides, or counts on."""
_SEED = {"seed": "list seeds under `seeds`"}
_METHOD = {"method": "list methods under `methods`"}
"""Settings that a sweep decides -> what to do instead."""
OF_STUDIES = {"seed": "choose seeds with --seed", "method": "leave it out, or use the study's --method"}
"""Settings that every study decides -> what to do instead."""
OF_CLIENTS = {"clients": "list them in a --config file"}
"""Settings that studies decide which give each run clients of its own -> what to do instead."""

_REMEDIES = {
    "preset": "give the name of a preset",
    "config": "give the path of a YAML file",
    "seeds": "list different whole numbers, such as [41, 42, 43]",
    "set": "write `key: value` lines, with dots in the key, such as `train.steps: 10`",
    "methods": "list names of methods, or write `label: settings` lines, such as `near: {method: fedprox, train.steps: 10}`",
    "budgets": f"list {ROUNDS}, {STEPS} or both, such as [{ROUNDS}, {STEPS}]",
}
"""Key of a sweep file -> what to write there."""
_NotEmpty = msgspec.Meta(min_length=1)
_Seed = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Settings = dict[str, str | int | float | bool | None]


class _SweepFile(msgspec.Struct):
    """What a sweep file says, see `read_sweep`."""

    seeds: Annotated[list[_Seed], _NotEmpty]
    methods: Annotated[list[str], _NotEmpty] | Annotated[dict[str, _Settings | None], _NotEmpty]
    preset: str = "demo"
    config: str = ""
    set: _Settings = {}
    budgets: Annotated[list[Literal["rounds", "steps"]], _NotEmpty] = msgspec.field(default_factory=lambda: ["rounds"])


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        label: label of the method or variant.
        seed: seed of the run.
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings, method and seed among them.
        folder: the run folder.
        start: folder of a finished run whose last values of the server are the first ones of this run, or None.
        rounds: of stage 1, in place of the configuration's; 0 is stage 2 alone.
    """

    label: str
    seed: int
    preset: str
    config: str
    settings: tuple[str, ...]
    folder: Path
    start: Path | None = None
    rounds: int | None = None

    @property
    def resolved(self) -> Config:
        """The run's configuration.

        Raises:
            ConfigError: a key or a value is wrong, or there is no such method.
        """
        try:
            found = load_config(self.preset, self.config, self.settings)
            find_method(found.method)
        except ConfigError as error:
            raise ConfigError(f"{self.label}: {error}") from error
        return found

    @property
    def log(self) -> Path:
        """The run's log, which is beside its folder: that must be empty when the run starts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return (self.folder / RESULTS).exists()


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        budgets: budget -> (label of a method, seed) -> its run, which may stand under both budgets.
        result: label -> name of the model that the method is judged by.
        reference: the label that the others are compared with.
    """

    budgets: Mapping[str, Mapping[tuple[str, int], PlannedRun]]
    result: Mapping[str, str]
    reference: str

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """The different runs, in the order of seeds: after some seeds there is something to compare already."""
        different = dict.fromkeys(run for runs in self.budgets.values() for run in runs.values())
        seeds = list(dict.fromkeys(run.seed for run in different))
        return tuple(sorted(different, key=lambda run: seeds.index(run.seed)))


def read_sweep(file: Path, out: Path, kept: Path | None = None) -> Sweep:
    """Reads a sweep and checks every run of it before the first one starts.

    The file has `seeds`, a list; `methods`, a list of names, or a mapping of labels to settings (`method` among them where
    it is not the label); and where they are needed `preset` (demo), `config` (a YAML file, as `simulate --config`),
    `set`, settings of all runs (`train.steps: 10`), and `budgets`, of `rounds` (every method with the steps that the
    configuration says; without `budgets`, this alone) and `steps` (each with as many optimiser steps as the published TAP,
    which trains two models in both stages).

    Args:
        file: the YAML file.
        out: folder of the sweep; that of a run is OUT/LABEL/seed-N, or OUT/LABEL+steps/seed-N where the budget `steps`
            gives it other steps.
        kept: folder of runs that were kept of this sweep; they count as finished.

    Raises:
        ConfigError: something in the file is wrong, or a folder holds a finished run of another configuration.
    """
    given = _read(file)
    methods = _labelled(file, given.methods)
    common = _settings(file, "set", given.set, _SEED | _METHOD)
    config = str(file.resolve().parent / given.config) if given.config else ""
    seeds, budgets, preset = given.seeds, given.budgets, given.preset
    places = [out] if kept is None else [out, kept]

    def folder(run: str) -> Path:
        return next((place / run for place in places if (place / run / RESULTS).exists()), out / run)

    def planned(label: str, own: Sequence[str]) -> list[PlannedRun]:
        return [
            PlannedRun(label, seed, preset, config, (*common, *own, f"seed={seed}"), folder(f"{label}/seed-{seed}"))
            for seed in seeds
        ]

    published = planned("tap-published", ("method=tap-published",))[0].resolved if STEPS in budgets else None
    found: dict[str, dict[tuple[str, int], PlannedRun]] = {budget: {} for budget in budgets}
    for label, (method, own) in methods.items():
        runs = planned(label, own := (f"method={method}", *own))
        resolved = checked(runs)
        for budget in budgets:
            of_budget = runs
            if budget == STEPS and published is not None:
                _check_own_steps(file, label, own)
                if more := steps_as_tap(resolved, published):
                    if (name := f"{label}+{STEPS}") in methods:
                        raise ConfigError(
                            f"{file}: methods has {name!r}, the folder of {label!r} with equal steps: rename it"
                        )
                    checked(of_budget := planned(name, (*own, *more)))
            found[budget] |= {(label, run.seed): run for run in of_budget}
    result = {label: find_method(method).result for label, (method, _) in methods.items()}
    return Sweep(found, result, "tap" if "tap" in methods else next(iter(methods)))


def _read(file: Path) -> _SweepFile:
    """The content of a sweep file; a key without a value counts as left out."""
    written = {key: value for key, value in read_yaml(file, "sweep file").items() if value is not None}
    if unknown := written.keys() - _REMEDIES.keys():
        raise ConfigError(f"{file}: unknown {', '.join(sorted(map(repr, unknown)))}: use {', '.join(_REMEDIES)}")
    values = {"seeds": [], "methods": [], **written}
    try:
        found = msgspec.convert(values, _SweepFile)
        if len(set(found.seeds)) == len(found.seeds):
            check_distinct(f"{file}: the method", [*found.methods])
            return found
        wrong = "seeds"
    except msgspec.ValidationError as error:  # its path begins with the key: "Expected `int` - at `$.seeds[0]`"
        wrong = str(error).rpartition("`$.")[2].partition("[")[0].rstrip("`")
    raise ConfigError(f"{file}: {wrong} is {shown(values[wrong])}: {_REMEDIES[wrong]}")


def _check_own_steps(file: Path, label: str, own: Sequence[str]) -> None:
    for setting in own:
        if setting.partition("=")[0] in _COUNTED:
            raise ConfigError(
                f"{file}: {label} sets {setting}, on which the budget `{STEPS}` counts: put it under `set`"
            )


def steps_as_tap(own: Config, tap: Config) -> tuple[str, ...]:
    """The settings by which a method makes as many optimiser steps as TAP, stage by stage; none where it does already.

    Args:
        own: configuration of a run of the method.
        tap: configuration of a run of TAP.
    """
    steps = tap.train.steps, tap.distill.iterations
    models, of_tap = (find_method(config.method).trained(config) for config in (own, tap))
    equal = [max(round(n * of / m), 1) if m else n for n, of, m in zip(steps, of_tap, models, strict=True)]
    return () if (*equal,) == steps else (f"train.steps={equal[0]}", f"distill.iterations={equal[1]}")


def _labelled(
    file: Path, methods: Sequence[str] | Mapping[str, _Settings | None]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Label -> (method, settings)."""
    found = {}
    for label, settings in (methods if isinstance(methods, Mapping) else dict.fromkeys(methods)).items():
        if not label or not label.isprintable():
            raise ConfigError(f"{file}: methods has the label {label!r}: give it a name in printable characters")
        if Path(label).name != label or label == "..":
            raise ConfigError(f"{file}: methods has the label {label!r}, which names a folder: leave the path out")
        own = dict(settings or {})
        method = str(own.pop("method", None) or label)
        found[label] = method, _settings(file, label, own, _SEED)
    return found


def _settings(file: Path, where: str, values: _Settings, decided: Mapping[str, str]) -> tuple[str, ...]:
    for key, value in values.items():
        if " " in str(value):
            raise ConfigError(f"{file}: {where} has {key}: {value!r}; a value with spaces goes into the `config` file")
    found = tuple(f"{key}={'null' if value is None else as_text(value)}" for key, value in values.items())
    check_contradictions(found)
    check_undecided(found, decided, f"{file}: {where} has")
    return found


def check_undecided(settings: Sequence[str], decided: Mapping[str, str], where: str = "--set") -> None:
    """Refuses settings that a sweep or a study decides.

    Args:
        settings: `key=value` strings.
        decided: key, or the beginning of keys -> what to do instead.
        where: where the settings stand, for errors.

    Raises:
        ConfigError: there is one.
    """
    for setting in settings:
        key = f"{setting.partition('=')[0].strip()}."
        for own, remedy in decided.items():
            if key.startswith(f"{own}.") or f"{own}.".startswith(key):
                raise ConfigError(f"{where} {setting}, which would be overridden: {remedy}")


def check_distinct(option: str, values: Sequence[object]) -> None:
    """Refuses a value that an option gives twice: it would count as two that are independent.

    Raises:
        ConfigError: with the option and the value.
    """
    if double := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ConfigError(f"{option} {as_text(double[0])} is given twice: give it once")


def checked(runs: Sequence[PlannedRun]) -> Config:
    """The configuration of runs that differ in their seed alone; to read it anew for each would take seconds.

    Raises:
        ConfigError: it is wrong, or names no clients, or one of the runs has finished with another.
    """
    resolved = runs[0].resolved
    if not client_specs(resolved):
        raise ConfigError(f"preset {runs[0].preset!r} has no clients: name a `config` file with client specs")
    rounds = resolved.rounds if runs[0].rounds is None else runs[0].rounds
    new = plain(replace(resolved, rounds=rounds))
    for run in runs:
        if run.done and (keys := different(old := recorded(run.folder), new)):
            raise ConfigError(
                f"{run.folder} holds a run with another configuration ({', '.join(keys)} differ): give another folder with "
                f"--out, or remove this one{_if_moved(run.folder, old, new)}"
            )
    return resolved


def _if_moved(run: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A further remedy where a run differs in where its data, or its backbone, lay."""
    files = [{key: config.get(key) for key in ("clients", "backbone", "data")} for config in (old, new)]
    if (places := moved(*files)) is None:
        return ""
    return f"; its files lay in {places[0]}, now in {places[1]}: if they only moved, change that in {config_file(run)}"
