"""Tests of the committed demo backbone and of the script that made it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import tap_flower.assets
from tap_flower.data import packaged
from tools import pretrain_demo_backbone as pretrain

linear_model = pytest.importorskip("sklearn.linear_model", reason='the demo data need: pip install "tap-flower[demo]"')
pytest.importorskip("easy_vqa", reason='the demo data need: pip install "tap-flower[demo]"')
pytest.importorskip("emoji", reason='the demo data need: pip install "tap-flower[demo]"')

FOLDER = Path(tap_flower.assets.__file__).parent / "flava-demo"
MEGABYTES = 1024 * 1024


@pytest.fixture(scope="module")
def backbone() -> Any:
    return transformers.FlavaModel.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_folder_is_small_and_holds_float32_alone(backbone: Any) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4 * MEGABYTES
    assert {value.dtype for value in backbone.state_dict().values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in backbone.state_dict().values())
    assert not [name for name in backbone.state_dict() if "codebook" in name]
    assert "masked tokens" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_weight_is_in_the_file() -> None:
    _, info = transformers.FlavaModel.from_pretrained(FOLDER, local_files_only=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_forward_pass(backbone: Any, tokenizer: Any) -> None:
    given = tokenizer(["mushroom", "red apple"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = backbone(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            pixel_values=torch.zeros(2, 3, pretrain.IMAGE_SIZE, pretrain.IMAGE_SIZE),
        )
    tokens = given["input_ids"].shape[1]
    patches = (pretrain.IMAGE_SIZE // backbone.config.image_config.patch_size) ** 2
    assert output.image_embeddings.shape == (2, 1 + patches, 64)
    assert output.text_embeddings.shape == (2, tokens, 64)
    assert output.multimodal_embeddings.shape == (2, 2 + patches + tokens, 64)
    assert backbone.config.multimodal_config.num_hidden_layers >= 2


def test_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == 0
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Pilz")["input_ids"])
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert (tokenizer.mask_token, tokenizer.unk_token) == ("[MASK]", "[UNK]")
    assert 1500 <= len(tokenizer) <= 2000


def test_accents_survive_the_tokenizer(tokenizer: Any) -> None:
    for name in (
        "niño con corazón",
        "öğrenci şapkası",
        "œuf à la coque",
        "weißer käse",
        "coração",
        "kırmızı",
        "perché",
    ):
        ids = tokenizer(name)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == name
    assert tokenizer("ÖĞRENCI")["input_ids"] == tokenizer("öğrenci")["input_ids"]
    assert tokenizer("ano")["input_ids"] != tokenizer("año")["input_ids"]


@pytest.mark.parametrize("split", packaged.SPLITS)
def test_no_demo_text_has_an_unknown_token(tokenizer: Any, split: str) -> None:
    texts = {
        text
        for name, keys in (
            ("names", ["text"]),
            ("dates", ["text", "target"]),
            ("questions", ["question", "answer"]),
        )
        for key in keys
        for text in packaged.load(name, split)[key]
    }
    encoded = tokenizer(sorted(texts))["input_ids"]
    assert not [ids for ids in encoded if tokenizer.unk_token_id in ids]
    assert max(map(len, encoded)) <= 32


def test_image_processor_normalises_as_the_product_does() -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(FOLDER, local_files_only=True)
    image = packaged.load("shapes", "validation")[0]["image"]
    made = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(made, pretrain.normalised(pretrain._pixels(image)[None])[0], atol=1e-5, rtol=1e-5)


def image_features(model: Any, rows: Any) -> Tensor:
    pixels = pretrain.normalised(torch.stack([pretrain._pixels(image) for image in rows["image"]]))
    with torch.no_grad():
        return model.image_model(pixel_values=pixels).last_hidden_state.mean(1)


def text_features(model: Any, tokenizer: Any, rows: Any) -> Tensor:
    given = tokenizer(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.text_model(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).last_hidden_state
    return pretrain.mean_state(states, given["input_ids"])


def probe(name: str, features: Callable[[Any], Tensor]) -> float:
    """Validation accuracy of a linear probe on 300 training rows."""
    train, validation = packaged.load(name, "train").select(range(300)), packaged.load(name, "validation")
    given, asked = features(train), features(validation)
    mean, deviation = given.mean(0), given.std(0) + 1e-6
    fitted = linear_model.LogisticRegression(C=0.3, max_iter=1000).fit((given - mean) / deviation, train["label"])
    return float(np.mean(fitted.predict((asked - mean) / deviation) == np.array(validation["label"])))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lead"), [("shapes", 0.25), ("digits", 0.1), ("names", 0.06)])
def test_pretraining_pays(backbone: Any, tokenizer: Any, name: str, lead: float) -> None:
    def accuracy(model: Any) -> float:
        if name == "names":
            return probe(name, lambda rows: text_features(model, tokenizer, rows))
        return probe(name, lambda rows: image_features(model, rows))

    torch.manual_seed(1)
    random = [accuracy(transformers.FlavaModel(backbone.config).eval()) for _ in range(2)]
    assert accuracy(backbone) > max(random) + lead


# --- the script -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_script_makes_a_loadable_folder_from_public_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    load = packaged.load

    def recorded(name: str, split: str) -> Any:
        asked.append((name, split))
        return load(name, split)

    monkeypatch.setattr(packaged, "load", recorded)
    pretrain.main(["--out", str(tmp_path), "--steps", "2", "--seed", "3"])
    assert {split for _, split in asked} == {"public"}
    assert {name for name, _ in asked} == {"shapes", "questions", "digits", "names", "dates"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("image", "text", "fusion", "contrast", "saved"))
    made = transformers.FlavaModel.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert made.config.text_config.vocab_size == len(tokenizer)
    assert "--steps 2 --seed 3" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_same_text_same_tokens_in_another_process() -> None:
    script = (
        "from tools import pretrain_demo_backbone as pretrain; from tap_flower.data import packaged\n"
        "tokens = pretrain.train_tokenizer(packaged.load('names', 'public')['text']).get_vocab()\n"
        "print(len(tokens), sorted(tokens, key=tokens.get))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    tokens = pretrain.train_tokenizer(packaged.load("names", "public")["text"]).get_vocab()
    assert ran.stdout.decode().strip() == f"{len(tokens)} {sorted(tokens, key=lambda token: tokens[token])}"


def test_same_seed_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pretrain.PublicData(
        images=torch.randint(
            0,
            256,
            (8, 3, pretrain.IMAGE_SIZE, pretrain.IMAGE_SIZE),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        ),
        first_digit=4,
        captioned=torch.arange(8),
        caption=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        captions=["a red circle", "a teal circle", "digit one", "digit two"],
        names=[["red apple", "mushroom", "dog", "cat"], ["perro", "seta", "gato", "manzana"]],
        questions=[("is there a circle?", "yes", 0), ("what color is the shape?", "teal", 2)],
        days=[
            ["01-02", "2 Jan", "January 2"],
            ["03-04", "4 Mar", "March 4"],
            ["05-06", "6 May", "6 mai"],
            ["07-08", "8 Jul", "8 juil."],
        ],
    )
    tokenizer = pretrain.train_tokenizer(data.lines())
    monkeypatch.setattr(pretrain, "BATCH", dict.fromkeys(pretrain.BATCH, 4))
    runs = [pretrain.pretrain(data, tokenizer, steps=2, seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_shift_moves_the_image_and_repeats_the_border() -> None:
    torch.manual_seed(0)
    images = torch.arange(64, dtype=torch.uint8).expand(50, 3, 64, 64)  # each pixel holds its column
    moved = pretrain.shifted(images, limit=4)
    steps = moved[:, 0, 0, 32].int() - 32
    assert set(steps.tolist()) == set(range(-4, 5))
    for image, step in zip(moved, steps, strict=True):
        torch.testing.assert_close(image[1, 5], (torch.arange(64) + step).clamp(0, 63).to(torch.uint8))


def test_captions_are_distinct_and_all_in_use() -> None:
    data = pretrain.read_public()
    assert len(data.captions) == len(set(data.captions)) == 24 + 10
    assert set(data.caption.tolist()) == set(range(34))
    assert ((data.captioned >= data.first_digit) == (data.caption >= 24)).all()


def test_no_special_token_is_masked() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[pretrain.CLS, 10, 11, 12, 13, 14, pretrain.SEP, pretrain.PAD]]).repeat(200, 1)
    given, chosen = pretrain.mask_tokens(ids)
    assert not chosen[:, [0, 6, 7]].any()
    assert (given[chosen] == pretrain.MASK).all()
    assert torch.equal(given[~chosen], ids[~chosen])
    assert 0.15 < chosen[:, 1:6].float().mean() < 0.25  # TOKENS_MASKED is .2
    always = torch.zeros_like(chosen)
    always[:, 3] = True
    assert pretrain.mask_tokens(ids, always)[1][:, 3].all()


def test_steps_below_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--out", str(tmp_path), "--steps", "0"])
    assert "--steps is 0: give at least 1" in capsys.readouterr().err
