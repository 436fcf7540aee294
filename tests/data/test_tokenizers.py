from __future__ import annotations

import json
from pathlib import Path

import pytest

from tap_flower.data.text import load_tokenizer, tokenizer_hash
from tap_flower.hub import locate


@pytest.mark.parametrize("change", ["words", "capitals"])
def test_a_tokenizers_hash_covers_its_words_and_how_it_cuts(tmp_path: Path, change: str) -> None:
    demo = load_tokenizer(locate("demo"))
    demo.save_pretrained(tmp_path / "copy")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "copy"))) == tokenizer_hash(demo)
    demo.save_pretrained(tmp_path / "other")
    name = "tokenizer.json" if change == "words" else "tokenizer_config.json"
    values = json.loads((tmp_path / "other" / name).read_text())
    if change == "words":
        words = values["model"]["vocab"]
        values["model"]["vocab"] = dict(
            zip(words, [*list(words.values())[:5], *list(words.values())[:4:-1]], strict=True)
        )
    else:
        values["do_lower_case"] = False
    (tmp_path / "other" / name).write_text(json.dumps(values))
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "other"))) != tokenizer_hash(demo)
