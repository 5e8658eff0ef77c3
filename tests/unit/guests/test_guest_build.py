"""The guest programs' images: what they are, and that their sources still build them."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from aiovm import guests
from aiovm.errors import ConfigError
from aiovm.loaders.symbols import Symbols

PROGRAMS = ("bench", "hello", "ipi", "kickrace", "locks", "ticks")
FOLDER = Path(guests.__file__).parent


def make(*words):
    done = subprocess.run(["make", "-s", "-C", str(FOLDER), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    missing = [tool for tool in ("make", "gcc", "ld", "objcopy") if shutil.which(tool) is None]
    if missing:
        reason = f"cannot rebuild the guest programs: no {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("guests")
    make(f"OUT={folder}", f"BUILD={folder / 'objects'}", "all")
    return folder


def test_names_lists_every_program():
    assert guests.names() == PROGRAMS
    assert guests.path("locks") == FOLDER / "locks.elf"


def test_an_unknown_program_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'lock'.*bench, hello.*ticks"):
        guests.path("lock")


@pytest.mark.parametrize("name", PROGRAMS)
def test_image_is_32_bit_elf_with_a_multiboot_header(name):
    image = guests.path(name).read_bytes()
    assert image[:7] == b"\x7fELF\x01\x01\x01"  # ELFCLASS32, little-endian
    assert struct.unpack_from("<HH", image, 16) == (2, 3)  # ET_EXEC, EM_386
    words = struct.unpack_from("<2048I", image)
    at = words.index(0x1BADB002)
    assert words[at + 1] == 3  # page-align modules, memory information
    assert sum(words[at : at + 3]) & 0xFFFFFFFF == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_code_is_in_the_page_at_2_mib_and_data_above_4_mib(name):
    """Stores to a page that may hold code are slow: the two never share one."""
    image = guests.path(name).read_bytes()
    offset, count = struct.unpack_from("<I", image, 28)[0], struct.unpack_from("<H", image, 44)[0]
    code, data = [struct.unpack_from("<8I", image, offset + 32 * i) for i in range(count)]
    assert (code[0], code[3], code[6]) == (1, 0x20_0000, 5)  # PT_LOAD, address, R+X
    assert code[3] + code[5] <= 0x40_0000
    assert (data[0], data[3], data[6]) == (1, 0x40_0000, 6)  # R+W


@pytest.mark.parametrize("name", PROGRAMS)
def test_image_is_small_and_keeps_symbols_without_debug_information(name):
    image = guests.path(name).read_bytes()
    assert len(image) < 40 * 1024
    assert b".debug" not in image
    assert b"GCC:" not in image
    assert str(FOLDER).encode() not in image
    assert "guest_main" in Symbols(image, name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_rebuilding_gives_the_committed_bytes(name, rebuilt):
    built_with, present = (FOLDER / "BUILT_WITH").read_text(), make("toolchain")
    if present != built_with:
        pytest.skip(f"the images were built with {built_with!r}, here is {present!r}")
    assert (rebuilt / f"{name}.elf").read_bytes() == guests.path(name).read_bytes()


@pytest.mark.parametrize("name", PROGRAMS)
def test_rebuilding_gives_the_committed_symbols(name, rebuilt):
    """With any compiler: the same functions and variables, the variables of the same size."""

    def table(path):
        symbols = Symbols(path.read_bytes(), name)
        text = range(0x20_0000, 0x40_0000)
        names = {s.name.split(".")[0] for s in symbols.values() if s.address not in text or s.name == "guest_main"}
        exported = ("lock_", "wait_hist")
        return names, {s.name: s.size for s in symbols.values() if s.name.startswith(exported)}

    assert table(rebuilt / f"{name}.elf") == table(guests.path(name))
