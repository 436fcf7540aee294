"""Checkpoints as people have them: renamed, cut, of another size, with list-valued sizes, as a pickle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tap_flower.data.images import processor_form
from tap_flower.data.text import load_tokenizer
from tap_flower.errors import BackboneError
from tap_flower.hub import demo_folder, fetch_model
from tap_flower.models.load import load_backbone, outline
from tests.checkpoints import tiny_vilt

SQUARE = {"height": 224, "width": 224}
Weights = dict[str, Tensor]
LAYER = "image_model.encoder.layer.0.attention.attention.query.weight"


def changed(
    folder: Path,
    weights: Callable[[Weights], Weights] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> str:
    """The demo's checkpoint with other weights, or another configuration."""
    to = folder / "backbone"
    shutil.copytree(demo_folder(), to)
    if weights is not None:
        save_file(weights(load_file(to / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        values = json.loads((to / "config.json").read_text())
        config(values)
        (to / "config.json").write_text(json.dumps(values))
    return str(to)


@pytest.mark.parametrize("prefix", ["module.", "model.", "flava.", "base_model.model.", "module.flava."])
def test_a_known_prefix_is_taken_off(prefix: str, tmp_path: Path) -> None:
    name = changed(tmp_path, lambda weights: {prefix + key: value for key, value in weights.items()})
    assert load_backbone(name, 1).fingerprint == load_backbone("demo", 1).fingerprint


def without(*beginnings: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if not key.startswith(beginnings)}


def misshapen(weights: Weights) -> Weights:
    return weights | {LAYER: torch.zeros(3, 4)}


@pytest.mark.parametrize("load", [load_backbone, outline])
@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (lambda w: {"net." + k: v for k, v in w.items()}, r"lacks \d+ of the \d+ .* and has \d+ .* such as 'net\."),
        (without("text_model.encoder.layer.0"), "such as 'text_model.encoder.layer.0"),
        (without(LAYER), rf"lacks 1 of the \d+ weights that are used, such as '{LAYER}'"),
        (misshapen, rf"1 weights of other shapes .* such as '{LAYER}' \[3, 4\] in place of"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named_in_one_line(
    weights: Any, problem: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=problem) as refused:
        load(changed(tmp_path, weights), 1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("load", [load_backbone, outline])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype, load: Callable[..., Any], tmp_path: Path) -> None:
    name = changed(tmp_path, lambda weights: weights | {LAYER: (weights[LAYER] * 50).to(dtype)})
    with pytest.raises(
        BackboneError, match=rf"is quantised \('{LAYER}' is stored as [IF]8.*: give the checkpoint that"
    ):
        load(name, 1)


def test_a_configuration_of_a_quantised_model_is_refused(tmp_path: Path) -> None:
    name = changed(
        tmp_path, config=lambda values: values.update(quantization_config={"quant_method": "gptq", "bits": 4})
    )
    with pytest.raises(BackboneError, match="is quantised .its config.json has a quantization_config.: give the"):
        outline(name, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_types_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    name = changed(tmp_path, lambda weights: {key: value.to(dtype) for key, value in weights.items()})
    assert load_backbone(name, 1).dtype is torch.float32


@pytest.mark.parametrize("value", [torch.tensor(float("nan")), torch.tensor(1e300, dtype=torch.float64)])
def test_weights_that_are_not_finite_are_named(value: Tensor, tmp_path: Path) -> None:
    def broken(weights: Weights) -> Weights:
        return weights | {LAYER: torch.full_like(weights[LAYER], value.item(), dtype=value.dtype)}

    with pytest.raises(BackboneError, match=rf"has 1 weights that are NaN or infinite in float32, such as '{LAYER}'"):
        load_backbone(changed(tmp_path, broken), 1)


def test_weights_that_nothing_uses_may_be_missing(tmp_path: Path) -> None:
    name = changed(tmp_path, without("image_model.pooler", "text_projection", "logit_scale"))
    assert load_backbone(name, 1).fingerprint == load_backbone("demo", 1).fingerprint


def test_what_a_backbone_copies_counts_as_used(tmp_path: Path) -> None:
    tiny_vilt(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["embeddings.cls_token"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"such as 'embeddings\.cls_token'"):
        load_backbone(str(tmp_path), 4)


def test_a_square_size_may_be_a_list(tmp_path: Path) -> None:
    name = changed(tmp_path, config=lambda values: values["image_config"].update(image_size=[40, 40]))
    assert load_backbone(name, 1).fingerprint == load_backbone("demo", 1).fingerprint
    (tmp_path / "wide").mkdir()
    wide = changed(tmp_path / "wide", config=lambda values: values["image_config"].update(image_size=[40, 20]))
    with pytest.raises(BackboneError, match=re.escape("image_size = [40, 20] in config.json: use one that is square")):
        outline(wide, 1)


@pytest.mark.parametrize(
    "values", [{"hidden_size": "x"}, {"num_attention_heads": 7}, {"vocab_size": -1}, {"hidden_act": "x"}]
)
def test_a_configuration_that_fits_nothing_is_told_in_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="backbone") as refused:
        outline(changed(tmp_path, config=lambda config: config["text_config"].update(values)), 1)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    name = changed(tmp_path)
    for file in Path(name).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BackboneError, match="has no tokenizer: put the files"):
        load_tokenizer(name)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    name = changed(tmp_path, config=lambda values: values["text_config"].update(vocab_size=100))
    with pytest.raises(BackboneError, match=r"tokens up to 1,799, and embeddings for 100: use its own"):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": {"height": 48, "width": 48}}, (48, "squeeze")),
        ({"size": {"shortest_edge": 384}}, (384, "pad")),
        ({"size": 256, "do_center_crop": True, "crop_size": 224}, (224, "crop")),
        ({"size": SQUARE, "do_center_crop": True, "crop_size": SQUARE}, (224, "squeeze")),
    ],
)  # fmt: skip
def test_the_form_of_images_is_the_processors(
    values: dict[str, Any], expected: tuple[int, str], tmp_path: Path
) -> None:
    stated = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], **values}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    form = processor_form(str(tmp_path))
    assert ((form.size, form.fit), form.mean, form.std) == (expected, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_a_backbone_without_a_processor_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="has no image processor .*: set `image: {size"):
        processor_form(str(tmp_path))


