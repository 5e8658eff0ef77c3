"""Disks: image files, the overlay, and who waits for the thread."""

import asyncio
import struct
import threading

import pytest
from backend_bench import Bench, until

from aiovm.backends.disk import Disk
from aiovm.backends.storage import FileStorage, Overlay
from aiovm.errors import ConfigError, StateError
from aiovm.loop import run

RUNNERS = pytest.mark.parametrize("runner", [run, asyncio.run])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes((i,)) * 512 for i in range(16)) + b"tail")
    return path


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


async def read(driver, sector, sectors=1):
    _, addresses = driver.send(0, header(0, sector), 512 * sectors, 1)
    await answered(driver)
    return driver.memory.read_u(addresses[2], 1), driver.memory.read(addresses[1], 512 * sectors)


async def write(driver, sector, data):
    _, addresses = driver.send(0, header(1, sector) + data, 1)
    await answered(driver)
    return driver.memory.read_u(addresses[1], 1)


async def answered(driver):
    await until(lambda: driver.rings[0].take())


def test_a_read_only_file_is_filled_up_to_whole_sectors(image):
    storage = FileStorage(image)
    assert storage.sectors == 17
    assert storage.read_only
    assert storage.read(15, 1024) == b"\x0f" * 512 + b"tail" + bytes(508)
    storage.close()


def test_a_writable_file_has_whole_sectors_only(image):
    storage = FileStorage(image, read_only=False)
    assert storage.sectors == 16
    storage.write(1, b"new!" * 128)
    storage.flush()
    storage.close()
    data = image.read_bytes()
    assert data[512:1024] == b"new!" * 128
    assert data[1024:] == b"".join(bytes((i,)) * 512 for i in range(2, 16)) + b"tail"


def test_an_image_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"disk image '.*nothing': No such file or directory"):
        FileStorage(tmp_path / "nothing")


def test_an_overlay_leaves_the_image_alone(image):
    before = image.read_bytes()
    overlay = Overlay(FileStorage(image))
    assert overlay.sectors == 17
    assert not overlay.read_only
    overlay.write(2, b"a" * 1024)
    overlay.write(3, b"b" * 512)
    overlay.flush()
    assert overlay.read(1, 4 * 512) == b"\x01" * 512 + b"a" * 512 + b"b" * 512 + b"\x04" * 512
    assert overlay.read(16, 512) == b"tail" + bytes(508)
    assert overlay.read(0, 0) == b""
    overlay.close()
    assert image.read_bytes() == before


@RUNNERS
def test_a_guest_reads_writes_and_flushes(image, runner):
    async def main():
        disk = Disk(Overlay(FileStorage(image)), serial="root")
        driver = Bench().driver(disk)
        assert driver.get(0x100) == 17
        assert await read(driver, 3, 2) == (0, b"\3" * 512 + b"\4" * 512)
        assert await write(driver, 4, b"w" * 512) == 0
        assert await read(driver, 3, 2) == (0, b"\3" * 512 + b"w" * 512)
        driver.send(0, header(4), 1)
        await answered(driver)
        await disk.aclose()

    runner(main())


def test_a_read_only_disk(image):
    async def main():
        disk = Disk(FileStorage(image))
        driver = Bench().driver(disk)
        assert driver.features() >> 5 & 1
        assert await write(driver, 0, bytes(512)) == 1
        with pytest.raises(StateError):
            Bench().driver(disk)
        await disk.aclose()

    run(main())


class Gate(FileStorage):
    """Storage that is as slow as its owner likes, or fails."""

    def __init__(self, path):
        super().__init__(path)
        self.open = threading.Event()
        self.threads = set()
        self.error = None

    def read(self, sector, length):
        self.threads.add(threading.get_ident())
        assert self.open.wait(5)
        if self.error is not None:
            raise self.error
        return super().read(sector, length)


def test_in_virtual_time_the_answer_comes_at_its_time_however_slow_the_thread(image):
    async def main():
        storage = Gate(image)
        disk = Disk(storage, latency_ns=70_000)
        bench = Bench()
        driver = bench.driver(disk)
        threading.Timer(0.05, storage.open.set).start()
        driver.send(0, header(0), 512, 1)
        await asyncio.sleep(0.000_069_999)
        assert driver.rings[0].take() == []
        await asyncio.sleep(0.000_000_001)
        assert bench.clock.now() == 70_000
        assert driver.rings[0].take() == [(0, 513)]
        await disk.aclose()

    run(main())


def test_on_the_wall_clock_the_loop_goes_on_while_the_thread_reads(image):
    async def main():
        storage = Gate(image)
        disk = Disk(storage)
        driver = Bench().driver(disk)
        driver.send(0, header(0), 512, 1)
        await asyncio.sleep(0.02)
        assert driver.rings[0].take() == []
        storage.open.set()
        await answered(driver)
        assert threading.get_ident() not in storage.threads
        await disk.aclose()

    asyncio.run(main())


def test_storage_that_fails_is_an_io_error_for_the_guest(image):
    async def main():
        storage = Gate(image)
        storage.open.set()
        storage.error = OSError(5, "broken")
        disk = Disk(storage)
        driver = Bench().driver(disk)
        assert (await read(driver, 0))[0] == 1
        assert not driver.needs_reset
        await disk.aclose()

    run(main())


@RUNNERS
def test_closing_drops_what_has_not_begun(image, runner):
    async def main():
        storage = Gate(image)
        disk = Disk(storage)
        driver = Bench().driver(disk)
        for _ in range(4):
            driver.send(0, header(0), 512, 1)
        threading.Timer(0.05, storage.open.set).start()
        await disk.aclose()
        await asyncio.sleep(0.01)
        assert len(driver.rings[0].take()) <= 1

    runner(main())


def test_a_latency_is_not_negative(image):
    storage = FileStorage(image)
    with pytest.raises(ConfigError):
        Disk(storage, latency_ns=-1)
    storage.close()


def test_an_overlay_is_saved_by_runs_and_restored_as_it_was(image, tmp_path):
    overlay = Overlay(FileStorage(image))
    overlay.write(2, b"a" * 1024)
    overlay.write(9, b"b" * 512)
    overlay.write(16, b"c" * 512)
    runs = overlay.save()
    assert runs == [(2, b"a" * 1024), (9, b"b" * 512), (16, b"c" * 512)]
    other = Overlay(FileStorage(image))
    other.write(0, b"gone" * 128)
    other.restore(runs)
    assert other.read(0, 17 * 512) == overlay.read(0, 17 * 512)
    overlay.close()
    other.close()


@RUNNERS
def test_a_disk_is_saved_with_what_was_written(image, runner):
    async def main():
        bench = Bench()
        disk = Disk(Overlay(FileStorage(image)))
        driver = bench.driver(disk)
        assert await write(driver, 3, b"x" * 512) == 0
        driver.send(0, header(1, 5) + b"y" * 512, 1)  # under way
        saved = disk.save()
        other = Disk(Overlay(FileStorage(image)))
        other.attach(bench, driver.device._irq).restore(disk._device.save())
        other.restore(saved)
        driver.device = other._device
        assert await read(driver, 3) == (0, b"x" * 512)
        assert await read(driver, 5) == (0, b"y" * 512)
        plain = Disk(FileStorage(image))
        plain.attach(bench, driver.device._irq)
        with pytest.raises(ConfigError, match="overlay"):
            plain.restore(saved)
        for one in (disk, other, plain):
            await one.aclose()

    runner(main())
