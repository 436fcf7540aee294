"""Model classes of transformers, each from a tiny configuration, through one round of both stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from torch.utils.data import Dataset

from tap_flower import (
    IMAGE_CLASSIFICATION,
    TEXT_GENERATION,
    Client,
    TapClientApp,
    TapStrategy,
    Task,
    TaskKind,
    load_config,
)
from tap_flower.config import Encoding
from tap_flower.run.in_process import InProcessGrid
from tap_flower.wire import messages

pytestmark = pytest.mark.slow
SETTINGS = ["rounds=1", "clients_per_round=1", "train.steps=1", "distill.iterations=1", "train.batch_size=4"]
SIZE, VOCABULARY, TOKENS, CLASSES = 32, 40, 8, 3

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_IMAGE = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
_SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "classifier_proj_size": 8,
}
_PAIR = {
    "text_config": {**_TEXT, "projection_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**_IMAGE, "projection_dim": 8},
}

# A class's name without the part that its kind adds -> what its configuration is made with.
IMAGES: dict[str, dict[str, Any]] = {
    # with BatchNorm
    "ResNet": {"embedding_size": 8, **_STAGES, "layer_type": "basic"},
    "RegNet": {"embedding_size": 8, **_FOUR, "groups_width": 8},
    "EfficientNet": {"image_size": SIZE, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
    "MobileNetV1": {"image_size": SIZE, "depth_multiplier": 0.25, "min_depth": 4},
    "MobileNetV2": {"image_size": SIZE, "depth_multiplier": 0.25, "min_depth": 4},
    "Levit": {
        "image_size": 64,
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "drop_path_rate": 0,
    },
    "MobileViT": {
        "image_size": SIZE,
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
        "num_attention_heads": 2,
    },
    "MobileViTV2": {
        "image_size": 64,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [16, 16, 16],
    },
    "SwiftFormer": {
        "image_size": SIZE,
        "depths": [1, 1, 1, 1],
        "embed_dims": [8, 8, 16, 16],
        "drop_path_rate": 0.0,
    },
    # without
    "ViT": _IMAGE,
    "DeiT": _IMAGE,
    "Beit": _IMAGE,
    "Data2VecVision": _IMAGE,
    "ViTMSN": _IMAGE,
    "IJepa": _IMAGE,
    "Dinov2": {**_IMAGE, "mlp_ratio": 2},
    "Dinov2WithRegisters": {**_IMAGE, "mlp_ratio": 2},
    "Swin": _SWIN,
    "Swinv2": _SWIN,
    "ConvNext": _FOUR,
    "ConvNextV2": _FOUR,
    "Bit": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 4},
    "FocalNet": {"image_size": SIZE, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "PoolFormer": _FOUR,
    "Pvt": {"image_size": SIZE, **_FOUR, "num_attention_heads": [1, 1, 2, 2]},
    "PvtV2": {"image_size": SIZE, **_FOUR, "num_attention_heads": [1, 1, 2, 2]},
    "Segformer": {**_FOUR, "num_attention_heads": [1, 1, 2, 2]},
    "Hiera": {
        "image_size": [SIZE, SIZE],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "masked_unit_size": [4, 4],
        "num_query_pool": 1,
    },
    "ImageGPT": {"vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2},
}
TEXTS: dict[str, dict[str, Any]] = {
    "Bert": _TEXT,
    "DistilBert": {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "Roberta": _TEXT,
    "XLMRoberta": _TEXT,
    "Camembert": _TEXT,
    "Albert": {**_TEXT, "embedding_size": 8},
    "Electra": {**_TEXT, "embedding_size": 8},
    "Deberta": _TEXT,
    "DebertaV2": _TEXT,
    "MPNet": _TEXT,
    "ConvBert": {**_TEXT, "embedding_size": 16, "head_ratio": 1},
    "FNet": _TEXT,
    "SqueezeBert": {
        **_TEXT,
        "embedding_size": 16,
        "q_groups": 2,
        "k_groups": 2,
        "v_groups": 2,
        "post_attention_groups": 1,
    },
    "RoFormer": {**_TEXT, "embedding_size": 16},
    "Nystromformer": {**_TEXT, "segment_means_seq_len": 8, "num_landmarks": 8},
    "MobileBert": {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "ModernBert": {**_TEXT, "pad_token_id": 0},
    "MegatronBert": _TEXT,
    "Ernie": _TEXT,
    "XLNet": {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "GPT2": _GPT,
    "Bart": _BART,
    "T5": _T5,
}
LANGUAGE: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": _GPT,
    "GPTJForCausalLM": {**_GPT, "rotary_dim": 4},
    "GPTNeoForCausalLM": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "attention_types": [[["global"], 1]],
        "max_position_embeddings": 64,
    },
    "GPTNeoXForCausalLM": _TEXT,
    "LlamaForCausalLM": _DECODER,
    "Qwen2ForCausalLM": _DECODER,
    "Qwen3ForCausalLM": _DECODER,
    "Qwen2MoeForCausalLM": {
        **_DECODER,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "MistralForCausalLM": _DECODER,
    "MixtralForCausalLM": {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GemmaForCausalLM": _DECODER,
    "Gemma2ForCausalLM": _DECODER,
    "Gemma3ForCausalLM": _DECODER,
    "PhiForCausalLM": {**_DECODER, "num_key_value_heads": 2},
    "Phi3ForCausalLM": _DECODER,
    "OPTForCausalLM": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 64,
    },
    "BloomForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "FalconForCausalLM": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "StableLmForCausalLM": _DECODER,
    "OlmoForCausalLM": _DECODER,
    "CohereForCausalLM": _DECODER,
    "Starcoder2ForCausalLM": _DECODER,
    "CodeGenForCausalLM": {**_GPT, "n_head": 4, "rotary_dim": 4},
}
OTHERS: dict[str, dict[str, Any]] = {
    "CLIPModel": _PAIR,
    "SiglipModel": _PAIR,
    "CLIPForImageClassification": _PAIR,
    "SiglipForImageClassification": _PAIR,
    "T5ForConditionalGeneration": _T5,
    "MT5ForConditionalGeneration": _T5,
    "BartForConditionalGeneration": _BART,
    "WhisperForConditionalGeneration": {
        **_BART,
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "max_target_positions": 16,
    },
    "WhisperForAudioClassification": {**_BART, "num_mel_bins": 8, "max_source_positions": 8, "classifier_proj_size": 8},
    "Wav2Vec2ForSequenceClassification": _SPEECH,
    "HubertForSequenceClassification": _SPEECH,
    "WavLMForSequenceClassification": _SPEECH,
    "ASTForAudioClassification": {
        **_IMAGE,
        "frequency_stride": 4,
        "time_stride": 4,
        "max_length": 16,
        "num_mel_bins": 16,
    },
}
CASES = {
    **{f"{name}ForImageClassification": kwargs for name, kwargs in IMAGES.items()},
    **{f"{name}ForSequenceClassification": kwargs for name, kwargs in TEXTS.items()},
    **LANGUAGE,
    **OTHERS,
}
MATCHING = TaskKind.of(
    "matching",
    lambda output, target: nn.functional.cross_entropy(output, torch.arange(len(output)), reduction="none"),
    lambda student, teacher, target, temperature: (student - teacher).square().mean(-1),
)


class Random(Dataset[dict[str, Tensor]]):
    """Random inputs of the forms that the classes take."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(row)
        return {
            "pixel_values": torch.randn(3, 64, 64, generator=draw),
            "input_ids": torch.randint(3, VOCABULARY, (TOKENS,), generator=draw),
            "wave": torch.randn(400, generator=draw),
            "input_features": torch.randn(8, 16, generator=draw),
            "label": torch.tensor(row % CLASSES),
        }


