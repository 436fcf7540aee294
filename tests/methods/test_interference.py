from __future__ import annotations

import pytest
import torch

from tap_flower.methods.interference import cosine


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"a": [6.0], "b": [0.0, 8.0]}, 1.0),
        ({"a": [-3.0], "b": [0.0, -4.0]}, -1.0),
        ({"a": [0.0], "b": [5.0, 0.0]}, 0.0),
        ({"a": [1.0], "b": [0.0, 0.0]}, 0.6),  # 3 / 5
        ({"a": [0.0], "b": [0.0, 0.0]}, None),
    ],
)
def test_cosine_takes_all_tensors_as_one_vector(other: dict[str, list[float]], expected: float | None) -> None:
    one = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0]), "c": torch.tensor([9.0])}
    found = cosine(one, {name: torch.tensor(values) for name, values in other.items()}, ["a", "b"])
    assert found == (None if expected is None else pytest.approx(expected))
