"""bzImage: the setup header, the kernel unpacked here or by itself, and the codecs."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import sys
import zlib

import lz4.block
import pytest
import zstandard
from images import MIB, Load, bzimage, elf, memory

from aiovm.engine.base import Reg, Seg
from aiovm.errors import ConfigError
from aiovm.loaders import Module, identify, load

KERNEL = elf(64, [Load(0x200000, b"\xf4" * 5000, 0x2000, vaddr=0xFFFFFFFF81000000)], 0x200010)
NARROW = elf(32, [Load(0x200000, b"\xf4" * 5000, 0x2000, vaddr=0xC0200000)], 0x200010)


def sized(packed):
    """A payload as the kernel's build makes it."""
    return packed + struct.pack("<I", len(KERNEL))


def lz4_legacy(data, block=2000):
    parts = [data[n : n + block] for n in range(0, len(data), block)]
    packed = [lz4.block.compress(part, store_size=False) for part in parts]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(p)) + p for p in packed)


PACKED = {
    "gzip": gzip.compress(KERNEL),
    "bzip2": sized(bz2.compress(KERNEL)),
    "xz": sized(lzma.compress(KERNEL, check=lzma.CHECK_CRC32)),
    "lzma": sized(lzma.compress(KERNEL, format=lzma.FORMAT_ALONE)),
    "lz4": sized(lz4_legacy(KERNEL)),
    "zstd": sized(zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(KERNEL)),
}
IMAGE = bzimage(PACKED["gzip"])


def boot(image=IMAGE, *, m=None, **options):
    m = memory() if m is None else m
    loaded = load(image, name="vmlinuz", memory=m, **options)
    return loaded, m.read(loaded.entry.gpr[Reg.RSI], 4096)


def refused(image, **options):
    with pytest.raises(ConfigError) as error:
        boot(image, **options)
    text = str(error.value)
    assert text.startswith("vmlinuz: ")
    assert "\n" not in text
    return text[9:]


# ---- the codecs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", PACKED)
def test_the_kernel_is_unpacked_here(codec):
    m = memory(fill=0xAA)
    loaded, _ = boot(bzimage(PACKED[codec]), m=m)
    assert loaded.kind == "bzimage"
    assert loaded.entry.rip == 0x200010
    assert m.read(0x200000, 0x2000) == (b"\xf4" * 5000).ljust(0x2000, b"\0")
    assert loaded.summary == (f"Linux 6.1.0-test, {codec}, ELF64, 1 segment at 0x200000-0x202000, entry 0x200010")


@pytest.mark.parametrize("codec", PACKED)
def test_a_damaged_payload_is_refused(codec):
    packed = bytearray(PACKED[codec])
    packed[20:40] = bytes(b ^ 0x55 for b in packed[20:40])
    assert refused(bzimage(bytes(packed))).startswith(f"damaged {codec} payload: ")


