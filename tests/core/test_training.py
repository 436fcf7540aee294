from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tap_flower.core.objectives import Distillation
from tap_flower.core.tasks import (
    IMAGE_CLASSIFICATION,
    IMAGE_GENERATION,
    TASK_KINDS,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    TaskKind,
)
from tap_flower.core.training import Batch, Optimisation, evaluate, torch_algorithms, train
from tap_flower.errors import ClientError, DivergedError

KINDS = {"a": IMAGE_GENERATION, "b": IMAGE_GENERATION}


class Constant(nn.Module):
    """Gives back one learned number for each task, whatever the input is."""

    def __init__(self, **values: float) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name: nn.Parameter(torch.tensor(value)) for name, value in values.items()})

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        return self.values[task].expand(inputs["size"], 3, 1, 1)


def batch(task: str, target: float, size: int = 1) -> Batch:
    return Batch(task, {"size": size}, torch.full((size, 3, 1, 1), target))


def test_a_step_follows_the_mean_loss_of_its_batches() -> None:
    # AdamW's first step moves by the learning rate against the gradient's sign. Errors +3 and -1 leave +1 on average.
    model = Constant(a=0.0)
    batches = iter([batch("a", 3.0), batch("a", -1.0)])
    losses = train(model, KINDS, batches, Optimisation(1, 0.5, weight_decay=0.0, accumulation=2))
    assert losses == {"a": pytest.approx((9.0 + 1.0) / 2)}
    assert model.values["a"].item() == pytest.approx(0.5, rel=1e-4)


def test_losses_are_means_over_units_not_over_batches() -> None:
    model = Constant(a=0.0)
    batches = iter([batch("a", 1.0, size=1), batch("a", 2.0, size=3)])
    losses = train(model, KINDS, batches, Optimisation(1, 1e-9, accumulation=2))
    assert losses["a"] == pytest.approx((1.0 + 3 * 4.0) / 4)


def test_a_step_decays_each_weight() -> None:
    # Without a gradient AdamW's step is its decay alone: 2 · (1 - 0.5 · 0.1), and with its default 2 · (1 - 0.5 · 0.01).
    for optimisation, expected in ((Optimisation(1, 0.5, weight_decay=0.1), 1.9), (Optimisation(1, 0.5), 1.99)):
        model = Constant(a=2.0)
        train(model, KINDS, iter([batch("a", 2.0)]), optimisation)
        assert model.values["a"].item() == pytest.approx(expected)


def test_a_tensor_has_the_factor_of_its_name_on_the_learning_rate() -> None:
    model = Constant(a=0.0, b=0.0)
    factors = Optimisation(1, 0.1, weight_decay=0.0, accumulation=2, factors={"values.b": 3.0, "values.c": 9.0})
    train(model, KINDS, iter([batch("a", 1.0), batch("b", 1.0)]), factors)
    assert (model.values["a"].item(), model.values["b"].item()) == pytest.approx((0.1, 0.3), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    # The gradients are 2 · (0 - 3) / 2 and 2 · (0 - 4) / 2, together 5 long; the default is 1.
    [({"clip_norm": 10.0}, (-3.0, -4.0)), ({"clip_norm": 2.5}, (-1.5, -2.0)), ({}, (-0.6, -0.8))],
)
def test_the_gradient_of_all_tensors_together_is_clipped(
    options: dict[str, float], expected: tuple[float, float]
) -> None:
    model, seen = Constant(a=0.0, b=0.0), list[tuple[float, ...]]()

    def note(number: int, optimizer: torch.optim.Optimizer) -> None:
        seen.append(tuple(p.grad.item() for p in model.parameters() if p.grad is not None))

    batches = iter([batch("a", 3.0), batch("b", 4.0)])
    train(model, KINDS, batches, Optimisation(1, 0.1, accumulation=2, **options), update=note)
    assert seen == [pytest.approx(expected, rel=1e-5)]


def test_a_step_leaves_alone_what_its_batches_did_not_reach() -> None:
    # One step of 0.5 each, without the momentum and the decay of the other's step.
    model = Constant(a=0.0, b=0.0)
    train(model, KINDS, iter([batch("a", 9.0), batch("b", 9.0)]), Optimisation(2, 0.5, weight_decay=0.1))
    assert (model.values["a"].item(), model.values["b"].item()) == pytest.approx((0.5, 0.5), rel=1e-4)


