"""Types of fields, with their bounds, of messages and of records in files. It does not import Flower."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from tap_flower.core.averaging import LARGEST_WEIGHT
from tap_flower.core.metrics import WORD
from tap_flower.data.spec import NAME

Name = Annotated[str, Meta(pattern=rf"\A{NAME.pattern}\Z")]
Word = Annotated[str, Meta(pattern=rf"\A{WORD.pattern}\Z")]
"""Name of a model or a metric."""
Component = Annotated[
    str, Meta(max_length=256, pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")
]
TensorName = Component
"""Name of a tensor. Files of tensors hold other names, with a colon, beside these."""
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Examples = Annotated[int, Meta(ge=1, le=LARGEST_WEIGHT)]
Number = Annotated[float, Meta(gt=-1e305, lt=1e305)]
"""A loss, score or metric: a thousand of them have a finite sum."""


class Epoch(Struct, frozen=True, forbid_unknown_fields=True):
    """A start or a resume of a run.

    Attributes:
        history: random identity of the start or resume.
        start: number of complete rounds that it began with.
    """

    history: Name
    start: Count
