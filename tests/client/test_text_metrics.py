"""METEOR and BERTScore against values worked out by hand, and against what their libraries say."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot
from transformers import BertConfig, BertModel, BertTokenizer

from tap_flower.client import text_metrics
from tap_flower.client.text_metrics import MissingError, TextMetrics, load_bertscore, load_meteor, missing
from tap_flower.core.tasks import IGNORE
from tap_flower.core.training import Batch

if TYPE_CHECKING:  # the fast tests run without these libraries
    from nltk.corpus.util import LazyCorpusLoader

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a the red blue car auto cats cat dog sat on mat ."
WORDS = VOCABULARY.split()
END = WORDS.index("[SEP]")


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Iterator[None]:
    text_metrics._available.cache_clear()
    yield
    text_metrics._available.cache_clear()


@pytest.fixture
def tiny_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LazyCorpusLoader:
    """A WordNet in its own file format, whose only synset is car = auto, where NLTK looks for it."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in WordNetCorpusReader._FILES:
        (folder / name).write_text("")
    header = "  1 Only what a test needs\n"
    (folder / "lexnames").write_text("00\tnoun.artifact\t1\n")
    (folder / "data.noun").write_text(f"{header}{len(header):08d} 00 n 02 car 0 auto 0 000 | a motor vehicle\n")
    (folder / "index.noun").write_text("".join(f"{w} n 1 0 1 0 {len(header):08d}\n" for w in ("auto", "car")))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    loader = LazyCorpusLoader("wordnet", WordNetCorpusReader, None)
    monkeypatch.setattr("nltk.corpus.wordnet", loader)
    return loader


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT of three layers and its WordPiece tokenizer, which states no limit of length."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **shape)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def decode(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def batch(pairs: list[tuple[str, str]]) -> tuple[Batch, torch.Tensor]:
    """A batch of (prediction, reference), and the output of a model that writes what the predictions say, then dots."""
    targets = [torch.tensor([*ids(reference), END]) for _, reference in pairs]
    target = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE)
    written = torch.full(target.shape, WORDS.index("."))
    for row, (prediction, _) in zip(written, pairs, strict=True):
        tokens = torch.tensor([*ids(prediction), END])[: len(row)]
        row[: len(tokens)] = tokens
    return Batch("answers", {}, target), one_hot(written, len(WORDS)).float()


def gathered(*batches: list[tuple[str, str]], meteor: bool = False, bertscore: str = "") -> dict[str, float]:
    texts = TextMetrics(["answers"], decode, END, meteor=meteor, bertscore=bertscore)
    for pairs in batches:
        texts.observe(*batch(pairs))
    return texts.metrics()["answers"]


@pytest.mark.slow
def test_meteor(tiny_wordnet: LazyCorpusLoader) -> None:
    # "the car" for "the auto": 2 matches (the second by WordNet) in 1 chunk; P = R = 1; penalty .5 · (1/2)³ = 1/16.
    assert load_meteor()(["the car"], ["the auto"]) == pytest.approx(15 / 16)
    # "cat" for "the cats": 1 match by its stem; P = 1, R = 1/2, F = PR / (.9 P + .1 R) = 10/19; penalty .5.
    assert load_meteor()(["cat"], ["the cats"]) == pytest.approx(10 / 19 / 2)
    # Full stops are words of their own, capitals do not count; an empty text scores 0.
    assert load_meteor()(["The car."], ["the car ."]) == pytest.approx(1 - 0.5 / 27)
    assert load_meteor()(["", "the car"], ["the car", "the auto"]) == pytest.approx((0 + 15 / 16) / 2)


