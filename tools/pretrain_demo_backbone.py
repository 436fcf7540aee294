"""Pretrains the demo's backbone: a small FLAVA, on the public split of the demo data and nothing else.

    python -m tools.pretrain_demo_backbone --out DIR [--steps 6000] [--seed 0]

Each step adds six losses, every one on a batch of its own:

* `image`: half of an image's patches are masked, their normalised pixels are predicted (mean squared error);
* `text`: tokens of emoji names are masked and predicted. A line holds one to three names of one language;
* `lines`: two lines of one language, of other names each, are drawn together and those of other pairs apart, as two
  spans of one document are in contrastive learning of text;
* `dates`: a day as one language writes it and the day in ISO 8601, or in another language, are drawn together in the
  way of `lines`;
* `fusion`: tokens of question and answer, the answer's always, are masked and predicted by the multimodal encoder,
  which sees the image too;
* `contrast`: the mean of an image's hidden states, projected, is compared with every distinct caption ("a teal circle",
  "digit four"). Contrast within a batch, which is usual, fails here: too many images of a batch share a caption.

The tasks' own labels are seen in captions and answers of the public items alone. What is saved is a `FlavaModel` (the
heads that predict pixels and tokens are thrown away), a tokenizer and an image processor, all for `from_pretrained`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from tap_flower.data import packaged

SPLIT = "public"
HIDDEN, HEADS, INTERMEDIATE, LAYERS = 64, 4, 128, 2
IMAGE_SIZE, PATCH = 40, 8
PIXEL_MEAN, PIXEL_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
VOCABULARY, MAX_TOKENS = 1800, 128
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, CLS, SEP, MASK = (SPECIAL.index(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
# What lower-case text in Latin script may contain; with each of these as a token, no name becomes [UNK].
ALPHABET = "".join(map(chr, range(33, 127))) + "".join(map(chr, range(0xA1, 0x180))) + "\u0307’‘“”–—"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

BATCH = {"image": 16, "text": 32, "lines": 32, "dates": 32, "fusion": 24, "contrast": 64}
PEAK_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 100, 0.01
PATCHES_MASKED, TOKENS_MASKED, SHIFT, POSITION_STD = 0.5, 0.2, 3, 0.3
LINES_SCALE = 10.0
"""Factor on the cosines of `lines`, the inverse of a temperature."""


@dataclasses.dataclass
class PublicData:
    """The public split, ready for training.

    Attributes:
        images: uint8 (images, 3, IMAGE_SIZE, IMAGE_SIZE): all shapes, then all digits.
        first_digit: the row of `images` where the digits begin.
        captioned: rows of `images` that have a caption.
        caption: int64, the number of the caption of each of `captioned`.
        captions: the distinct captions.
        names: for each language, the public names.
        questions: question, answer, row of `images`.
        days: for each day, the ways to write it, the ISO form first.
    """

    images: Tensor
    first_digit: int
    captioned: Tensor
    caption: Tensor
    captions: list[str]
    names: list[list[str]]
    questions: list[tuple[str, str, int]]
    days: list[list[str]]

    def lines(self) -> list[str]:
        """Returns all text, for the training of the tokenizer."""
        asked = [f"{question} {answer}" for question, answer in sorted({row[:2] for row in self.questions})]
        written = [text for day in self.days for text in day]
        return [name for language in self.names for name in language] + asked + self.captions + written


def read_public() -> PublicData:
    """Reads the public split of the demo data."""
    shapes, questions, digits, names, dates = (
        packaged.load(name, SPLIT) for name in ("shapes", "questions", "digits", "names", "dates")
    )
    rows: dict[str, int] = {}
    pictures: list[Tensor] = []
    # Ten questions share an image: decode it once.
    for index, item in enumerate(questions["item"]):
        if item not in rows:
            rows[item] = len(pictures)
            pictures.append(_pixels(questions[index]["image"]))
    columns = (questions["item"], questions["question"], questions["answer"])
    asked = [(question, answer, rows[item]) for item, question, answer in zip(*columns, strict=True)]
    first_digit = len(pictures)
    for item, image in zip(digits["item"], digits["image"], strict=True):
        rows[item] = len(pictures)
        pictures.append(_pixels(image))
    days = {target: [target] for target in sorted(dates["target"])}
    for text, target in zip(dates["text"], dates["target"], strict=True):
        days[target].append(text)
    shape_names = shapes.features["label"].names
    captions = [f"a {name}" for name in shape_names] + [f"digit {word}" for word in DIGITS]
    caption = [*shapes["label"], *(len(shape_names) + label for label in digits["label"])]
    return PublicData(
        images=torch.stack(pictures),
        first_digit=first_digit,
        captioned=torch.tensor([rows[item] for item in [*shapes["item"], *digits["item"]]]),
        caption=torch.tensor(caption),
        captions=captions,
        names=[
            [text for text, label in zip(names["text"], names["label"], strict=True) if label == language]
            for language in range(len(names.features["label"].names))
        ],
        questions=asked,
        days=list(days.values()),
    )


def _pixels(image: Any) -> Tensor:
    """Returns a PIL image as uint8 (3, IMAGE_SIZE, IMAGE_SIZE), brought to its size as the image processor does."""
    small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


# --- tokenizer, image processor, model ------------------------------------------------------------


def train_tokenizer(lines: Iterable[str]) -> transformers.PreTrainedTokenizerBase:
    """Trains a lower-casing WordPiece tokenizer that keeps accents (they tell languages apart).

    Args:
        lines: the text to train on.

    Returns:
        A BERT tokenizer of at most `VOCABULARY` tokens, [PAD] = 0, that knows each letter of `ALPHABET`.
    """
    letters = sorted({letter for letter in ALPHABET if letter.lower() == letter and letter.isprintable()} | {"\u0307"})
    inner = [f"##{letter}" for letter in letters]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer breaks ties by number, and numbers letters in the order of a hash table, another one in each process.
    # As "special" tokens they come first, in this order, so that the same text gives the same tokens.
    first = [*SPECIAL, *letters, *inner]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokens = [*first, *sorted(set(tokenizer.get_vocab()) - set(first))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = transformers.BertTokenizer(
        vocab=vocabulary, do_lower_case=True, strip_accents=False, model_max_length=MAX_TOKENS
    )
    return cast(transformers.PreTrainedTokenizerBase, made)


def build_image_processor() -> Any:
    """Returns FLAVA's image processor for images of its size with the pixel statistics that the product uses."""
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return FlavaImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
        input_size_patches=IMAGE_SIZE // PATCH,
    )