def test_a_pickled_checkpoint_is_converted_once(tmp_path: Path) -> None:
    name = changed(tmp_path)
    weights = load_file(Path(name) / "model.safetensors")
    (Path(name) / "model.safetensors").unlink()
    torch.save(weights, Path(name) / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="`tap-flower fetch"):
        load_backbone(name, 1)
    there = fetch_model(name, to=tmp_path / "there")
    assert load_backbone(str(there), 1).fingerprint == load_backbone("demo", 1).fingerprint
    assert not (Path(name) / "model.safetensors").exists()
    before = (there / "model.safetensors").stat().st_mtime_ns
    assert fetch_model(str(there)) == there
    assert (there / "model.safetensors").stat().st_mtime_ns == before


def test_a_pickle_of_other_things_is_not_converted(tmp_path: Path) -> None:
    torch.save({"w": Path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="is damaged, or holds other things than tensors"):
        fetch_model(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(BackboneError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        fetch_model(str(tmp_path))


def test_the_image_head_is_of_the_tasks_size_with_the_same_tensors() -> None:
    from tap_flower.models.heads import ImageHead

    torch.manual_seed(0)
    usual, large = ImageHead(32), ImageHead(32, 96)
    large.load_state_dict(usual.state_dict())
    features = torch.randn(2, 32)
    assert usual(features).shape == (2, 3, 64, 64)
    assert large(features).shape == (2, 3, 96, 96)