@pytest.mark.slow
def test_meteor_is_nltks_own(tiny_wordnet: LazyCorpusLoader) -> None:
    from nltk.translate.meteor_score import meteor_score

    predictions = ["the cat sat on the mat .", "a red auto", "blue"]
    references = ["on the mat sat the cats", "the red car .", "a dog"]
    expected = [
        meteor_score([reference.split()], prediction.split(), wordnet=tiny_wordnet)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    assert min(expected[:2]) > 0.2
    assert expected[2] == 0.0
    assert load_meteor()(predictions, references) == pytest.approx(sum(expected) / 3)


@pytest.mark.slow
def test_bertscore_is_the_librarys_own(tiny_bert: str) -> None:
    from bert_score import BERTScorer

    predictions, references = ["the cat sat", "a red auto ."], ["the cats sat on the mat", "the red car"]
    scorer = BERTScorer(model_type=tiny_bert, num_layers=3)
    scorer._tokenizer.model_max_length = 12
    _, _, f1 = scorer.score(predictions, references)
    score = load_bertscore(tiny_bert)
    assert score(predictions, references) == pytest.approx(f1.mean().item(), abs=1e-6)
    assert score(predictions, predictions) == pytest.approx(1.0, abs=1e-5)
    # An empty text counts as 0, as in the library; a text longer than the model's positions is cut.
    assert score([*predictions, "", "cat"], [*references, "cat", " "]) == pytest.approx(f1.sum().item() / 4, abs=1e-6)
    assert score([""], ["cat"]) == 0.0
    assert 0 < score(["the cat sat on the mat . " * 4], ["the red car"]) < 1


@pytest.mark.slow
def test_bertscores_layer_is_the_one_recommended_for_the_name(tiny_bert: str, tmp_path: Path) -> None:
    for name in ("distilbert-base-uncased", "mine"):  # 5 layers are recommended: more than this model has
        (tmp_path / name).symlink_to(tiny_bert)
    assert load_bertscore(str(tmp_path / "mine"))(["cat"], ["cat"]) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(MissingError, match="num_layers should be between 0 and 3"):
        load_bertscore(str(tmp_path / "distilbert-base-uncased"))


@pytest.mark.slow
def test_texts_are_cut_at_the_separator_and_at_their_own_targets_end(tiny_wordnet: LazyCorpusLoader) -> None:
    seen: list[list[int]] = []
    texts = TextMetrics(
        ["answers"], lambda tokens: seen.append(tokens) or decode(tokens), END, meteor=True, bertscore=""
    )
    texts.observe(*batch([("the red car sat", "the cat"), ("red", "the red car on a mat")]))
    assert [decode(tokens) for tokens in seen] == ["the red car", "the cat", "red", "the red car on a mat"]
    texts.observe(Batch("languages", {}, torch.tensor([0])), torch.zeros(1, 2))  # another kind of task
    assert texts.metrics().keys() == {"answers"}


PAIRS = [
    ("the cat sat", "the cats sat on the mat"),
    ("a red auto .", "the red car"),
    ("", "blue"),
    ("a dog sat on a mat", "dog"),
    ("blue cat", "the cat ."),
    ("car", "car"),
]


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(cuts=st.sets(st.integers(1, len(PAIRS) - 1)))
def test_no_score_depends_on_how_the_data_is_cut_into_batches(
    cuts: set[int], tiny_wordnet: LazyCorpusLoader, tiny_bert: str
) -> None:
    edges = [0, *sorted(cuts), len(PAIRS)]
    parts = [PAIRS[start:stop] for start, stop in itertools.pairwise(edges)]
    whole = gathered(PAIRS, meteor=True, bertscore=tiny_bert)
    assert whole.keys() == {"meteor", "bertscore_f1"}
    assert gathered(*parts, meteor=True, bertscore=tiny_bert) == pytest.approx(whole, abs=1e-6)


@pytest.mark.slow
def test_what_is_missing_is_said_once_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_bert: str
) -> None:
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    with caplog.at_level(logging.WARNING, "tap_flower"):
        for _ in range(2):
            assert gathered([("car", "car")], meteor=True, bertscore=tiny_bert).keys() == {"bertscore_f1"}
    (line,) = [record.getMessage() for record in caplog.records if record.name == "tap_flower"]
    assert line.startswith("METEOR is left out: NLTK finds no WordNet")
    assert line.endswith("To get it: python -m nltk.downloader wordnet")


@pytest.mark.slow
def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match="BERTScore is left out: .*'none/such'.*hf download none/such"):
        load_bertscore("none/such")
    with pytest.raises(MissingError, match="hf download NAME, or give the folder"):
        load_bertscore(str(tmp_path / "empty"))


@pytest.mark.slow
def test_what_will_be_left_out_is_known_before(tiny_wordnet: LazyCorpusLoader) -> None:
    assert missing(meteor=True, bertscore="") == []
    (problem,) = missing(meteor=True, bertscore="none/such")
    assert problem.startswith("BERTScore is left out: model 'none/such' cannot be loaded")


@pytest.mark.parametrize(("module", "load"), [("nltk", load_meteor), ("bert_score", lambda: load_bertscore("x"))])
def test_a_library_that_is_not_there(module: str, load: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {module, *(name for name in sys.modules if name.split(".")[0] == module)}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=r"pip install 'tap-flower\[text-metrics\]'"):
        load()  # type: ignore[operator]


def test_nothing_is_loaded_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "load_meteor", lambda: pytest.fail("loaded"))
    texts = TextMetrics([], decode, END, meteor=True, bertscore="none/such")  # no task generates text
    assert texts.metrics() == {}
    texts = TextMetrics(["answers"], decode, END, meteor=False, bertscore="")
    texts.observe(*batch([("car", "car")]))
    assert texts.metrics() == {}


@pytest.mark.slow
def test_the_real_wordnet() -> None:
    """METEOR's example in NLTK's documentation; only where WordNet has been downloaded."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        pytest.skip("needs: python -m nltk.downloader wordnet")
    prediction = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert load_meteor()([prediction], [reference]) == pytest.approx(0.6944, abs=1e-4)
