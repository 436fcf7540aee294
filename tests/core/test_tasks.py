"""Losses, divergences and metrics against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tap_flower.core.tasks import IGNORE, IMAGE_GENERATION, TASK_KINDS, TEXT_CLASSIFICATION, TEXT_GENERATION


def test_the_four_kinds() -> None:
    assert list(TASK_KINDS) == ["image_classification", "text_classification", "text_generation", "image_generation"]


def test_classification() -> None:
    # Odds 3:1 and 1:1, so probabilities .75 and .5 for the right class.
    output = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    target = torch.tensor([0, 1])
    losses = TEXT_CLASSIFICATION.losses(output, target)
    assert losses.tolist() == pytest.approx([-math.log(0.75), math.log(2.0)])
    metrics = TEXT_CLASSIFICATION.metrics(TEXT_CLASSIFICATION.statistics(output, target))
    assert metrics == pytest.approx({"loss": (math.log(4 / 3) + math.log(2)) / 2, "accuracy": 0.5})


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


def test_image() -> None:
    output, target = torch.zeros(2, 3, 2, 2), torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), -1.0)])
    assert IMAGE_GENERATION.losses(output, target).tolist() == [4.0, 1.0]
    assert IMAGE_GENERATION.divergences(output, target, target, 3.0).tolist() == [4.0, 1.0]
    assert IMAGE_GENERATION.metrics(IMAGE_GENERATION.statistics(output, target)) == {"loss": 2.5, "mse": 2.5}


@given(st.integers(1, 11), st.integers(0, 2**31 - 1))
def test_metrics_do_not_depend_on_how_the_data_is_cut_into_batches(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(12, 4, 5, generator=generator)
    target = torch.randint(0, 5, (12, 4), generator=generator)
    target[torch.rand(12, 4, generator=generator) < 0.3] = IGNORE
    target[:, 0] = 1
    whole = TEXT_GENERATION.metrics(TEXT_GENERATION.statistics(output, target))
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, 12, size):
        part = slice(start, start + size)
        for name, value in TEXT_GENERATION.statistics(output[part], target[part]).items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value
    assert TEXT_GENERATION.metrics(sums) == pytest.approx(whole, rel=1e-6)