def build_model(vocabulary: int) -> transformers.FlavaModel:
    """Returns a small FLAVA with random weights (about 0.6 M parameters), in training mode.

    Args:
        vocabulary: number of tokens of the tokenizer.
    """
    common = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
    }
    config = transformers.FlavaConfig(
        image_config={**common, "image_size": IMAGE_SIZE, "patch_size": PATCH, "mask_token": True},
        text_config={**common, "vocab_size": vocabulary, "max_position_embeddings": MAX_TOKENS, "pad_token_id": PAD},
        multimodal_config=common,
        hidden_size=HIDDEN,
        projection_dim=HIDDEN,
    )
    model = transformers.FlavaModel(config)
    # FLAVA starts with all positions alike (zeros); a small model then takes thousands of steps to tell them apart.
    nn.init.normal_(model.image_model.embeddings.position_embeddings, std=POSITION_STD)
    return model


class Heads(nn.Module):
    """The heads that pretraining needs and throws away: pixels of a patch, tokens (tied to the word embeddings)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.pixels = nn.Linear(HIDDEN, 3 * PATCH * PATCH)
        self.transform = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def tokens(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Returns logits (..., vocabulary) for hidden states (..., HIDDEN) and word embeddings (vocabulary, HIDDEN)."""
        return cast(Tensor, self.transform(states) @ embeddings.T + self.bias)


# --- the six losses ------------------------------------------------------------------------------


def pad(lines: list[list[int]]) -> Tensor:
    """Returns lists of token ids as int64 (lines, longest), padded with [PAD]."""
    longest = max(map(len, lines))
    return torch.tensor([line + [PAD] * (longest - len(line)) for line in lines])


