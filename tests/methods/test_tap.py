"""TAP's two stages, against numbers worked out by hand.

The model's output for a task is one number x, its training loss x², and a plain step at rate 0.1 takes x to 0.8 x: the two
steps of a round take it to 0.64 x, with the mean training loss 0.82 x². Held-out examples have a target of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tap_flower.config import ReplacementEvidence, ReplacementMode, ReplacementSource, StageTwo
from tap_flower.core import training
from tap_flower.core.components import ComponentMap, Pair, State, load_trainable_state
from tap_flower.core.tasks import TaskKind
from tap_flower.methods import tap, tap_published
from tap_flower.methods.method import Memory
from tests.methods.toy import ToyClient, numbers, plain_descent, state

KIND = TaskKind.of(
    "number",
    lambda output, target: (output - target).square().flatten(),
    lambda student, teacher, target, temperature: temperature * (student - teacher).square().flatten(),
)
MAP = ComponentMap(
    {"one": "one", "other": "other"},
    {Pair("first", ("x",)): frozenset({"one"}), Pair("second", ("x",)): frozenset({"other"})},
)
ALONE = ComponentMap({"one": "one"}, {Pair("first", ("x",)): frozenset({"one"})})


class Numbers(nn.Module):
    """A number for each task: `one` for the task first, `other` for the task second."""

    def __init__(self, values: State) -> None:
        super().__init__()
        for name in values:
            self.register_parameter(name, nn.Parameter(torch.tensor(0.0)))
        load_trainable_state(self, values)
        self.component_map = MAP if "other" in values else ALONE

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        return (self.one if task == "first" else self.other).view(1, 1)


@dataclass
class TapClient(ToyClient):
    """Notes every training and every evaluation, in their order."""

    initial: State = field(default_factory=lambda: state(one=2.0))
    held_out: float = 0.0
    margins: dict[str, float] = field(default_factory=lambda: {"first": 0.01, "second": 0.01})
    distillation_weights: dict[str, float] = field(default_factory=lambda: {"first": 0.5, "second": 0.5})
    kinds: dict[str, TaskKind] = field(default_factory=lambda: {"first": KIND, "second": KIND})
    did: list[tuple[object, ...]] = field(default_factory=list)

    def model(self, values: State | None = None) -> Any:
        return Numbers(self.initial if values is None else values)

    def train(
        self, model: Any, optimisation: training.Optimisation, *, order: Any, noise: Any, times: int = 1, **more: Any
    ) -> Any:
        optimisation = replace(optimisation, steps=times * optimisation.steps)
        self.did.append(("train", optimisation.steps, order, noise))
        batch = training.Batch("first", {}, torch.zeros(1, 1))
        return training.train(model, self.kinds, itertools.repeat(batch), optimisation, **more)

    def losses(self, model: Any, split: str) -> dict[str, float]:
        self.did.append(("losses", split))
        target = {"train": 0.0, "validation": self.held_out}[split]
        return {pair.task: round((model(pair.task, {}).item() - target) ** 2, 6) for pair in model.component_map.reach}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TapClient:
    monkeypatch.setattr(training.torch.optim, "AdamW", plain_descent)
    return TapClient()


def one(found: State) -> float:
    return numbers(found)["one"]


def remembered(value: float, loss: float | None = None) -> Memory:
    return Memory({"personal": state(one=value)}, {} if loss is None else {"personal_losses": {"first": loss}})


ROUND, AGAIN = (3,), (3, "replaced")
SERVER, PERSONAL = (3, "server"), (3, "personal")


@pytest.mark.parametrize(("loss", "replaced"), [(0.84, True), (0.825, False)])
def test_training_losses_as_evidence(client: TapClient, loss: float, replaced: bool) -> None:
    client.settings.replacement.evidence = ReplacementEvidence.training
    done = tap.participate(client.local, 3, state(one=1.0), remembered(0.5, loss))
    # 0.82 + 0.01 is less than 0.84 and not less than 0.825: the copy goes on from 0.64, or the personal model from 0.5
    assert one(done.returned) == 0.64
    assert done.losses["first"] == pytest.approx(0.82)
    assert one(done.memory.models["personal"]) == (0.4096 if replaced else 0.32)
    assert done.memory.record["personal_losses"]["first"] == pytest.approx(0.82 * (0.64**2 if replaced else 0.5**2))
    (decision,) = done.decisions
    assert decision.pair == Pair("first", ("x",))
    assert (decision.teacher_loss, decision.personal_loss) == (pytest.approx(0.82), loss)
    assert (decision.margin, decision.replaced) == (0.01, replaced)
    assert client.did == [("train", 2, ROUND, SERVER), ("train", 2, AGAIN if replaced else ROUND, PERSONAL)]


@pytest.mark.parametrize(("loss", "replaced"), [(0.84, True), (0.825, False)])
def test_before_its_first_round_the_personal_model_changes_by_replacement_alone(
    client: TapClient, loss: float, replaced: bool
) -> None:
    client.settings.train.personal_from = 4
    client.settings.replacement.evidence = ReplacementEvidence.training
    done = tap.participate(client.local, 3, state(one=1.0), remembered(0.5, loss))
    assert one(done.returned) == 0.64
    assert one(done.memory.models["personal"]) == (0.64 if replaced else 0.5)
    assert done.memory.record["personal_losses"]["first"] == (done.losses["first"] if replaced else loss)
    assert client.did == [("train", 2, ROUND, SERVER)]
    client.settings.replacement.enabled = False  # nothing else would change it
    without = tap.participate(client.local, 3, state(one=1.0), remembered(0.5, loss))
    assert one(without.memory.models["personal"]) == 0.32


@pytest.mark.parametrize("evidence", ReplacementEvidence)
def test_at_the_first_participation_the_copy_is_taken_over(client: TapClient, evidence: ReplacementEvidence) -> None:
    client.settings.replacement.evidence, client.held_out = evidence, 9.0
    done = tap.participate(client.local, 3, state(one=1.0), Memory())
    assert one(done.memory.models["personal"]) == 0.4096
    assert [(d.personal_loss, d.replaced) for d in done.decisions] == [(float("inf"), True)]
    assert client.did[-1] == ("train", 2, AGAIN, PERSONAL)
    assert client.did.count(("losses", "validation")) == (evidence is ReplacementEvidence.validation)


@pytest.mark.parametrize(
    ("source", "personal", "losses", "kept"),
    [
        # The held-out target is 0.6. Trained, the copy is 0.64 and off by 0.04; as received it is 1 and off by 0.4.
        (ReplacementSource.trained, 0.5, (0.0016, 0.01), 0.32),  # 0.0016 + 0.01 is not less
        (ReplacementSource.trained, 0.4, (0.0016, 0.04), 0.4096),
        (ReplacementSource.received, 0.4, (0.16, 0.04), 0.256),
        (ReplacementSource.received, 0.1, (0.16, 0.25), 0.64),  # 1, trained
    ],
)
def test_held_out_losses_as_evidence(
    client: TapClient, source: ReplacementSource, personal: float, losses: tuple[float, float], kept: float
) -> None:
    client.settings.replacement.source, client.held_out = source, 0.6
    done = tap.participate(client.local, 3, state(one=1.0), remembered(personal))
    assert one(done.returned) == 0.64
    (decision,) = done.decisions
    assert (decision.teacher_loss, decision.personal_loss) == losses
    assert one(done.memory.models["personal"]) == kept
    measured, trained = ("losses", "validation"), ("train", 2, ROUND, SERVER)
    first = [trained, measured] if source is ReplacementSource.trained else [measured, trained]
    last = ("train", 2, AGAIN if decision.replaced else ROUND, PERSONAL)
    assert client.did == [*first, measured, last]


@pytest.mark.parametrize("source", ReplacementSource)
@pytest.mark.parametrize("evidence", ReplacementEvidence)
def test_without_replacement_nothing_is_compared(
    client: TapClient, source: ReplacementSource, evidence: ReplacementEvidence
) -> None:
    settings = client.settings.replacement
    settings.enabled, settings.source, settings.evidence = False, source, evidence
    first = tap.participate(client.local, 3, state(one=1.0), Memory())
    assert (list(first.decisions), one(first.memory.models["personal"])) == ([], 1.28)  # from the initial value 2
    second = tap.participate(client.local, 3, state(one=1.0), first.memory)
    assert (one(second.returned), one(second.memory.models["personal"])) == (0.64, 0.8192)
    assert client.did == [("train", 2, ROUND, SERVER), ("train", 2, ROUND, PERSONAL)] * 2


def test_only_what_the_replaced_pair_reaches_is_taken_over(client: TapClient) -> None:
    memory = Memory({"personal": state(one=0.9, other=0.1)})
    done = tap.participate(client.local, 3, state(one=1.0, other=2.0), memory)
    # held out: 0.64² against 0.9² for the first task, 2² against 0.1² for the second, which is not trained on
    assert [(d.pair.task, d.replaced) for d in done.decisions] == [("first", True), ("second", False)]
    assert numbers(done.memory.models["personal"]) == {"one": 0.4096, "other": 0.1}


LAST = ("stage 2",)


def test_stage_2_distils_the_fine_tuned_copy_into_the_personal_model(client: TapClient) -> None:
    client.settings.distill.temperature = 2.0
    done = tap.second_stage(client.local, state(one=1.0), remembered(0.5))
    # The teacher: 1 -> 0.8. The student's loss is x² + 0.5 · 2 · (x - 0.8)², its gradient 1 - 0.6 at 0.5.
    assert {name: one(values) for name, values in done.models.items()} == {"server+finetune": 0.8, "tap": 0.46}
    assert done.losses == {"first": 1.0}  # the copy's
    assert client.did == [("train", 1, LAST, ("stage 2", "server")), ("train", 1, LAST, ("stage 2", "personal"))]


@pytest.mark.parametrize(
    ("stage", "steps", "personal", "loss"),
    [(StageTwo.finetuning, 1, 0.4, 0.25), (StageTwo.finetuning_twice, 2, 0.32, (0.25 + 0.16) / 2)],
)
def test_the_ablations_fine_tune_the_personal_model_alone(
    client: TapClient, stage: StageTwo, steps: int, personal: float, loss: float
) -> None:
    client.settings.distill.stage = stage
    done = tap.second_stage(client.local, state(one=1.0), remembered(0.5))
    assert {name: one(values) for name, values in done.models.items()} == {"tap": personal}
    assert done.losses == {"first": pytest.approx(loss)}
    assert client.did == [("train", steps, LAST, ("stage 2", "personal"))]


@pytest.mark.parametrize(
    ("stage", "expected"),
    # 2 - 0.1 (4 + 0.5 · 2 · (2 - 0.8)), and 0.8 · 2
    [(StageTwo.distillation, 1.48), (StageTwo.finetuning, 1.6)],
)
def test_a_client_that_was_never_sampled_starts_from_the_initial_values(
    client: TapClient, stage: StageTwo, expected: float
) -> None:
    client.settings.distill.stage = stage
    assert one(tap.second_stage(client.local, state(one=1.0), Memory()).models["tap"]) == expected


def test_what_is_evaluated(client: TapClient) -> None:
    received, memory = state(one=1.0), remembered(0.5)
    assert tap.METHOD.models(received, memory, client.initial_values) == {
        "server": received,
        "personal": memory.models["personal"],
    }
    assert tap.METHOD.models(received, Memory(), client.initial_values) == {"server": received, "personal": None}
    assert (tap.METHOD.results, tap.METHOD.result) == (("server+finetune", "tap"), "tap")


@pytest.mark.parametrize(
    ("personal", "target", "share", "kept"),
    [
        # The trained copy is 0.64. At 0.24 the mixtures are 0.34, 0.44 and 0.54; 0.64 x of what is chosen is kept.
        (0.24, 0.45, 0.5, 0.2816),
        (0.24, 0.63, 1.0, 0.4096),  # the copy itself
        (0.24, 0.25, 0.0, 0.1536),  # the personal model itself
        (0.24, 0.30, 0.0, 0.1536),  # 0.34 is off by 0.04² where 0.24 is by 0.06²: better by less than the margin
    ],
)
def test_components_are_taken_over_in_part(
    client: TapClient, personal: float, target: float, share: float, kept: float
) -> None:
    client.settings.replacement.mode, client.held_out = ReplacementMode.mix, target
    done = tap.participate(client.local, 3, state(one=1.0), remembered(personal))
    assert (done.decisions[0].share, one(done.memory.models["personal"])) == (share, kept)
    assert client.did.count(("losses", "validation")) == 5


def test_before_its_first_round_a_client_takes_the_copy_over_and_mixes_nothing(client: TapClient) -> None:
    client.settings.replacement.mode, client.held_out = ReplacementMode.mix, 9.0
    done = tap.participate(client.local, 3, state(one=1.0), Memory())
    assert (done.decisions[0].share, one(done.memory.models["personal"])) == (1.0, 0.4096)
    assert client.did.count(("losses", "validation")) == 1


@pytest.mark.parametrize(
    ("stage", "memory", "share", "expected"),
    [
        # In one step of 0.8 each, or two. The mixtures of 0.5 and 1 as received are 0.625, 0.75, 0.875; off 0.75 least.
        (StageTwo.finetuning, remembered(0.5), 0.5, 0.6),
        (StageTwo.finetuning_twice, remembered(0.5), 0.5, 0.48),
        (StageTwo.finetuning_twice, Memory(), 1.0, 0.64),
        # The teacher is 0.8: mixtures 0.575, 0.65, 0.725; then 0.725 - 0.1 (1.45 + 0.5 · 2 · (0.725 - 0.8))
        (StageTwo.distillation, remembered(0.5), 0.75, 0.5875),
    ],
)
def test_the_decision_before_stage_2(
    client: TapClient, stage: StageTwo, memory: Memory, share: float, expected: float
) -> None:
    settings, client.held_out = client.settings, 0.75
    settings.replacement.mode, settings.replacement.before_stage_two = ReplacementMode.mix, True
    settings.distill.stage = stage
    done = tap.second_stage(client.local, state(one=1.0), memory)
    assert ([[d.share for d in each] for each in done.decisions], one(done.models["tap"])) == ([[share], []], expected)


@pytest.mark.parametrize(
    ("stage", "mode", "held_out", "share", "expected"),
    [
        # Fine-tuned the personal model is 0.4, with distillation 0.43. The server's as received is 1.
        (StageTwo.finetuning, ReplacementMode.mix, 0.68, 0.5, 0.7),
        (StageTwo.finetuning, ReplacementMode.mix, 0.41, 0.0, 0.4),
        (StageTwo.finetuning, ReplacementMode.hard, 0.8, 1.0, 1.0),
        (StageTwo.distillation, ReplacementMode.mix, 0.58, 0.25, 0.5725),
    ],
)
def test_the_decision_after_stage_2(
    client: TapClient, stage: StageTwo, mode: ReplacementMode, held_out: float, share: float, expected: float
) -> None:
    settings, client.held_out = client.settings, held_out
    settings.replacement.mode, settings.replacement.after_stage_two, settings.distill.stage = mode, True, stage
    done = tap.second_stage(client.local, state(one=1.0), remembered(0.5))
    assert ([[d.share for d in each] for each in done.decisions], one(done.models["tap"])) == ([[], [share]], expected)


def test_without_replacement_nothing_is_taken_over_before_or_after_stage_2(client: TapClient) -> None:
    settings, client.held_out = client.settings.replacement, 0.75
    settings.enabled, settings.mode, settings.before_stage_two = False, ReplacementMode.mix, True
    settings.after_stage_two, client.settings.distill.stage = True, StageTwo.finetuning
    done = tap.second_stage(client.local, state(one=1.0), remembered(0.5))
    assert (done.decisions, one(done.models["tap"])) == (([], []), 0.4)
    assert client.did == [("train", 1, LAST, ("stage 2", "personal"))]


@pytest.mark.parametrize(("held_out", "expected"), [(0.8, 0.46), (0.5, 0.4)])
def test_only_a_better_teacher_distils(client: TapClient, held_out: float, expected: float) -> None:
    client.settings.distill.only_better, client.held_out = True, held_out
    client.settings.distill.temperature = 2.0
    done = tap.second_stage(client.local, state(one=1.0), remembered(0.5))
    assert one(done.models["tap"]) == expected


def test_as_published_whatever_the_preset_has_chosen(client: TapClient) -> None:
    settings, client.held_out = client.settings, 0.75
    settings.replacement.mode, settings.replacement.before_stage_two = ReplacementMode.mix, True
    settings.replacement.after_stage_two = True
    settings.distill.stage, settings.distill.only_better = StageTwo.finetuning_twice, True
    published = TapClient(held_out=0.75)
    server, memory = state(one=1.0), remembered(0.5)
    first = tap_published.METHOD.participate(client.local, 3, server, memory)
    second = tap_published.METHOD.second_stage(client.local, server, memory)
    assert numbers(first.memory.models["personal"]) == numbers(
        tap.participate(published.local, 3, server, memory).memory.models["personal"]
    )
    assert second.models == tap.second_stage(published.local, server, memory).models
    assert second.decisions == ([], [])