def test_an_update_takes_the_place_of_the_optimisers_step() -> None:
    model, numbers = Constant(a=0.0), list[int]()

    def every_other(number: int, optimizer: torch.optim.Optimizer) -> None:
        numbers.append(number)
        if number % 2:
            optimizer.step()

    batches = itertools.repeat(batch("a", 100.0))
    losses = train(model, KINDS, batches, Optimisation(4, 0.5, weight_decay=0.0), update=every_other)
    assert numbers == [0, 1, 2, 3]
    assert model.values["a"].item() == pytest.approx(1.0, rel=1e-4)  # two steps of 0.5
    # The gradient of a step is that of its own batch: what went before is forgotten.
    assert losses["a"] == pytest.approx((2 * 100**2 + 2 * 99.5**2) / 4, rel=1e-5)


def test_gradients_do_not_add_up_over_steps() -> None:
    model, seen = Constant(a=0.0), list[float]()

    def note(number: int, optimizer: torch.optim.Optimizer) -> None:
        seen.extend(p.grad.item() for p in model.parameters() if p.grad is not None)

    train(model, KINDS, itertools.repeat(batch("a", 1.0)), Optimisation(3, 0.1, clip_norm=1e6), update=note)
    assert seen == [-2.0, -2.0, -2.0]


def test_a_further_loss_is_added_to_the_tasks_own_and_not_reported() -> None:
    model, shown = Constant(a=0.0), list[tuple[str, float]]()

    def further(shown_batch: Batch, output: Tensor) -> Tensor:
        shown.append((shown_batch.task, output.flatten()[0].item()))
        return 8.0 * model.values["a"]

    # The gradients are -2 and 8: the step goes down, where the task alone would go up.
    losses = train(model, KINDS, iter([batch("a", 1.0)]), Optimisation(1, 0.5, weight_decay=0.0), further)
    assert shown == [("a", 0.0)]
    assert losses == {"a": 1.0}
    assert model.values["a"].item() == pytest.approx(-0.5, rel=1e-4)


def test_every_task_trains_and_others_do_not_move() -> None:
    model = Constant(a=0.0, b=0.0, spare=0.25)
    batches = itertools.cycle([batch("a", 1.0), batch("b", -1.0)])
    train(model, KINDS, batches, Optimisation(200, 0.02, weight_decay=0.01))
    assert model.values["a"].item() == pytest.approx(1.0, abs=0.05)
    assert model.values["b"].item() == pytest.approx(-1.0, abs=0.05)
    assert model.values["spare"].item() == 0.25


def test_modules_that_model_and_teacher_share_are_in_training_mode_in_every_step() -> None:
    """A batch of a step as well as what the backward pass computes again."""
    modes: list[tuple[str, bool]] = []

    class Shared(Constant):
        def __init__(self, role: str, part: nn.Module) -> None:
            super().__init__(a=0.0)
            self.role, self.part = role, part

        def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
            modes.append((self.role, self.part.training))
            output = super().forward(task, inputs) * 1
            if self.role == "student":
                output.register_hook(lambda _: modes.append(("backward", self.part.training)))
            return output

    part = nn.Dropout().eval()
    student, teacher = Shared("student", part), Shared("teacher", part)
    objective = Distillation(teacher, KINDS, {"a": 1.0})
    train(student, KINDS, itertools.cycle([batch("a", 1.0)]), Optimisation(2, 0.1, accumulation=2), objective)
    assert modes == [("student", True), ("teacher", False), ("backward", True)] * 4


def test_frozen_parameters_stay() -> None:
    model = Constant(a=0.0)
    model.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)
    train(model, KINDS, itertools.cycle([batch("a", 1.0)]), Optimisation(2, 0.1))
    assert model.frozen.item() == 3.0


def test_a_model_that_unfreezes_as_it_trains_is_refused_by_name() -> None:
    class Later(Constant):
        def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
            self.frozen.requires_grad_(True)
            return super().forward(task, inputs)

    model = Later(a=0.0)
    model.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)
    problem = "training makes trainable 'frozen': `requires_grad` must stay"
    with pytest.raises(ClientError, match=problem):
        train(model, KINDS, itertools.cycle([batch("a", 1.0)]), Optimisation(1, 0.1))
    assert not model.frozen.requires_grad  # other models share it


