"""Result files: whole or not at all."""

import os

import pytest

from aiovm.results import store


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "rows.json"
    store(path, b"before")
    with pytest.raises(TypeError):
        store(path, "no bytes")
    assert path.read_bytes() == b"before"
    store(path, b"after")
    assert path.read_bytes() == b"after"


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    store(path, b"rows")
    assert os.read(reader, 10) == b"rows"
    assert list(tmp_path.iterdir()) == [path]
    os.close(reader)
