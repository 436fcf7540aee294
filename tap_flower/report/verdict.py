"""What a report says in words: which model or method is better on how many tasks, who is missing, what privacy was spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tap_flower.core.headline import Headline
from tap_flower.errors import ConfigError
from tap_flower.methods.registry import find_method
from tap_flower.report.result_tables import Table, repeated_seeds, spread
from tap_flower.report.results import disputed, headlines, models_in
from tap_flower.report.run_record import RunRecord
from tap_flower.report.svg import number

MODELS_IN_WORDS = {
    "server": "the federated model",
    "server+finetune": "the fine-tuned federated model",
    "personal": "the personal models before stage 2",
    "tap": "TAP",
}
METHODS_IN_WORDS = {"tap": "TAP", "local": "training alone", "fedavg": "FedAvg"}
_FEW = 3
"""Names that a sentence lists before it only counts the others."""
_WHAT = ("", "worst")
Group = Sequence[RunRecord]
"""Runs that differ in nothing but their seed."""
Values = Mapping[str, Mapping[str, float]]
"""`""` and `worst` -> task -> headline metric, mean over clients or of the worst client; means over a group's runs."""


@dataclass(frozen=True)
class Score:
    """How one model or method fares against another, by task.

    Attributes:
        better: tasks on which it is better.
        equal: tasks on which both are the same.
        worse: tasks on which it is worse.
    """

    better: Sequence[str]
    equal: Sequence[str]
    worse: Sequence[str]

    @property
    def tasks(self) -> int:
        """Number of tasks that both have."""
        return len(self.better) + len(self.equal) + len(self.worse)

    def in_words(self, names: bool) -> str:
        """Such as `on 5 of 6 tasks (not on answers)`; behind `does not beat`, where it is better on none.

        Args:
            names: whether the tasks on which it is not better are named.
        """
        won, of = len(self.better), self.tasks
        equal = [f"equal on {_names(self.equal)}"] if self.equal else []
        if of == 1:
            return f"on its only task, {(*self.better, *self.equal, *self.worse)[0]}" + " (equal)" * len(equal)
        if won == of:
            return "on both tasks" if of == 2 else f"on all {of} tasks"
        if not names:
            return f"on {won or 'any'} of {of} tasks"
        if won == 0:
            return f"on any of {of} tasks" + "".join(f" ({words})" for words in equal)
        rest = [f"not on {_names(self.worse)}"] if self.worse else []
        return f"on {won} of {of} tasks ({'; '.join(rest + equal)})"


def compare(judged_by: Mapping[str, Headline], ours: Mapping[str, float], theirs: Mapping[str, float]) -> Score:
    """Compares two models or methods.

    Args:
        judged_by: task -> the metric that it is judged by; other tasks do not count.
        ours: task -> headline metric of the one; tasks that the other lacks do not count.
        theirs: task -> headline metric of the other.
    """
    better, equal, worse = list[str](), list[str](), list[str]()
    for task in sorted(ours.keys() & theirs.keys() & judged_by.keys()):
        ahead = judged_by[task].ahead(ours[task], theirs[task])
        (better if ahead > 0 else worse if ahead < 0 else equal).append(task)
    return Score(better, equal, worse)


def verdict(grouped: Sequence[Group]) -> list[str]:
    """The outcome in sentences: of one group of runs its models, of several the methods.

    Args:
        grouped: groups of finished runs, at least one.
    """
    if len(grouped) > 1:
        ours = next((group for group in grouped if group[0].results["method"] == "tap"), grouped[0])
        names = _labels(grouped)
        theirs = {name: _result(group) for name, group in zip(names, grouped, strict=True) if group is not ours}
        return _sentences(names[list(grouped).index(ours)], _result(ours), theirs, grouped)
    (group,) = grouped
    result = _result_model(group)
    others = {_in_words(model): _result(group, model) for model in _models(group) if model != result}
    return _sentences(_in_words(result), _result(group), others, grouped)


def _sentences(
    name: str,
    ours: Values,
    others: Mapping[str, Values],
    grouped: Sequence[Group],
) -> list[str]:
    """How the model or method `name` with the values `ours` fares against the others, on average and for worst clients."""
    judged_by = _headlines(grouped)
    scores = {
        what: {other: compare(judged_by, ours[what], values[what]) for other, values in others.items()}
        for what in _WHAT
    }
    told = [f"{sentence}." for sentence in _told(grouped)]
    if not any(score.tasks for score in scores[""].values()):
        nothing = f"There is nothing to compare {name} with: no other model or method has a task in common with it."
        return list(map(_sentence, [nothing, *told]))
    said = [_beats(name, scores[""], names=True)]
    if max(len(run.results["clients"]) for group in grouped for run in group) > 1:
        said.append(f"By the worst client of each task: {_beats(name, scores['worst'], names=False)}")
    if max(len({run.results["seed"] for run in group}) for group in grouped) == 1:
        told.append("There is one seed: a small difference may be chance.")
    return [_sentence(one) for one in said + told]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _beats(name: str, scores: Mapping[str, Score], names: bool) -> str:
    """Whom `name` beats and whom it does not."""
    compared = {other: score for other, score in scores.items() if score.tasks}
    beaten = [f"{other} {score.in_words(names)}" for other, score in compared.items() if score.better]
    others = [f"{other} {score.in_words(names)}" for other, score in compared.items() if not score.better]
    said = [f"{name} beats {_listed(beaten)}"] if beaten else []
    said += [f"{'it' if said else name} does not beat {_listed(others, 'or')}"] if others else []
    return f"{'; '.join(said)}."