@pytest.mark.parametrize(("target", "loss"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_task(target: float, loss: str) -> None:
    batches = itertools.cycle([batch("b", 1.0), batch("a", target)])
    problem = f"^the training loss of task 'a' is {loss} within 2 steps at learning rate 0.1: lower the learning rate"
    with pytest.raises(DivergedError, match=problem):
        train(Constant(a=0.0, b=0.0), KINDS, batches, Optimisation(2, 0.1))


def test_evaluation_sums_over_all_batches() -> None:
    batches = [batch("a", 1.0, size=1), batch("a", 3.0, size=3), batch("b", 2.0)]
    found = evaluate(Constant(a=0.0, b=0.0), KINDS, batches)
    assert found["a"]["mse"] == pytest.approx((1 + 3 * 9) / 4)
    assert found["b"]["mse"] == pytest.approx(4.0)


def test_a_sum_that_a_batch_lacks_is_that_of_the_others() -> None:
    def counts(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": target.sum(), f"size_{len(target)}": torch.tensor(len(target))}

    kind = TaskKind.of("own", IMAGE_GENERATION.losses, KINDS["a"].divergences, statistics=counts, metrics=lambda s: s)
    batches = [batch("a", 0.0, size=size) for size in (1, 2, 2, 3)]
    found = evaluate(Constant(a=0.0), {"a": kind}, batches)
    assert found == {"a": {"loss": 0.0, "size_1": 1.0, "size_2": 4.0, "size_3": 3.0}}
    assert {type(value) for value in found["a"].values()} == {float}


def test_an_evaluation_shows_every_batch_with_its_output() -> None:
    batches, seen = [batch("a", 1.0), batch("b", 3.0, size=2)], []
    evaluate(Constant(a=0.5, b=0.25), KINDS, batches, lambda *pair: seen.append(pair))
    assert [shown for shown, _ in seen] == batches
    assert [output.flatten()[0].item() for _, output in seen] == [0.5, 0.25]


def test_an_evaluation_is_in_evaluation_mode_and_without_gradients() -> None:
    class Twice(Constant):
        def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
            return 2 * super().forward(task, inputs)

    seen: list[tuple[bool, bool]] = []
    model = Twice(a=0.0).train()
    evaluate(model, KINDS, [batch("a", 1.0)], lambda _, output: seen.append((model.training, output.requires_grad)))
    assert seen == [(False, False)]


class Logits(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        return self.values.expand(len(inputs["x"]), -1)


def test_distillation_pulls_the_student_to_the_teacher() -> None:
    # Half of the labels say class 0, half class 1: the task alone ends at 50 : 50. The teacher says 75 : 25.
    teacher, student = Logits([math.log(3.0), 0.0]), Logits([0.0, 0.0])
    kinds = {"t": TEXT_CLASSIFICATION}

    def batches() -> Iterator[Batch]:
        while True:
            yield Batch("t", {"x": [0, 0]}, torch.tensor([0, 1]))

    objective = Distillation(teacher, kinds, {"t": 100.0})
    train(student, kinds, batches(), Optimisation(300, 0.05, weight_decay=0.0), objective)
    assert student.values.softmax(0)[0].item() == pytest.approx(0.75, abs=0.02)
    assert teacher.values.grad is None
    assert teacher.values.tolist() == pytest.approx([math.log(3.0), 0.0])


def test_a_task_without_weight_is_not_distilled() -> None:
    objective = Distillation(Logits([1.0, 0.0]), {"t": TEXT_CLASSIFICATION}, {"other": 1.0})
    assert objective(Batch("t", {"x": [0]}, torch.tensor([0])), torch.zeros(1, 2)).item() == 0.0


# --- What a GPU would wait for --------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations for whose result a processor waits for its GPU: numbers, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        masks = "index" in name and isinstance(args[1], list | tuple) and any(i.dtype == torch.bool for i in args[1])
        if masks or name in ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount"):
            self.seen["mask" if masks else name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(kind: str, steps: int, asks: bool = False) -> Counter[str]:
    """What a training of `steps` steps of two batches waits for, with distillation; `asks`: of a loss that asks itself."""
    shape, target = {
        "image_generation": ((3, 2, 2), torch.rand(2, 3, 2, 2)),
        "text_generation": ((2, 3), torch.tensor([[0, 1], [2, -100]])),
    }.get(kind, ((3,), torch.tensor([0, 2])))

    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.rand(*shape))

        def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
            return self.values.expand(2, *shape)

    kinds = {"t": TASK_KINDS[kind]}
    distil = Distillation(Shaped(), kinds, {"t": 1.0})

    def objective(batch: Batch, output: Tensor) -> Tensor:
        term = distil(batch, output)
        return term * (1 if term.item() >= 0 else 0) if asks else term

    with Waits() as waits:
        train(
            Shaped(),
            kinds,
            itertools.repeat(Batch("t", {}, target)),
            Optimisation(steps, 0.1, accumulation=2),
            objective,
        )
    return waits.seen


@pytest.mark.parametrize("kind", [IMAGE_CLASSIFICATION.name, TEXT_CLASSIFICATION.name, IMAGE_GENERATION.name])
def test_a_step_waits_for_nothing_and_a_participation_for_its_losses(kind: str) -> None:
    assert waits_of(kind, 1) == waits_of(kind, 5) == {"aten._local_scalar_dense": 1}
    assert waits_of(kind, 5, asks=True) == {"aten._local_scalar_dense": 1 + 10}  # so it would be seen


def test_a_batch_of_generated_texts_waits_for_where_its_padding_is() -> None:
    """Once for the loss and once for distillation, and not again in the backward pass."""
    assert waits_of(TEXT_GENERATION.name, 3) == {"aten._local_scalar_dense": 1, "aten.nonzero": 3 * 2 * 2}


# --- Algorithms -----------------------------------------------------------------------------------


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts torch's settings back, whatever a test has done to them."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("mine", [False, True])
def test_algorithms_are_deterministic_inside_and_as_they_were_afterwards(mine: bool) -> None:
    torch.use_deterministic_algorithms(mine, warn_only=mine)
    torch.backends.cudnn.benchmark = True

    def settings() -> tuple[bool, bool, bool]:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, torch.backends.cudnn.benchmark

    with torch_algorithms(deterministic=False):
        assert settings() == (mine, mine, True)
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with torch_algorithms(deterministic=True):
        assert settings() == (True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == (mine, mine, True)
    with pytest.raises(RuntimeError, match="^no$"), torch_algorithms(deterministic=True):
        raise RuntimeError("no")
    assert settings() == (mine, mine, True)


@pytest.mark.usefixtures("algorithms")
def test_an_operation_without_a_deterministic_algorithm_is_an_error_that_names_it_and_the_option() -> None:
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    with torch_algorithms(deterministic=False):
        put()
    problem = r"^compute.deterministic = true, and torch's put_ \(test_training.py:\d+\) has no .* set .*istic=false$"
    with pytest.raises(ClientError, match=problem), torch_algorithms(deterministic=True):
        put()
    torch.use_deterministic_algorithms(True)  # somebody else's choice has torch's own words
    with pytest.raises(RuntimeError, match="^put_ does not have"), torch_algorithms(deterministic=False):
        put()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("algorithms")
def test_a_recurrent_layer_that_is_trained_in_evaluation_mode_is_refused_with_a_remedy(deterministic: bool) -> None:
    """As cuDNN does: the words are torch's."""
    remedy = pytest.raises(ClientError, match="recurrent layer .* leave it in training mode with dropout=0")
    with remedy, torch_algorithms(deterministic):
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU: torch sees none")
def test_one_seed_gives_one_result_on_a_gpu() -> None:
    def trained() -> list[Tensor]:
        torch.manual_seed(1)
        table = nn.Embedding(7, 64)
        net = nn.Sequential(table, nn.LSTM(64, 32, batch_first=True)).cuda()

        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
                return self.net(inputs["ids"])[0].mean(1)

        ids = torch.randint(7, (64, 50), generator=torch.Generator().manual_seed(2)).cuda()
        batches = itertools.repeat(Batch("t", {"ids": ids}, ids[:, 0]))
        model = Reads()
        with torch_algorithms(deterministic=True):
            train(model, {"t": TEXT_CLASSIFICATION}, batches, Optimisation(5, 0.1))
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for one, other in zip(trained(), trained(), strict=True):
        assert torch.equal(one, other)
