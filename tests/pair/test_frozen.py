"""The models of the package are those that results were measured with."""

import hashlib
from pathlib import Path

import opd_jax

PAIR = Path(opd_jax.__file__).parent / "pair"


def test_every_file_of_the_embedded_models_has_the_digest_that_is_written_down() -> None:
    lines = (line.split("  ") for line in (PAIR / "SHA256SUMS").read_text().splitlines())
    written = {name: digest for digest, name in lines}
    files = {path.relative_to(PAIR).as_posix(): path for path in PAIR.glob("*/*")}
    assert written == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
