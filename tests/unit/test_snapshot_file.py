"""The snapshot's file: what comes back, and what is refused with one clear line."""

import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_snapshot import future_of, guest, saved_and_future

from aiovm import snapshot_file
from aiovm.errors import ConfigError
from aiovm.loop import Host, run
from aiovm.vm import Vm


@pytest.fixture(scope="module")
def ticking():
    return saved_and_future(guest("ticks"), 2_500_000, vcpus=2)


@pytest.fixture(scope="module")
def data(ticking):
    return snapshot_file.pack(ticking[0])


def test_a_file_brings_everything_back(ticking, tmp_path):
    snapshot, future = ticking
    path = tmp_path / "x.snap"
    snapshot_file.write(path, snapshot)
    assert os.listdir(tmp_path) == ["x.snap"]
    again = snapshot_file.read(path)
    assert again == snapshot
    assert future_of(again) == future


def test_a_fresh_process_goes_on_alike(ticking, tmp_path):
    snapshot, future = ticking
    snapshot_file.write(tmp_path / "x.snap", snapshot)
    code = """
import sys
from aiovm import snapshot_file
from test_snapshot import future_of
print(future_of(snapshot_file.read(sys.argv[1])))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, str(tmp_path / "x.snap")]
    found = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=True)
    assert found.stdout.strip() == repr(future)


def test_zeroes_take_no_room(data):
    assert len(data) < 200_000  # of 8 MiB


def test_the_head_is_as_documented(data):
    assert data[:18] == b"aiovm snapshot\r\n\x1a\n"
    version, length, checksum = struct.unpack_from("<IQI", data, 24)
    assert (version, length, checksum) == (5, len(data) - 40, zlib.crc32(data[40:]))


def rebuilt(data, change):
    """The file with its body changed, and a head that fits."""
    body = change(data[40:])
    return data[:28] + struct.pack("<QI", len(body), zlib.crc32(body)) + body


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "not a snapshot"),
        (lambda data: b"\x7fELF" + data[4:], "not a snapshot"),
        (lambda data: data[:24] + b"\x09" + data[25:], "format 9; this aiovm reads format 5"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data + b"x", "damaged"),
        (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "damaged"),
        (lambda data: rebuilt(data, lambda body: b""), "hold together"),
        (lambda data: rebuilt(data, lambda body: msgspec.msgpack.encode([{}, []])), "hold together"),
        (lambda data: rebuilt(data, lambda body: msgspec.msgpack.encode([1])), "hold together"),
        (lambda data: rebuilt(data, lambda body: body.replace(b"pcpus", b"pcpuz")), "hold together"),
    ],
)
def test_damaged_and_foreign_files(data, tmp_path, damage, words):
    path = tmp_path / "bad.snap"
    path.write_bytes(damage(data))
    with pytest.raises(ConfigError, match=words) as found:
        snapshot_file.read(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


@given(at=st.integers(0, 100_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(data, at, bit):
    at %= len(data)
    with pytest.raises(ConfigError):
        snapshot_file.unpack(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])


def test_memory_that_is_too_short_is_refused(data):
    state, ((image, chunks),) = msgspec.msgpack.decode(data[40:], ext_hook=msgspec.msgpack.Ext)
    for wrong in ([chunks[0][0], zlib.compress(b"short")], [4096, chunks[0][1]], [0, zlib.compress(bytes(1 << 24))]):
        body = msgspec.msgpack.encode([state, [[image, [wrong]]]])
        with pytest.raises(ConfigError, match="memory at"):
            snapshot_file.unpack(rebuilt(data, lambda _: body))  # noqa: B023


def test_files_that_cannot_be(ticking, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the snapshot .*No such file"):
        snapshot_file.read(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot write the snapshot"):
        snapshot_file.write(tmp_path / "none" / "x.snap", ticking[0])


def test_a_cpu_of_another_size_is_refused(ticking):
    snapshot = ticking[0]
    first = snapshot.vcpus[0]
    short = replace(first, context=replace(first.context, registers=bytes(100)))

    async def main():
        with pytest.raises(ConfigError, match="0x15c0 bytes"):
            Vm.restore(Host(1), replace(snapshot, vcpus=(short, snapshot.vcpus[1])))

    run(main())
