"""Golden vectors of aggregation and distillation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tap_flower.core.averaging import Averaging, moved
from tap_flower.core.tasks import IMAGE_CLASSIFICATION, TEXT_GENERATION


def folders(config: pytest.Config, pattern: str) -> list[Path]:
    return sorted(config.getoption("--golden-dir").glob(pattern))


def test_aggregation(pytestconfig: pytest.Config) -> None:
    found = folders(pytestconfig, "aggregate*")
    assert found
    for folder in found:
        expected = json.loads((folder / "expected.json").read_text())
        result = load_file(folder / "expected.safetensors")
        updates = []
        for client in expected["clients"]:
            state = load_file(folder.parent / client["state"])
            updates.append(({n: t for n, t in state.items() if n in result}, client["dataset_size"]))
        for name, holders in expected["holders"].items():
            if name in result:
                assert [i for i, (update, _) in enumerate(updates) if name in update] == holders, name
        averaging = Averaging(result, {n: n for n in result}, dict.fromkeys(result, len(updates)))
        start = {name: next(update[name] for update, _ in updates if name in update) for name in result}
        for update, size in updates:
            difference = {name: value - start[name] for name, value in update.items()}
            averaging.add("client", difference, dict.fromkeys(difference, size))
        merged = moved(start, averaging.means())
        assert merged.keys() == result.keys()
        for name, value in result.items():
            torch.testing.assert_close(merged[name], value, atol=2e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation(pytestconfig: pytest.Config, temperature: float) -> None:
    found = folders(pytestconfig, "kd*")
    assert found
    for folder in found:
        expected = json.loads((folder / "expected.json").read_text())
        inputs, gradients = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
        for name, case in expected.items():
            if not name.startswith(("cls", "text")):
                continue
            student = inputs[f"{name}.student"].requires_grad_()
            kind, scale = IMAGE_CLASSIFICATION, 1
            target = torch.zeros(student.shape[:-1], dtype=torch.long)
            if name.startswith("text"):
                # The vectors sum over positions; ours is the mean over tokens.
                kind, scale = TEXT_GENERATION, student.shape[1]
            loss = scale * kind.divergences(student, inputs[f"{name}.teacher"], target, temperature).mean()
            assert loss.item() == pytest.approx(case[f"loss_T{temperature:.0f}"], rel=1e-5)
            if temperature == 1.0:
                (gradient,) = torch.autograd.grad(loss, student)
                torch.testing.assert_close(gradient, gradients[f"{name}.grad_student"], atol=1e-6, rtol=1e-4)
