"""Losses, divergences and metrics against numbers worked out by hand."""

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tap_flower.core.metrics import WORD
from tap_flower.core.tasks import (
    IGNORE,
    IMAGE_GENERATION,
    IMAGE_STD,
    TASK_KINDS,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    TaskKind,
    image_generation,
)
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import normalise
from tap_flower.errors import ClientError
from tap_flower.wire.fields import Word

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason='needs: pip install "tap-flower[demo]"')


def test_the_four_kinds() -> None:
    assert list(TASK_KINDS) == ["image_classification", "text_classification", "text_generation", "image_generation"]


def test_what_each_kind_is_judged_by() -> None:
    metrics = {"loss": 9.0, "accuracy": 0.8, "macro_f1": 9.0, "exact_match": 0.6, "perplexity": 9.0, "mse": 0.3}
    assert {name: kind.judged_by.score(metrics) for name, kind in TASK_KINDS.items()} == {
        "image_classification": 0.8,
        "text_classification": 0.8,
        "text_generation": 0.6,
        "image_generation": 1 - 0.3,
    }
    assert [kind.name for kind in TASK_KINDS.values()] == list(TASK_KINDS)


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean(-1)


def distance(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    return (student - teacher).square().mean(-1)


def test_a_kind_of_ones_own_is_judged_by_its_mean_loss() -> None:
    kind = TaskKind.of("numbers", squared, distance)
    assert (kind.name, kind.losses, kind.divergences) == ("numbers", squared, distance)
    assert (kind.headline, kind.higher_is_better, kind.margin, kind.distillation) == ("loss", False, 0.0, 1.0)
    statistics = kind.statistics(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2))
    assert statistics == {"loss": torch.tensor(2.5 + 12.5), "units": torch.tensor(2.0)}
    assert kind.metrics(statistics) == {"loss": 7.5}
    assert kind.judged_by.score({"loss": 7.5}) == -6.5


def test_a_kind_of_ones_own_says_more_where_it_wants() -> None:
    own = {"metrics": lambda sums: {"loss": 0.0, "hits": 2.0}, "headline": "hits", "higher_is_better": True}
    kind = TaskKind.of("numbers", squared, distance, margin=0.5, distillation=3.0, **own)
    assert (kind.margin, kind.distillation) == (0.5, 3.0)
    assert kind.judged_by.score(kind.metrics({})) == 2.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "own", "margin": -1.0}, "kind 'own' has margin -1.0: give a number from 0 on"),
        ({"name": "own", "distillation": math.nan}, "kind 'own' has distillation nan: give a number from 0 on"),
        ({"name": "own", "margin": math.inf}, "kind 'own' has margin inf"),
        ({"name": "own", "headline": "my f1"}, "kind 'own' has headline 'my f1': use letters, digits"),
        (
            {"margin": 0.3},
            "the kind 'text_generation' is tap-flower's, and this one has another `margin`: give it a name",
        ),
        ({"name": "image_generation"}, "the kind 'image_generation' is tap-flower's"),
    ],
)
def test_kinds_that_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        replace(TEXT_GENERATION, **change)


def test_a_name_of_a_metric_is_one_that_a_message_takes() -> None:
    assert get_args(Word)[1].pattern == rf"\A{WORD.pattern}\Z"


def test_classification() -> None:
    # Odds 3:1 and 1:1, so probabilities .75 and .5 for the right class.
    output = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    target = torch.tensor([0, 1])
    losses = TEXT_CLASSIFICATION.losses(output, target)
    assert losses.tolist() == pytest.approx([-math.log(0.75), math.log(2.0)])
    metrics = TEXT_CLASSIFICATION.metrics(TEXT_CLASSIFICATION.statistics(output, target))
    assert metrics == pytest.approx(
        # The tie goes to class 0: TP, FP, FN are 1, 1, 0 for class 0 and 0, 0, 1 for class 1.
        {"loss": (math.log(4 / 3) + math.log(2)) / 2, "accuracy": 0.5, "macro_f1": (2 / 3 + 0) / 2}
    )


def predictions(classes: int, labels: list[int]) -> torch.Tensor:
    """Logits whose largest is that of the label."""
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).float()


