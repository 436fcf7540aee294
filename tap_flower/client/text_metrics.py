"""METEOR and BERTScore of generated texts: they need words, libraries and files that the core does without.

The libraries are imported when a metric is first asked for. Where one, or a file of it, is missing, a line of the log
says once a process which metric is left out and how to get it, and everything else goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import PurePath
from statistics import fmean

from torch import Tensor

from tap_flower import hub
from tap_flower.core.tasks import IGNORE
from tap_flower.core.training import Batch
from tap_flower.plain import install

log = logging.getLogger("tap_flower")

Score = Callable[[Sequence[str], Sequence[str]], float]
"""(predictions, references), equally many and at least one -> mean over the examples, between 0 and 1."""


class MissingError(RuntimeError):
    """A metric cannot be computed on this machine; the message says why, and how to get it."""

    def __init__(self, metric: str, reason: str, remedy: str) -> None:
        super().__init__(f"{metric} is left out: {reason}. To get it: {remedy}")


INSTALL = install("text-metrics")
LONGEST = 512
"""Tokens that BERTScore reads of a text where neither the model nor its tokenizer states a limit."""


class TextMetrics:
    """Gathers the texts of one evaluation, then scores them.

    Prediction and reference (see `generated`) are decoded by the same tokenizer: both are in lower case where it has no
    capitals.

    Args:
        tasks: names of the text generation tasks; batches of others are left alone.
        decode: token ids -> text, without special tokens.
        end: id of the separator that closes a text.
        meteor: whether to compute `meteor`.
        bertscore: name or folder of the model that `bertscore_f1` is computed with; empty for none.
    """

    def __init__(
        self, tasks: Collection[str], decode: Callable[[list[int]], str], end: int, *, meteor: bool, bertscore: str
    ) -> None:
        wanted = {
            "meteor": _available(load_meteor) if meteor and tasks else None,
            "bertscore_f1": _available(load_bertscore, bertscore) if bertscore and tasks else None,
        }
        self._scores = {name: score for name, score in wanted.items() if score is not None}
        self._decode, self._end = decode, end
        self._texts: dict[str, tuple[list[str], list[str]]] = {task: ([], []) for task in tasks}

    def observe(self, batch: Batch, output: Tensor) -> None:
        """Takes in a batch with targets [B, S] and its output [B, S, V]."""
        if not self._scores or batch.task not in self._texts:
            return
        predictions, references = self._texts[batch.task]
        for prediction, reference in generated(batch, output, self._decode, self._end):
            predictions.append(prediction)
            references.append(reference)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Task name -> metric -> value over all texts that were taken in."""
        return {
            task: {name: score(predictions, references) for name, score in self._scores.items()}
            for task, (predictions, references) in self._texts.items()
            if references
        }


def generated(batch: Batch, output: Tensor, decode: Callable[[list[int]], str], end: int) -> Iterator[tuple[str, str]]:
    """(prediction, reference) of each example.

    A model writes one token for each position of the target. The prediction is what stands at the target's own positions
    up to the first separator, so that nothing depends on the batch that an example is in.

    Args:
        batch: with targets [B, S].
        output: of a model, [B, S, V].
        decode: token ids -> text, without special tokens.
        end: id of the separator that closes a text.
    """
    for predicted, target in zip(output.argmax(-1).tolist(), batch.target.tolist(), strict=True):
        kept = [position for position, token in enumerate(target) if token != IGNORE]
        prediction, wanted = (written([ids[position] for position in kept], end) for ids in (predicted, target))
        yield decode(prediction), decode(wanted)


def written(ids: Sequence[int], end: int) -> list[int]:
    """The tokens up to the first separator: what a model has written, or was to write."""
    return list(takewhile(lambda token: token != end, ids))


def load_meteor() -> Score:
    """METEOR (Lavie and Agarwal, 2007) with NLTK's parameters.

    The words of a text are its runs of letters and digits, and its runs of punctuation. Words match when they are equal in
    lower case, have one Porter stem, or share a WordNet synset; without WordNet it would be another metric.

    Raises:
        MissingError: NLTK is not installed, or finds no WordNet.
    """
    try:
        from nltk.corpus import wordnet
        from nltk.tokenize import wordpunct_tokenize
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise MissingError("METEOR", "nltk is not installed", INSTALL) from error
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:
        command = "python -m nltk.downloader wordnet"
        raise MissingError("METEOR", "NLTK finds no WordNet on this machine", command) from error

    def score(predictions: Sequence[str], references: Sequence[str]) -> float:
        return fmean(
            single_meteor_score(wordpunct_tokenize(reference), wordpunct_tokenize(prediction), wordnet=wordnet)
            for prediction, reference in zip(predictions, references, strict=True)
        )

    return score


def load_bertscore(model: str) -> Score:
    """F1 of BERTScore (Zhang et al., arXiv 1904.09675).

    Neither weighted by idf nor rescaled; a text without words has the F1 0. The layer is the one that bert-score
    recommends for a model, or a folder, of that name, else the last.

    Args:
        model: a name on the hub, or a local folder with a model and its tokenizer.

    Raises:
        MissingError: bert-score is not installed, or the model cannot be loaded.
    """
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingError("BERTScore", "bert-score is not installed", INSTALL) from error
    parts = PurePath(model).parts
    known = [model2layers[name] for name in ("/".join(parts[-2:]), parts[-1]) if name in model2layers]
    hub.prepare(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        scorer = BERTScorer(model_type=model, num_layers=known[0] if known else config.num_hidden_layers)
    except Exception as error:  # whatever transformers and bert-score raise on what is no model of texts
        reason = f"model {model!r} cannot be loaded ({str(error).partition(chr(10))[0]})"
        is_name = len(parts) <= 2 and not PurePath(model).is_absolute()
        command = f"hf download {model if is_name else 'NAME'}, or give the folder of a model and its tokenizer"
        raise MissingError("BERTScore", reason, command) from error
    tokenizer = scorer._tokenizer
    if tokenizer.model_max_length > sys.maxsize:  # how transformers says that there is no limit; bert-score fails on it
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", LONGEST)

    def score(predictions: Sequence[str], references: Sequence[str]) -> float:
        pairs = [(p, r) for p, r in zip(predictions, references, strict=True) if p.strip() and r.strip()]
        if not pairs:
            return 0.0
        _, _, f1 = scorer.score([p for p, _ in pairs], [r for _, r in pairs])
        return float(f1.double().sum()) / len(predictions)

    return score


def missing(*, meteor: bool, bertscore: str) -> list[str]:
    """Which of the wanted metrics this machine will leave out: why, and how to get it, a line for each.

    What is loaded to find out is released again.
    """
    wanted: list[Callable[[], Score]] = []
    if meteor:
        wanted.append(load_meteor)
    if bertscore:
        wanted.append(partial(load_bertscore, bertscore))
    problems = []
    for load in wanted:
        try:
            load()
        except MissingError as error:
            problems.append(str(error))
    return problems


@cache
def _available(load: Callable[..., Score], *arguments: str) -> Score | None:
    """A metric that is loaded, and reported if it is missing, once a process."""
    try:
        return load(*arguments)
    except MissingError as error:
        log.warning("%s", error)
        return None
