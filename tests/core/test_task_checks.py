"""Checks of what a task computes with; the runs of test_start.py and test_own_modules.py meet the others."""

import pytest
import torch

from tap_flower.core.task_checks import check_comparison, computing
from tap_flower.core.tasks import IMAGE_GENERATION, TEXT_CLASSIFICATION, TEXT_GENERATION, TaskKind
from tap_flower.errors import ClientError


@pytest.mark.parametrize(
    ("kind", "output", "target"),
    [
        (TEXT_CLASSIFICATION, torch.zeros(2, 3), torch.zeros(2)),
        (TEXT_CLASSIFICATION, torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)),
        (TEXT_GENERATION, torch.zeros(2, 5, 7), torch.zeros(2, 4, dtype=torch.int64)),
        (IMAGE_GENERATION, torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)),
        (IMAGE_GENERATION, torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
    ],
)
def test_other_shapes_and_types_than_the_kind_compares_are_refused(
    kind: TaskKind, output: torch.Tensor, target: torch.Tensor
) -> None:
    words = f"task 'mine': the kind '{kind.name}' compares .*, and `forward` returned float32 .*: return that"
    with pytest.raises(ClientError, match=words):
        check_comparison(kind, "mine", output, target)


@pytest.mark.parametrize(
    ("kind", "output", "target"),
    [
        (TEXT_CLASSIFICATION, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
        (TEXT_GENERATION, torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)),
        (IMAGE_GENERATION, torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)),
        (TaskKind.of("mine", lambda o, t: o, lambda s, t, _, __: s), torch.zeros(2), torch.zeros(9)),
    ],
)
def test_what_the_kind_compares_is_taken(kind: TaskKind, output: torch.Tensor, target: torch.Tensor) -> None:
    check_comparison(kind, "mine", output, target)


def test_what_a_gpu_says_of_a_label_is_told_with_its_remedy() -> None:
    words = "task 'digits': the GPU refused a batch, most often since a label"
    with pytest.raises(ClientError, match=words), computing("digits"):
        raise RuntimeError("CUDA error: device-side assert triggered")