def test_macro_f1_leaves_out_classes_that_do_not_occur() -> None:
    # Class 0: TP 2, FP 1, FN 1: 4/6. Class 1: TP 0, FN 1: 0. Class 2 is only predicted: FP 1, so 0. Classes 3, 4: absent.
    output, target = predictions(5, [0, 0, 0, 2]), torch.tensor([0, 0, 1, 0])
    metrics = TEXT_CLASSIFICATION.metrics(TEXT_CLASSIFICATION.statistics(output, target))
    assert metrics["macro_f1"] == pytest.approx((4 / 6 + 0 + 0) / 3)
    assert metrics["accuracy"] == 0.5


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_classification_agrees_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    given_, right = [p for p, _ in pairs], [r for _, r in pairs]
    statistics = TEXT_CLASSIFICATION.statistics(predictions(5, given_), torch.tensor(right))
    found = TEXT_CLASSIFICATION.metrics(statistics)
    expected = sklearn_metrics.f1_score(right, given_, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(right, given_))


def test_classification_distillation() -> None:
    # KL((.75, .25) || (.5, .5)) = .75 ln 1.5 + .25 ln .5; at T = 2 the odds are √3 : 1, scaled by T² = 4.
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    plain = TEXT_CLASSIFICATION.divergences(student, teacher, torch.tensor([0]), 1.0)
    assert plain.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    p = math.sqrt(3) / (1 + math.sqrt(3))
    softened = TEXT_CLASSIFICATION.divergences(student, teacher, torch.tensor([0]), 2.0)
    assert softened.item() == pytest.approx(4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), rel=1e-5)


def test_text_ignores_padding() -> None:
    output = torch.tensor([[[math.log(3.0), 0.0], [0.0, 5.0]], [[0.0, 0.0], [9.0, -9.0]]])
    target = torch.tensor([[0, 1], [1, IGNORE]])
    assert TEXT_GENERATION.losses(output, target).tolist() == pytest.approx(
        [math.log(4 / 3), math.log(1 + math.exp(-5)), math.log(2)], rel=1e-4
    )
    metrics = TEXT_GENERATION.metrics(TEXT_GENERATION.statistics(output, target))
    mean = (math.log(4 / 3) + math.log(1 + math.exp(-5)) + math.log(2)) / 3
    # The second text's only token is a tie that argmax gives to token 0: wrong.
    assert metrics == pytest.approx({"loss": mean, "exact_match": 0.5, "perplexity": math.exp(mean)}, rel=1e-4)
    divergence = TEXT_GENERATION.divergences(output, output + torch.randn(2, 2, 1), target, 1.0)
    assert divergence.shape == (3,)
    assert divergence.abs().max() < 1e-6  # a shift of the logits is no difference


def test_texts_without_a_target_count_at_all_positions() -> None:
    """A loop of the project's own says nothing of padding. By hand: logits log p, so that KL(teacher || student) is
    p · log(p / q), for (1/4, 3/4) against (1/2, 1/2)."""
    student = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]]).log()
    teacher = torch.tensor([[[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]]]).log()
    divergences = TEXT_GENERATION.divergences(student, teacher, None, 1.0)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergences.tolist() == pytest.approx([expected, 0.0, 0.0], abs=1e-6)


def test_a_text_is_right_when_all_of_its_tokens_are() -> None:
    # Of three texts the first and the third are right in every token that counts, the second in one of two.
    output = predictions(4, [0, 1, 2, 3, 1, 0, 2, 2, 2]).view(3, 3, 4)
    target = torch.tensor([[0, 1, 2], [3, 2, IGNORE], [2, IGNORE, IGNORE]])
    statistics = TEXT_GENERATION.statistics(output, target)
    # Logits 1 against three times 0 where a token is right, 0 against 1 and twice 0 where not.
    right, wrong = math.log(1 + 3 / math.e), math.log(math.e + 3)
    found = {name: value.item() for name, value in statistics.items()}
    assert found == pytest.approx({"loss": 5 * right + wrong, "tokens": 6, "exact": 2, "samples": 3})
    assert TEXT_GENERATION.metrics(statistics)["exact_match"] == pytest.approx(2 / 3)