def shifted(images: Tensor, limit: int = SHIFT) -> Tensor:
    """Returns images (batch, 3, height, width), each moved by up to `limit` pixels; the border is repeated."""
    count, _, height, width = images.shape
    down, right = torch.randint(-limit, limit + 1, (2, count, 1))
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    picked = images.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def normalised(images: Tensor) -> Tensor:
    """Returns uint8 images (batch, 3, height, width) as float32, normalised by `PIXEL_MEAN` and `PIXEL_STD`."""
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def mean_state(states: Tensor, ids: Tensor | None = None) -> Tensor:
    """Returns the mean of hidden states (batch, tokens, HIDDEN) over the tokens that are not padding."""
    if ids is None:
        return states.mean(1)
    keep = (ids != PAD).unsqueeze(-1).to(states.dtype)
    return (states * keep).sum(1) / keep.sum(1)


def masked_image_loss(model: Any, heads: Heads, images: Tensor) -> Tensor:
    """Mean squared error of the masked patches' pixels.

    Args:
        model: a FlavaModel.
        heads: gives the pixels.
        images: float32 (batch, 3, IMAGE_SIZE, IMAGE_SIZE), normalised.
    """
    side = IMAGE_SIZE // PATCH
    masked = torch.rand(len(images), side * side) < PATCHES_MASKED
    states = model.image_model(pixel_values=images, bool_masked_pos=masked).last_hidden_state[:, 1:]
    patches = functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    return functional.mse_loss(heads.pixels(states[masked]), patches[masked])