def forward_of(name: str) -> tuple[TaskKind, Callable[[Any, Any], Tensor], Callable[[Any], Tensor]]:
    """(kind, forward, target) of a class."""
    side = 64 if name.startswith(("Levit", "MobileViTV2")) else SIZE
    label, tokens = (lambda batch: batch["label"]), (lambda batch: batch["input_ids"])
    if name == "ImageGPTForImageClassification":
        return IMAGE_CLASSIFICATION, lambda net, b: net(input_ids=b["input_ids"] % 16).logits, label
    if name == "ASTForAudioClassification":
        return IMAGE_CLASSIFICATION, lambda net, b: net(input_values=b["pixel_values"][:, 0, :16, :16]).logits, label
    if name.endswith("ForImageClassification"):
        return IMAGE_CLASSIFICATION, lambda net, b: net(pixel_values=b["pixel_values"][..., :side, :side]).logits, label
    if name in ("CLIPModel", "SiglipModel"):
        return (
            MATCHING,
            lambda net, b: (
                net(input_ids=b["input_ids"], pixel_values=b["pixel_values"][..., :SIZE, :SIZE]).logits_per_image
            ),
            label,
        )
    if name == "WhisperForConditionalGeneration":
        return (
            TEXT_GENERATION,
            lambda net, b: net(input_features=b["input_features"], decoder_input_ids=b["input_ids"]).logits,
            tokens,
        )
    if name == "WhisperForAudioClassification":
        return IMAGE_CLASSIFICATION, lambda net, b: net(input_features=b["input_features"]).logits, label
    if name.endswith("ForConditionalGeneration"):
        return (
            TEXT_GENERATION,
            lambda net, b: net(input_ids=b["input_ids"], decoder_input_ids=b["input_ids"]).logits,
            tokens,
        )
    if name in LANGUAGE:
        return TEXT_GENERATION, lambda net, b: net(input_ids=b["input_ids"]).logits, tokens
    if name.startswith(("Wav2Vec2", "Hubert", "WavLM")):
        return IMAGE_CLASSIFICATION, lambda net, b: net(input_values=b["wave"]).logits, label
    if name in ("BartForSequenceClassification", "T5ForSequenceClassification"):  # they look for the end of the text
        return IMAGE_CLASSIFICATION, lambda net, b: net(input_ids=ended(b["input_ids"])).logits, label
    return IMAGE_CLASSIFICATION, lambda net, b: net(input_ids=b["input_ids"]).logits, label