def summed(image, *, signed=False, release=b"6.1.0-test", magic=0x20B, certificates=0xE8):
    """As the kernel's build makes it: whole paragraphs, their count at 0x1F4, then CRC-32 that leaves no remainder."""
    image = bytearray(image) + bytes(-(len(image) + 4) % 16)
    image[0x3C:0x40] = (0x40).to_bytes(4, "little")
    image[0x40:0x44] = b"PE\0\0"
    image[0x58:0x5A] = magic.to_bytes(2, "little")
    image[0x300 : 0x300 + 32] = (release + b" (somebody) #1").ljust(32, b"\0")
    image[0x1F4:0x1F8] = ((len(image) + 4 - 0x400) // 16).to_bytes(4, "little")
    image += (zlib.crc32(image) ^ 0xFFFF_FFFF).to_bytes(4, "little")
    if signed:
        image[0x98:0x9C] = b"\x4c\xd4\xd8\0"
        image[certificates : certificates + 8] = struct.pack("<II", len(image), 1472)
        image += bytes(1472)
    return image


@pytest.mark.parametrize("signed", [False, True])
def test_the_image_checksum_tells_any_damage(signed):
    image = summed(bzimage(PACKED["lz4"]), signed=signed)
    assert boot(bytes(image))[0].kind == "bzimage"
    for at in (0x10, 0x1F9, 0x500, 0x720):
        broken = bytearray(image)
        broken[at] ^= 1
        assert refused(bytes(broken)) == "damaged: the image's checksum is wrong"
    assert refused(bytes(image[:0x710])).startswith("truncated: a kernel of ")


def test_a_signed_32_bit_kernel_has_its_certificates_elsewhere():
    image = summed(bzimage(gzip.compress(NARROW)), signed=True, magic=0x10B, certificates=0xD8)
    assert boot(bytes(image))[0].kind == "bzimage"
    image[0xE8] ^= 1
    assert refused(bytes(image)) == "damaged: the image's checksum is wrong"


def test_kernels_since_6_16_have_no_checksum():
    image = summed(bzimage(PACKED["gzip"]), release=b"6.16.1-test")
    image[0x10] ^= 1
    assert boot(bytes(image))[0].kind == "bzimage"
    image = summed(bzimage(PACKED["gzip"]), release=b"6.15.1-test")
    image[0x10] ^= 1
    assert refused(bytes(image)) == "damaged: the image's checksum is wrong"


@pytest.mark.parametrize("codec", ["bzip2", "xz", "lzma", "lz4", "zstd"])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_payload_of_another_size_than_it_says_is_refused(codec, off):
    size = len(KERNEL) + off
    assert refused(bzimage(PACKED[codec][:-4] + struct.pack("<I", size))).startswith(f"damaged {codec} payload: ")


def test_a_size_that_no_kernel_has_is_not_tried():
    payload = PACKED["xz"][:-4] + struct.pack("<I", 0x40000001)
    assert refused(bzimage(payload)) == "xz payload says that it unpacks to 0x40000001 bytes"


def test_an_unknown_codec_is_shown():
    assert refused(bzimage(b"\x89LZO" * 4)) == (
        "payload begins with 89 4c 5a 4f 89 4c 5a 4f: no codec that is known here"
    )


@pytest.mark.parametrize(
    ("codec", "module", "package"), [("lz4", "lz4.block", "lz4"), ("zstd", "zstandard", "zstandard")]
)
def test_a_missing_package_is_named(monkeypatch, codec, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert refused(bzimage(PACKED[codec])) == (
        f"kernel packed with {codec}: install the package {package} (aiovm[linux])"
    )


def test_an_image_without_a_payload_is_all_there_is():
    loaded, _ = boot(bzimage(b"", code=b"\xf4" * 0x208))
    assert loaded.entry.rip == 0x200200
    assert loaded.summary == "Linux 6.1.0-test, packed, at 0x200000-0x210000, entry 0x200200"


def test_a_32_bit_kernel_begins_by_the_32_bit_protocol():
    loaded, page = boot(bzimage(gzip.compress(NARROW), header={(0x22C, 4): 0x6FFFFF}), modules=(Module(b"disk"),))
    assert loaded.summary == "Linux 6.1.0-test, gzip, ELF32, 1 segment at 0x200000-0x202000, entry 0x200010"
    assert loaded.entry.rip == 0x200010
    assert (loaded.entry.cr0 & 0x80000001, loaded.entry.efer) == (1, 0)
    assert loaded.entry.segments[Seg.CS][:3] == (0x10, 0, 0xFFFFFFFF)
    assert struct.unpack_from("<II", page, 0x218) == (0x6FF000, 4)


def test_what_is_inside_must_be_a_kernel():
    assert refused(bzimage(gzip.compress(b"some text"))) == "not an ELF image: it does not begin with 7f 45 4c 46"


# ---- the header ------------------------------------------------------------------------------------------------


def test_the_zero_page_carries_the_setup_header():
    _, page = boot(modules=(Module(b"disk"),), cmdline="quiet", rsdp=0xE0000)
    assert page[0x1F1] == 1
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206) == (0x20F,)
    assert struct.unpack_from("<Q", page, 0x258) == (0x200000,)
    assert page[0x210:0x212] == b"\xff\x01"
    assert struct.unpack_from("<II", page, 0x218) == (0x7FF000, 4)
    assert page[:0x70] == bytes(0x70)
    assert page[0x26C:0x2D0] == bytes(0x64)


def test_a_header_that_reaches_further_than_the_zero_page_has_room_is_cut():
    _, page = boot(bzimage(PACKED["gzip"], header={(0x201, 1): 0xFF, (0x28F, 1): 0x77, (0x290, 1): 0x88}))
    assert page[0x28F:0x291] == b"\x77\0"


def test_the_ramdisk_stays_below_the_kernels_limit():
    _, page = boot(bzimage(PACKED["gzip"], header={(0x22C, 4): 0x5FFFFF}), modules=(Module(bytes(0x1001)),))
    assert struct.unpack_from("<I", page, 0x218) == (0x5FE000,)


def test_the_command_line_limit_is_the_headers():
    image = bzimage(PACKED["gzip"], header={(0x238, 4): 3})
    boot(image, cmdline="abc")
    assert refused(image, cmdline="abcd") == "command line of 4 bytes: this kernel takes 3"


def test_an_old_protocol_is_refused():
    boot(bzimage(PACKED["gzip"], version=0x208))
    assert refused(bzimage(PACKED["gzip"], version=0x207)) == (
        "Linux boot protocol 0x207: 0x208 (Linux 2.6.26) or later"
    )


def test_no_setup_sectors_means_four():
    loaded, _ = boot(bzimage(PACKED["gzip"], sectors=0))
    assert loaded.entry.rip == 0x200010


def test_the_signatures_make_a_bzimage():
    assert identify(IMAGE) == "bzimage"
    assert identify(IMAGE[:0x1FF] + b"\0" + IMAGE[0x200:]) == "flat"
    assert identify(IMAGE[:0x205]) == "flat"
    assert refused(b"", kind="bzimage") == "no Linux setup header: the signature HdrS is missing at 0x202"


def test_a_truncated_image():
    assert refused(IMAGE[:-1]).startswith("truncated: payload at 0x700-")
    assert refused(IMAGE[:0x206]) == "truncated: setup header at 0x206-0x208, the image has 0x206 bytes"
    assert refused(IMAGE[:0x210]).startswith("truncated: setup header at 0x1f1-0x26c")


def test_a_release_that_is_not_text_is_left_out():
    for pointer in (0, 0xFFFF, 0x1FF):
        loaded, _ = boot(bzimage(PACKED["gzip"], header={(0x20E, 2): pointer}))
        assert loaded.summary.startswith("Linux gzip, ELF64")


# ---- the kernel's own decompressor -----------------------------------------------------------------------------


def test_the_packed_kernel_lies_where_it_prefers():
    m = memory()
    loaded, _ = boot(m=m, unpack=False)
    assert loaded.entry.rip == 0x200200
    assert m.read(0x200000, 0x300 + 100) == IMAGE[0x400 : 0x700 + 100]
    assert loaded.summary == "Linux 6.1.0-test, packed, at 0x200000-0x210000, entry 0x200200"
    assert not loaded.symbols


def test_room_for_the_decompressor_is_kept():
    image = bzimage(PACKED["gzip"], header={(0x260, 4): 0x5FF000})
    assert "ramdisk" in refused(image, unpack=False, modules=(Module(bytes(0x101000)),))
    _, page = boot(image, unpack=False, modules=(Module(bytes(0x1000)),))
    assert struct.unpack_from("<I", page, 0x218) == (0x7FF000,)


def test_only_a_relocatable_kernel_moves_up():
    _, page = boot(bzimage(PACKED["gzip"], header={(0x258, 8): 0x100000}), unpack=False)
    assert page[0x202:0x206] == b"HdrS"
    loaded, _ = boot(bzimage(PACKED["gzip"], header={(0x258, 8): 0x100000}), unpack=False)
    assert loaded.entry.rip == 0x200200
    fixed = bzimage(PACKED["gzip"], header={(0x258, 8): 0x100000}, relocatable=0)
    assert refused(fixed, unpack=False).startswith("no room for kernel (0x10000 bytes) in 0x100000-0x110000")


@pytest.mark.parametrize("header", [{"xloadflags": 0}, {"version": 0x20B}])
def test_without_a_64_bit_entry_it_begins_at_the_32_bit_one(header):
    entry = boot(bzimage(PACKED["gzip"], **header), unpack=False)[0].entry
    assert (entry.rip, entry.efer) == (0x200000, 0)
    assert [entry.segments[s].selector for s in (Seg.CS, Seg.DS, Seg.SS)] == [0x10, 0x18, 0x18]


def test_a_kernel_without_code_is_truncated():
    image = bzimage(b"")[:0x600]
    assert refused(image, unpack=False) == "truncated: kernel at 0x400, the image has 0x600 bytes"
    assert refused(image[:0x300], unpack=False) == "truncated: kernel at 0x400, the image has 0x300 bytes"


def test_hostile_sizes():
    m = memory(2 * MIB)
    image = bzimage(PACKED["gzip"], header={(0x230, 4): 0, (0x258, 8): 2**64 - 1, (0x260, 4): 2**32 - 1})
    assert refused(image, m=m, unpack=False).startswith("no room for kernel (0xffffffff bytes)")
