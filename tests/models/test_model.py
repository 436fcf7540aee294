"""The model against autograd, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FlavaConfig

from tap_flower.client.client_model import client_model
from tap_flower.config import Config, client_specs, load_config
from tap_flower.core.components import Pair, trainable_state
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.data.images import with_image_forms
from tap_flower.data.loading import load_client_data
from tap_flower.data.spec import ClientSpec
from tap_flower.data.text import load_tokenizer
from tap_flower.hub import demo_folder, locate
from tap_flower.models.load import from_config, load_backbone, outline
from tap_flower.models.model import ModelTask, TapModel
from tests.checkpoints import tiny_flava, tiny_vilt
from tests.mirror import KEYS, ROWS, write_mirror

CPU = torch.device("cpu")


def randomise(model: TapModel) -> TapModel:
    """LoRA's B starts at zero, which would hide whether a tensor matters: give every tensor a value."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def assert_reach_is_what_autograd_finds(config: Config, spec: ClientSpec) -> None:
    spec = with_image_forms(spec)
    data = load_client_data(
        spec, load_tokenizer(locate(spec.backbone)), config.model.text_length, config.seed, config.data.root
    )
    backbone = load_backbone(spec.backbone, config.model.layers, config.model.image_size)
    model = randomise(client_model(backbone, spec, config.model.text_length))
    names = set(trainable_state(model))
    assert set(model.component_map.component_of) == names
    union: set[str] = set()
    for task in spec.tasks:
        model.zero_grad(set_to_none=True)
        for examples in data.splits["train"][task.name]:  # one for each data set, and so for each domain
            batch = examples.batch(range(min(4, len(examples))), CPU)
            TASK_KINDS[task.kind].losses(model(task.name, batch.inputs), batch.target).mean().backward()
        reached = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        assert set(model.component_map.tensors_of(task.pair)) == reached
        assert all(model.get_parameter(name).grad.abs().max() > 0 for name in reached)
        union |= reached
    assert union == names  # nothing is held that no pair of the client reaches
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("spec", client_specs(load_config("demo")), ids=lambda spec: spec.name)
def test_a_pair_reaches_exactly_the_tensors_that_autograd_finds(spec: ClientSpec) -> None:
    assert_reach_is_what_autograd_finds(load_config("demo"), spec)


@pytest.mark.parametrize(
    ("preset", "make"), [("flava", tiny_flava), pytest.param("vilt", tiny_vilt, marks=pytest.mark.slow)]
)
def test_so_it_does_for_every_client_of_the_papers_presets(
    preset: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "checkpoint")
    write_mirror(tmp_path / "mirror")
    known = load_config(preset).datasets
    rows = [f"datasets.{key}.rows={ROWS}" for key in KEYS if key in known]
    places = [f"data.root={tmp_path / 'mirror'}", f"backbone={tmp_path / 'checkpoint'}", "model.text_length=24"]
    config = load_config(preset, "", [*rows, *places])
    specs = client_specs(config)
    assert len(specs) == 30
    for spec in specs:
        assert_reach_is_what_autograd_finds(config, spec)


def text_model() -> TapModel:
    task = ModelTask(Pair("translation", ("text",)), "text_generation", ("words",), target_length=12)
    return randomise(TapModel(load_backbone("demo", 1), [task]))


def tokens(*rows: list[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor(rows), "domain": "words", "target_length": 6}


def test_different_inputs_give_different_text() -> None:
    logits = text_model()("translation", tokens([2, 50, 51, 52, 3], [2, 60, 61, 62, 3]))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_generated_positions_do_not_depend_on_how_many_are_asked_for() -> None:
    model, inputs = text_model(), tokens([2, 50, 51, 3])
    short = model("translation", {**inputs, "target_length": 3})
    torch.testing.assert_close(model("translation", inputs)[:, :3], short, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model = text_model()
    alone = model("translation", tokens([2, 50, 51, 3]))
    padded = tokens([2, 50, 51, 3, 0, 0, 0], [2, 60, 61, 62, 63, 64, 3])
    padded["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    torch.testing.assert_close(model("translation", padded)[:1], alone, atol=1e-5, rtol=1e-5)


def test_dropout_is_only_in_training() -> None:
    model = text_model()
    assert torch.equal(model("translation", tokens([2, 50, 3])), model("translation", tokens([2, 50, 3])))
    model.train()
    assert not torch.equal(model("translation", tokens([2, 50, 3])), model("translation", tokens([2, 50, 3])))


def test_equal_names_start_equal_whatever_else_a_client_holds() -> None:
    def tensors(*tasks: ModelTask) -> dict[str, Tensor]:
        return TapModel(load_backbone("demo", 1), tasks).first_values(7)

    read = ModelTask(Pair("read", ("text",)), "text_classification", ("names",), classes=3)
    see = ModelTask(Pair("see", ("image",)), "image_classification", ("shapes",), classes=5)
    both, one = tensors(read, see), tensors(see)
    assert one.keys() < both.keys()
    assert all(torch.equal(both[name], value) for name, value in one.items())
    a = [value for name, value in both.items() if name.endswith(".A") and value.shape == (4, 64)]
    assert len({tuple(value.flatten().tolist()) for value in a}) == len(a)  # no two LoRA A are equal


def test_every_expert_of_a_layer_uses_one_frozen_network() -> None:
    backbone = load_backbone("demo", 1)
    held = sum(p.numel() for p in backbone.parameters())
    task = ModelTask(Pair("read", ("text",)), "text_classification", ("names",), classes=3)
    model = TapModel(backbone, [task])
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == held


def test_full_size_flava_fits() -> None:
    """Two tasks, images and text, at the size of facebook/flava-full; nothing is allocated."""
    tasks = [
        ModelTask(Pair("cifar100", ("image",)), "image_classification", ("objects",), classes=100),
        ModelTask(Pair("news", ("text",)), "text_classification", ("news",), classes=4),
    ]
    with torch.device("meta"):
        model = TapModel(from_config(FlavaConfig(), layers=1), tasks)
    assert all(p.is_meta for p in model.parameters())
    assert model.backbone.size == 768
    sent = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sent * 4 <= 18e6
    assert sum(p.numel() for p in model.parameters()) <= 225e6


def test_too_few_fusion_layers_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="model.layers = 9 needs 18 multimodal layers, the backbone has"):
        load_backbone("demo", 9)


def test_unknown_backbones_are_errors_with_a_remedy(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="there is no folder .*nowhere: give the folder of a checkpoint, or a hub id"):
        load_backbone(str(tmp_path / "nowhere"), 1)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' is not supported: use one of"):
        load_backbone(str(tmp_path), 1)
    for load in (load_backbone, outline):
        with pytest.raises(ValueError, match="fetched with `tap-flower fetch owner/none --revision abc`"):
            load("owner/none", 1, revision="abc")


def test_an_outline_has_the_backbones_shapes_without_its_weights(tmp_path: Any) -> None:
    whole, shape = load_backbone("demo", 1), outline("demo", 1)
    assert {name: t.shape for name, t in shape.state_dict().items()} == {
        name: t.shape for name, t in whole.state_dict().items()
    }
    assert all(t.is_meta for t in shape.state_dict().values())
    (tmp_path / "config.json").write_bytes((demo_folder() / "config.json").read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded: it has no model.safetensors"):
        outline(str(tmp_path), 1)