def test_the_perplexity_of_a_diverged_model_is_a_number() -> None:
    sums = {"loss": 2000.0, "tokens": 2.0, "exact": 0.0, "samples": 1.0}
    found = TEXT_GENERATION.metrics({name: torch.tensor(value) for name, value in sums.items()})
    assert found == {"loss": 1000.0, "exact_match": 0.0, "perplexity": math.exp(700)}


def test_image() -> None:
    output, target = torch.zeros(2, 3, 2, 2), torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), -1.0)])
    assert IMAGE_GENERATION.losses(output, target).tolist() == [4.0, 1.0]
    assert IMAGE_GENERATION.divergences(output, target, target, 3.0).tolist() == [4.0, 1.0]
    metrics = IMAGE_GENERATION.metrics(IMAGE_GENERATION.statistics(output, target))
    # Between 0 and 1 the errors are 2 and 1 deviations of each channel.
    error = 2.5 * (0.2673**2 + 0.2564**2 + 0.2762**2) / 3
    assert metrics == pytest.approx({"loss": 2.5, "mse": 2.5, "psnr": 10 * math.log10(1 / error)}, rel=1e-12)


@pytest.mark.parametrize("std", [IMAGE_STD, (0.5, 0.25, 0.125)])
def test_psnr_is_that_of_the_pixels_before_they_were_normalised(std: tuple[float, ...]) -> None:
    # Every pixel is off by 51 of 255: MSE 0.04 between 0 and 1, PSNR 10 log10(25).
    pixels = torch.randint(0, 200, (3, 3, 4, 4), dtype=torch.uint8)
    form = ImageForm(8, "squeeze", (0.5, 0.4, 0.3), std)
    output, target = normalise(pixels + 51, form), normalise(pixels, form)
    kind = image_generation(std)
    metrics = kind.metrics(kind.statistics(output, target))
    assert metrics["psnr"] == pytest.approx(10 * math.log10(25), rel=1e-5)


def test_psnr_of_exact_images_is_a_number() -> None:
    images = torch.rand(2, 3, 4, 4)
    metrics = IMAGE_GENERATION.metrics(IMAGE_GENERATION.statistics(images, images))
    assert metrics == {"loss": 0.0, "mse": 0.0, "psnr": 100.0}


def text_data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.randn(12, 4, 5, generator=generator)
    target = torch.randint(0, 5, (12, 4), generator=generator)
    target[torch.rand(12, 4, generator=generator) < 0.3] = IGNORE
    target[:, 0] = 1
    return output, target


def class_data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(12, 7, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def image_data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    output, target = torch.randn(2, 12, 3, 2, 2, generator=generator)
    return output, target


DATA = {
    "image_classification": class_data,
    "text_classification": class_data,
    "text_generation": text_data,
    "image_generation": image_data,
}


@pytest.mark.parametrize("name", [*TASK_KINDS, "own"])
def test_sums_are_float64_and_where_the_output_is(name: str) -> None:
    kind = TASK_KINDS.get(name) or TaskKind.of(name, IMAGE_GENERATION.losses, distance)
    output, target = DATA.get(name, image_data)(torch.Generator().manual_seed(1))
    with torch.device("meta"):  # where a new tensor is made that does not say its own device
        statistics = kind.statistics(output, target)
    assert {(value.dtype, value.device.type) for value in statistics.values()} == {(torch.float64, "cpu")}


@pytest.mark.parametrize("kind", TASK_KINDS.values(), ids=lambda kind: kind.name)
@given(cuts=st.sets(st.integers(1, 11)), seed=st.integers(0, 2**31 - 1))
def test_metrics_do_not_depend_on_how_the_data_is_cut_into_batches(kind: TaskKind, cuts: set[int], seed: int) -> None:
    output, target = DATA[kind.name](torch.Generator().manual_seed(seed))
    whole = kind.metrics(kind.statistics(output, target))
    sums: dict[str, torch.Tensor] = {}
    for start, stop in itertools.pairwise([0, *sorted(cuts), 12]):
        for name, value in kind.statistics(output[start:stop], target[start:stop]).items():
            sums[name] = sums[name] + value if name in sums else value
    assert kind.metrics(sums) == pytest.approx(whole, rel=1e-6)