def ended(tokens: Tensor) -> Tensor:
    return torch.cat([tokens, torch.full((len(tokens), 1), 2)], 1)


def build(name: str) -> nn.Module:
    import transformers

    of = getattr(transformers, name)
    return of(of.config_class(**CASES[name], num_labels=CLASSES))


def test_the_list_is_long_enough() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_a_class(tmp_path: Path, name: str) -> None:
    kind, forward, target = forward_of(name)
    built: list[nn.Module] = []
    sent: list[dict[str, Tensor]] = []

    def model() -> nn.Module:
        built.append(build(name))
        return built[-1]

    def watch(instruction: Message, reply: Message) -> Message:
        if instruction.metadata.message_type == messages.TRAIN:
            sent.append(messages.tensors_of(instruction.content, Encoding.float32))
        return reply

    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        task = Task("t", kind, ["x"], Random(), Random(), forward, target)
        return Client("ann", model, [task], state_dir=tmp_path / "state")

    strategy = TapStrategy(config=load_config("plug-in", settings=SETTINGS), run_folder=tmp_path / "run")
    result = strategy.start(InProcessGrid(app, [{"partition-id": 0}], {}, tamper=watch))
    assert result.clients["ann"]["t"].keys() == {"server", "personal", "server+finetune", "tap"}
    first = built[0].state_dict()
    (received,) = sent
    assert len(received) > 2
    assert [n for n, value in received.items() if not value.equal(first[n])] == []