def mask_tokens(ids: Tensor, always: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Masks tokens, but no special ones.

    Args:
        ids: int64 (batch, tokens).
        always: bool (batch, tokens), tokens to mask in any case.

    Returns:
        The ids with [MASK] in places, and bool (batch, tokens): where.
    """
    chosen = (torch.rand(ids.shape) < TOKENS_MASKED) & (ids >= len(SPECIAL))
    if always is not None:
        chosen |= always
    if not chosen.any():
        chosen[0, 1] = True  # a loss of no token would be nan
    return ids.masked_fill(chosen, MASK), chosen


def masked_text_loss(model: Any, heads: Heads, ids: Tensor) -> Tensor:
    """Cross-entropy of masked tokens of texts, ids int64 (batch, tokens)."""
    given, chosen = mask_tokens(ids)
    states = model.text_model(input_ids=given, attention_mask=(ids != PAD).long()).last_hidden_state
    words = model.text_model.embeddings.word_embeddings.weight
    return functional.cross_entropy(heads.tokens(states[chosen], words), ids[chosen])


def masked_fusion_loss(model: Any, heads: Heads, ids: Tensor, answers: Tensor, images: Tensor) -> Tensor:
    """Cross-entropy of masked tokens of question and answer, given the image, by the multimodal encoder.

    Args:
        model: a FlavaModel.
        heads: gives the tokens.
        ids: int64 (batch, tokens): [CLS] question [SEP] answer [SEP].
        answers: bool (batch, tokens): the answer's tokens.
        images: float32 (batch, 3, IMAGE_SIZE, IMAGE_SIZE), normalised.
    """
    given, chosen = mask_tokens(ids, answers)
    output = model(input_ids=given, attention_mask=(ids != PAD).long(), pixel_values=images)
    states = output.multimodal_embeddings[:, -ids.shape[1] :]
    words = model.text_model.embeddings.word_embeddings.weight
    return functional.cross_entropy(heads.tokens(states[chosen], words), ids[chosen])


def contrast_loss(model: Any, images: Tensor, captions: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of an image's own caption among all distinct captions.

    Args:
        model: a FlavaModel.
        images: float32 (batch, 3, IMAGE_SIZE, IMAGE_SIZE), normalised.
        captions: int64 (captions, tokens), the distinct captions.
        target: int64 (batch,), the number of each image's caption.
    """
    seen = mean_state(model.image_model(pixel_values=images).last_hidden_state)
    seen = functional.normalize(model.image_projection(seen), dim=-1)
    logits = seen @ embed_text(model, captions).T * model.logit_scale.clamp(max=4.6052).exp()
    return functional.cross_entropy(logits, target)


def embed_text(model: Any, ids: Tensor) -> Tensor:
    """Returns the projected mean states of texts, ids int64 (batch, tokens), at unit length: (batch, HIDDEN)."""
    states = model.text_model(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
    return functional.normalize(model.text_projection(mean_state(states, ids)), dim=-1)


def lines_loss(model: Any, first: Tensor, second: Tensor) -> Tensor:
    """Cross-entropy of a line's partner among the partners of all lines of the batch.

    Args:
        model: a FlavaModel.
        first: int64 (pairs, tokens), one line of each pair.
        second: int64 (pairs, tokens), the other one; of the same language.
    """
    logits = embed_text(model, first) @ embed_text(model, second).T * LINES_SCALE
    return functional.cross_entropy(logits, torch.arange(len(first)))


# --- training -------------------------------------------------------------------------------------


def pretrain(
    data: PublicData, tokenizer: Any, steps: int, seed: int
) -> tuple[transformers.FlavaModel, dict[str, float]]:
    """Trains a model from random weights.

    Args:
        data: the public split.
        tokenizer: from `train_tokenizer`.
        steps: optimiser steps.
        seed: fixes initial weights and batches.

    Returns:
        The model, in evaluation mode, and the mean of each loss over the last tenth of the steps.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = build_model(len(tokenizer))
    model.train(True)
    heads = Heads(len(tokenizer))

    @functools.cache
    def encode(text: str) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])

    names = [[encode(name) for name in language] for language in data.names]
    days = [[encode(text) for text in day] for day in data.days]
    questions = [(encode(question), encode(answer), row) for question, answer, row in data.questions]
    captions = pad([[CLS, *encode(caption), SEP] for caption in data.captions])
    shape_rows = torch.nonzero(data.captioned < data.first_digit).flatten()
    digit_rows = torch.nonzero(data.captioned >= data.first_digit).flatten()

    def half_and_half(first: Tensor, second: Tensor, count: int) -> Tensor:
        """Returns `count` random entries, half of them from each of two tensors: there are fewer digits than shapes."""
        one = first[torch.randint(len(first), (count // 2,))]
        return torch.cat([one, second[torch.randint(len(second), (count - count // 2,))]])

    def image_loss() -> Tensor:
        shapes, digits = torch.arange(data.first_digit), torch.arange(data.first_digit, len(data.images))
        rows = half_and_half(shapes, digits, BATCH["image"])
        images = normalised(shifted(data.images[rows]))
        return masked_image_loss(model, heads, images)

    def line(chosen: list[list[int]]) -> list[int]:
        """Returns the token ids of one line of names."""
        return [CLS, *(token for name in chosen for token in [*name, SEP])][:MAX_TOKENS]

    def text_loss() -> Tensor:
        chosen = [draw.sample(draw.choice(names), draw.randint(1, 3)) for _ in range(BATCH["text"])]
        return masked_text_loss(model, heads, pad([line(some) for some in chosen]))

    def partner_loss() -> Tensor:
        first, second = [], []
        for _ in range(BATCH["lines"]):
            size = draw.randint(1, 2)
            chosen = draw.sample(draw.choice(names), 2 * size)
            first.append(line(chosen[:size]))
            second.append(line(chosen[size:]))
        return lines_loss(model, pad(first), pad(second))

    def date_loss() -> Tensor:
        first, second = [], []
        for day in draw.sample(days, BATCH["dates"]):
            one, other = draw.sample(range(1, len(day)), 2)
            first.append(line([day[one]]))
            second.append(line([day[draw.choice((0, other))]]))
        return lines_loss(model, pad(first), pad(second))

    def fusion_loss() -> Tensor:
        chosen = draw.choices(questions, k=BATCH["fusion"])
        ids = pad([[CLS, *question, SEP, *answer, SEP] for question, answer, _ in chosen])
        answers = torch.zeros(ids.shape, dtype=torch.bool)
        for line, (question, answer, _) in enumerate(chosen):
            answers[line, len(question) + 2 : len(question) + 2 + len(answer)] = True
        images = normalised(shifted(data.images[[row for _, _, row in chosen]]))
        return masked_fusion_loss(model, heads, ids, answers, images)

    def caption_loss() -> Tensor:
        which = half_and_half(shape_rows, digit_rows, BATCH["contrast"])
        images = normalised(shifted(data.images[data.captioned[which]]))
        return contrast_loss(model, images, captions, data.caption[which])

    losses = {
        "image": image_loss,
        "text": text_loss,
        "lines": partner_loss,
        "dates": date_loss,
        "fusion": fusion_loss,
        "contrast": caption_loss,
    }
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps // 10), steps)
    history: dict[str, list[float]] = {name: [] for name in losses}
    for step in range(1, steps + 1):
        values = {name: loss() for name, loss in losses.items()}
        optimizer.zero_grad()
        torch.stack(list(values.values())).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for name, value in values.items():
            history[name].append(float(value.detach()))
        if step % 100 == 0 or step == steps:
            print(
                f"step {step:5d}  " + "  ".join(f"{n} {np.mean(h[-100:]):.4f}" for n, h in history.items()), flush=True
            )
    last = max(1, steps // 10)
    model.train(False)
    return model, {name: float(np.mean(values[-last:])) for name, values in history.items()}


def model_card(data: PublicData, steps: int, seed: int, seconds: float, losses: dict[str, float], size: int) -> str:
    """Returns the text of the model card (README.md)."""
    versions = {package: metadata.version(package) for package in ("easy-vqa", "scikit-learn", "emoji", "babel")}
    ended = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    made_with = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    return f"""---
license: apache-2.0
library_name: transformers
---
# flava-demo

A FLAVA of {size:,} parameters, the backbone of the demo of `tap-flower`: hidden size {HIDDEN},
{HEADS} heads, {LAYERS} layers in each of three encoders, {IMAGE_SIZE}x{IMAGE_SIZE} pixels in {PATCH}x{PATCH} patches.
It knows coloured shapes, digits of 8x8 pixels, names of emoji and dates in eight languages, and is of no other use.

## Data
The split `{SPLIT}` of `tap_flower.data.packaged`, disjoint by item from the clients' data, validation and test:

* {len(data.images)} images ({data.first_digit} shapes, {len(data.images) - data.first_digit} digits)
* {len(data.captions)} distinct captions of {len(data.captioned)} of them
* {len(data.questions)} questions with answers
* {sum(map(len, data.names))} names in {len(data.names)} languages
* {sum(map(len, data.days)) - len(data.days)} dates, of {len(data.days)} days, in these languages

The tokenizer was trained on the same text.

| package | what | licence |
|---|---|---|
| easy-vqa {versions["easy-vqa"]} | images of shapes, questions, answers | MIT |
| scikit-learn {versions["scikit-learn"]} | digits, from the UCI repository (CC BY 4.0) | BSD-3-Clause |
| emoji {versions["emoji"]} | names, from the Unicode CLDR (Unicode licence) | BSD |
| babel {versions["babel"]} | dates, from the Unicode CLDR (Unicode licence) | BSD |

## Recipe
    python -m tools.pretrain_demo_backbone --out DIR --steps {steps} --seed {seed}

{steps} steps in {seconds:.0f} s on {torch.get_num_threads()} threads ({made_with}).
AdamW, peak learning rate {PEAK_RATE:g} after {WARMUP} steps, cosine decay. Sum of six losses, for which see
`tools/pretrain_demo_backbone.py`: masked patches, masked tokens of names (one to three of a language in a line), contrast
between lines of names (two lines of a language belong together) and between dates (two writings of a day do), masked
tokens of question and answer given the image, contrast of mean-pooled images with all distinct captions. Images are
shifted by up to {SHIFT} pixels.
Mean losses over the last tenth of the steps: {ended}.

Images: RGB, 1/255, mean {PIXEL_MEAN}, standard deviation {PIXEL_STD}.
Features are meant to be mean-pooled over tokens.
"""


def main(arguments: list[str] | None = None) -> None:
    """The command: reads the public data, trains, saves."""
    parser = argparse.ArgumentParser(description="Pretrains the demo's backbone on the public split of the demo data.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for model, tokenizer, processor")
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights and batches (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}: give at least 1")
    start = time.perf_counter()
    data = read_public()
    tokenizer = train_tokenizer(data.lines())
    model, losses = pretrain(data, tokenizer, options.steps, options.seed)
    seconds = time.perf_counter() - start
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    build_image_processor().save_pretrained(options.out)
    card = model_card(data, options.steps, options.seed, seconds, losses, model.num_parameters())
    (options.out / "README.md").write_text(card, encoding="utf-8")
    for file in options.out.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner may read
    print(f"saved {options.out} after {seconds:.0f} s; losses " + ", ".join(f"{n} {v:.4f}" for n, v in losses.items()))


if __name__ == "__main__":
    main()
