"""Whatever the bytes, a loader answers with an image or with one line that says why not."""

from __future__ import annotations

import gzip

from hypothesis import given, settings
from hypothesis import strategies as st
from images import Load, bzimage, elf, memory, multiboot_header, pvh

from aiovm import guests
from aiovm.errors import ConfigError
from aiovm.loaders import KINDS, Module, load

CODE = b"\xf4" * 32
SEEDS = (
    guests.path("hello").read_bytes(),
    elf(32, [Load(0x200000, CODE), Load(0x300000, CODE, 0x100)], 0x200000),
    elf(64, [Load(0x200000, CODE), Load(0x300000, CODE, 0x100)], 0x200000),
    elf(64, [Load(0x200000, CODE)], 0x200000, prefix=multiboot_header(3)),
    pvh(64, [Load(0x200000, CODE)], 0x200000, 0x200010),
    elf(64, [Load(0x200000, b"Linux version ")], 0x200000),
    bzimage(gzip.compress(elf(64, [Load(0x200000, CODE)], 0x200000))),
    multiboot_header(0x10003, addresses=(0x200000, 0x200000, 0, 0x201000, 0x200020)) + CODE,
)


def one_line(error):
    text = str(error)
    return text.startswith("k: ") and "\n" not in text


def answer(image, kind, modules=(), *, unpack=True):
    try:
        loaded = load(image, name="k", memory=memory(0x400000), kind=kind, modules=modules, unpack=unpack)
    except ConfigError as error:
        return one_line(error)
    try:
        len(loaded.symbols)
    except ConfigError as error:
        return one_line(error)
    return all(a.end <= b.base for a, b in zip(loaded.regions, loaded.regions[1:], strict=False))


edits = st.lists(
    st.tuples(st.integers(0, 0x400), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1) | st.integers(0, 64)),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=edits,
    cut=st.none() | st.integers(0, 0x3000),
    kind=st.none() | st.sampled_from(KINDS),
    unpack=st.booleans(),
)
def test_a_damaged_image_is_loaded_or_refused(seed, edits, cut, kind, unpack):
    image = bytearray(seed)
    for at, size, value in edits:
        image[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    assert answer(bytes(image[:cut]), kind, (Module(b"m", "m"),), unpack=unpack)


@settings(max_examples=100, deadline=None)
@given(
    start=st.sampled_from([b"", b"\x7fELF\1\1\1", b"\x7fELF\2\1\1", b"\x02\xb0\xad\x1b"]), rest=st.binary(max_size=256)
)
def test_noise_is_loaded_or_refused(start, rest):
    assert answer(start + rest, None)
