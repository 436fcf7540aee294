"""Fuzzing by atheris: inputs that reach code which none has reached before are kept and changed further.

    python -m tests.fuzz.coverage_guided FOLDER [RUNS]

The first byte of an input chooses the reader. FOLDER gets the inputs, and the one that ended the process, if one did.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .readers import Reader

RUNS = 12_000
SLOW = ("config", "setting", "hyper_parameters", "spec")
"""Readers that are left to the other tests: OmegaConf and PyYAML take ten to a hundred milliseconds an input."""
OURS = [
    "tap_flower.plain",
    "tap_flower.files",
    "tap_flower.core",
    "tap_flower.wire",
    "tap_flower.client",
    "tap_flower.server",
    "tap_flower.report",
]


def main(folder: Path, runs: int) -> None:
    """Fuzzes all readers."""
    import atheris
    import pytest

    with atheris.instrument_imports(include=OURS):
        from .readers import readers
    from .corruption import corrupted

    every: list[Reader] = [
        reader for name, reader in readers(folder / "files", pytest.MonkeyPatch()).items() if name not in SLOW
    ]

    def attempt(data: bytes) -> None:
        if data:
            every[data[0] % len(every)].attempt(data[1:])

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2 or not data:
            return bytes(atheris.Mutate(data, max_size))
        chosen = seed // 2 % len(every)
        return (bytes([chosen]) + corrupted(every[chosen], seed))[:max_size]

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, reader in enumerate(every):
        for other, valid in enumerate(reader.valid):
            (corpus / f"{number}-{other}").write_bytes(bytes([number]) + valid)
    arguments = [
        sys.argv[0],
        f"-runs={runs}",
        "-seed=1",
        "-max_len=65536",
        "-timeout=60",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([*arguments, str(corpus)], attempt, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else RUNS)
