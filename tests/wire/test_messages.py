"""Messages that cannot be read: the refusal names the field, and is a refusal whatever stands behind it."""

from __future__ import annotations

import pytest
from flwr.common import ConfigRecord, RecordDict

from tap_flower.wire.messages import FIELDS, MessageError, Report, decode


def _read(text: str) -> Report:
    return decode(RecordDict({FIELDS: ConfigRecord({"json": text})}), Report, "a node")


def test_a_refusal_names_the_field_and_its_value() -> None:
    with pytest.raises(MessageError, match="a node: the message cannot be read: steps is 'image': Expected `int`"):
        _read('{"steps": "image"}')


@pytest.mark.parametrize(
    "rest",
    ['"\\ud800": 1', '"deep": ' + "[" * 100_000 + "]" * 100_000, '"huge": 1e999', '"open": ['],
    ids=["half a surrogate pair", "deep", "huge", "unclosed"],
)
def test_what_is_malformed_behind_a_wrong_field_is_refused(rest: str) -> None:
    """The field's value is shown only where the whole text can be read."""
    with pytest.raises(MessageError, match="a node: the message cannot be read: "):
        _read(f'{{"steps": "image", "losses": {{{rest}}}}}')
