"""What tests of whole jobs share."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with an encoder as torch writes it, weights in a file of their own, and a config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.external(tiny.encoder(spelled="dynamo"), folder)
    (folder / "config.json").write_text('{"vocab_size": 50}')
    return folder