def _labels(grouped: Sequence[Group]) -> list[str]:
    """A name of each group: the method in words, with the first run's folder where several groups have one method."""
    methods = [group[0].results["method"] for group in grouped]
    return [
        METHODS_IN_WORDS.get(method, method) + (f" ({group[0].name})" if methods.count(method) > 1 else "")
        for group, method in zip(grouped, methods, strict=True)
    ]


def _in_words(model: str) -> str:
    return MODELS_IN_WORDS.get(model, model)


def _models(group: Group) -> list[str]:
    return models_in({f"{n} {task}": m for n, run in enumerate(group) for task, m in run.results["tasks"].items()})


def _result_model(group: Group) -> str:
    """The model that is the method's result; of a method that is not installed here, the last one that is shown."""
    try:
        return find_method(group[0].results["method"]).result
    except ConfigError:
        return _models(group)[-1]


def _result(group: Group, model: str = "") -> Values:
    """The values of a model; by default of the method's result."""
    return {what: _values(group, model or _result_model(group), what) for what in _WHAT}


def _values(group: Group, model: str, what: str = "") -> dict[str, float]:
    """Task -> value of a model, mean over the runs that have it: `worst`, `p10`, `std`, or `""` for the headline metric."""
    found: dict[str, list[float]] = {}
    for run in group:
        judged_by = headlines(run.results)
        for task, models in run.results["tasks"].items():
            name = what or judged_by[task].metric
            if name in models.get(model, {}):
                found.setdefault(task, []).append(models[model][name])
    return {task: fmean(values) for task, values in found.items()}


def _headlines(grouped: Sequence[Group]) -> dict[str, Headline]:
    return headlines(*(run.results for group in grouped for run in group))


def _listed(parts: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b, and c`."""
    if len(parts) < 3:
        return f" {last} ".join(parts)
    return f"{', '.join(parts[:-1])}, {last} {parts[-1]}"


def _names(names: Sequence[str]) -> str:
    more = len(names) - _FEW
    return _listed([*names[:_FEW], f"{more} more"] if more > 0 else names)


def attendance(found: Mapping[str, Any]) -> str:
    """How many clients were evaluated, and how many replies were lost, in the results of a run; `remarks` names them."""
    here, missing, lost = len(found["clients"]), len(found["missing"]), sum(found["dropped"].values())
    said = f"All {here} clients were evaluated." if here > 1 else "The one client was evaluated."
    if missing:
        said = f"{missing} of {here + missing} clients {'are' if missing > 1 else 'is'} missing."
    return said + (f" {lost} {'replies' if lost > 1 else 'reply'} could not be used." if lost else "")


def privacy(found: Mapping[str, Any]) -> str:
    """What differential privacy the results of a run have, in a sentence."""
    if not (spent := found.get("privacy")):
        return "No differential privacy: no noise was added to what clients sent."
    released = sum(part["rounds"] > 0 for part in spent["components"].values())
    return (
        f"Differentially private towards other clients: ε {spent['epsilon']:.3g} of {spent['epsilon_requested']:g} was "
        f"spent, at δ {spent['delta']:g}; {released} of {len(spent['components'])} components were released."
    )


def method_table(grouped: Sequence[Group]) -> Table:
    """Task × method: the mean over clients of each method's result, and its worst client."""
    judged_by, rows, stand_out = _headlines(grouped), [], set()
    columns = [(group, _result_model(group)) for group in grouped]
    for place, task in enumerate(sorted(judged_by)):
        means = [_values(group, model).get(task) for group, model in columns]
        cells = []
        for n, (group, model) in enumerate(columns):
            by_run = [_values([run], model).get(task) for run in group]
            worst = _values(group, model, "worst").get(task)
            mean = spread([value for value in by_run if value is not None])
            cells.append(mean if worst is None else f"{mean} ({number(worst)})")
            if means[n] is not None and means[n] == judged_by[task].best(means):
                stand_out.add((place, 2 + n))
        rows.append([task, str(judged_by[task]), *cells])
    header = ["task", "metric", *(f"{name}: {m}" for name, (_, m) in zip(_labels(grouped), columns, strict=True))]
    notes = ["mean over clients (worst client), on test data; ± is the deviation over seeds", *_told(grouped)]
    return Table("Each method's result", header, rows, frozenset(stand_out), "; ".join(notes))


def _told(grouped: Sequence[Group]) -> list[str]:
    """What a reader of the comparison of some groups must know."""
    repeated = [repeated_seeds([run.results for run in group]) for group in grouped]
    left_out = disputed(*(run.results for group in grouped for run in group))
    return [*left_out, *dict.fromkeys(sentence for sentence in repeated if sentence)]
