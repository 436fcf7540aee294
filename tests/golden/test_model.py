"""Every golden case of the model: encoder outputs, features, logits, losses and gradient norms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tap_flower.core.tasks import IGNORE, TASK_KINDS
from tap_flower.models.load import load_backbone
from tap_flower.models.model import TapModel

from .published import PublishedFusion, published_model, published_name


@dataclass
class Case:
    expected: dict[str, Any]
    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    model: TapModel

    def batch(self, task: str) -> tuple[dict[str, Any], Tensor]:
        _, modalities, domain = next(row for row in self.expected["task_domain_pair"] if row[0] == task)
        inputs: dict[str, Any] = {"domain": domain}
        for modality in modalities:
            keys = ("image",) if modality == "image" else ("input_ids", "attention_mask")
            inputs |= {key: self.inputs[key] for key in keys}
        kind = self.model.tasks[task].kind
        if kind == "image_generation":
            return inputs, self.inputs["image"]
        target = self.inputs[f"labels.{task}"]
        if kind == "text_generation":
            inputs["target_length"] = target.shape[1]
            target = torch.where(target == 0, IGNORE, target)
        return inputs, target

    def tolerance(self, name: str) -> float:
        return max(2e-5, 10 * float(self.expected["fp32_vs_fp64"]["tensors_max_abs"].get(name, 0.0)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder: Path = metafunc.config.getoption("--golden-dir")
        found = sorted(p.parent for p in folder.glob("*/client_state.safetensors"))
        assert found, f"no golden case with client_state.safetensors under {folder}"
        metafunc.parametrize("case", found, indirect=True, ids=lambda p: p.name, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    folder: Path = request.param
    expected = json.loads((folder / "expected.json").read_text())
    load_backbone.cache_clear()  # the published habits change the loaded layers
    model = published_model(
        load_backbone(str(folder.parent / expected["backbone"]), expected["num_layers"]),
        expected,
        load_file(folder / "client_state.safetensors"),
    )
    yield Case(expected, load_file(folder / "expected.safetensors"), load_file(folder / "inputs.safetensors"), model)
    load_backbone.cache_clear()


def test_encoders(case: Case) -> None:
    compared = 0
    for task in case.expected["tasks"]:
        inputs, _ = case.batch(task)
        for modality in case.model.tasks[task].pair.modalities:
            with torch.no_grad():
                tokens, _ = case.model.encode(modality, inputs)
            name = f"encoded.{modality}"
            torch.testing.assert_close(tokens, case.tensors[name], atol=case.tolerance(name), rtol=0)
            compared += 1
    assert compared >= len(case.expected["tasks"])


def test_features_and_logits(case: Case) -> None:
    for task in case.expected["tasks"]:
        inputs, _ = case.batch(task)
        with torch.no_grad():
            features, logits = case.model.features(task, inputs), case.model(task, inputs)
        if case.model.tasks[task].kind == "text_generation":
            logits = logits[:, case.expected["text_positions_saved_for_intended"]]
        for name, value in ((f"intended.features.{task}", features), (f"intended.logits.{task}", logits)):
            torch.testing.assert_close(value, case.tensors[name], atol=case.tolerance(name), rtol=0)


def test_losses_and_gradients(case: Case) -> None:
    fusion = case.model.fusion
    assert isinstance(fusion, PublishedFusion)
    for task, result in case.expected["tasks"].items():
        for parameter in [*case.model.parameters(), *fusion.copies.values()]:
            parameter.grad = None
        inputs, target = case.batch(task)
        loss = TASK_KINDS[case.model.tasks[task].kind].losses(case.model(task, inputs), target).mean()
        loss.backward()
        intended = result["intended"]
        assert loss.item() == pytest.approx(intended["loss"], rel=1e-5)

        ours = {published_name(n): p for n, p in case.model.named_parameters() if p.requires_grad} | fusion.copy_names
        # What we hold is known to the published model, and what trains there but is not held here has no gradient.
        assert ours.keys() <= set(case.expected["trainable"])
        compared = 0
        for name, norm in intended["grad_l2"].items():
            gradient = ours[name].grad if name in ours else None
            if norm is None:
                assert gradient is None, name
            else:
                assert gradient is not None, name
                assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-9), name
                compared += 1
        assert compared > 50
