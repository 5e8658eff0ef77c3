"""Reading the lock guest's memory: the numbers of guests/locks.h, restated."""

import struct

import pytest

from aiovm import guests
from aiovm.errors import ConfigError
from aiovm.loaders.symbols import Symbol, Symbols
from aiovm.locks.layout import LOCKS, PV_LOCKS, LockLayout, LockState, Phase, WaitHistogram, bucket_range

IMAGE = guests.path("locks").read_bytes()
AT = {name: symbol.address for name, symbol in Symbols(IMAGE).items()}


class Memory:
    """RAM from 4 MiB to 12 MiB."""

    def __init__(self):
        self.data = bytearray(8 << 20)

    def write(self, address, format_, *values):
        struct.pack_into("<" + format_, self.data, address - (4 << 20), *values)

    def read(self, gpa, length):
        assert gpa >= 4 << 20
        return bytes(self.data[gpa - (4 << 20) :][:length])


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def layout():
    return LockLayout.from_elf(IMAGE)


def set_params(memory, *, lock=0, cpus=0, nlocks=0):
    memory.write(AT["lock_params"], "2Q", lock, cpus)
    memory.write(AT["lock_params"] + 48, "Q", nlocks)


def guest_bucket(wait):
    """The formula of guests/locks.h."""
    if wait < 32:
        return wait
    e = wait.bit_length() - 1
    return 32 * (e - 4) + ((wait >> (e - 5)) & 31)


def test_lock_names_are_the_guests_in_its_order():
    assert LOCKS == ("tas", "ttas", "ticket", "pvticket", "mcs", "qspinlock", "pvqspinlock", "broken")
    assert {"pvticket", "pvqspinlock"} == PV_LOCKS


@pytest.mark.parametrize("name", ["lock_state", "lock_stats", "wait_hist", "lock_params", "lock_count", "lock_ops"])
def test_exported_variables_are_aligned_to_64_bytes(name):
    assert AT[name] % 64 == 0


def test_states_are_64_bytes_apart(layout, memory):
    memory.write(AT["lock_state"], "II", 1, 7)
    memory.write(AT["lock_state"] + 64, "II", 2, 63)
    assert layout.state_address(3) == AT["lock_state"] + 192
    assert layout.read_state(memory.read, 0) == LockState(Phase.WAITING, 7)
    assert layout.read_state(memory.read, 1) == LockState(Phase.HOLDING, 63)
    assert layout.read_state(memory.read, 255) == LockState(Phase.OUTSIDE, 0)


def test_a_state_that_does_not_exist_reads_as_outside(layout, memory):
    memory.write(AT["lock_state"], "II", 3, 0xFFFFFFFF)
    assert layout.read_state(memory.read, 0) == (Phase.OUTSIDE, 0xFFFFFFFF)


def test_parameters_in_order(layout, memory):
    memory.write(AT["lock_params"], "16Q", *range(4, 20))
    params = layout.read_params(memory.read)
    assert (params.lock, params.cpus, params.hold_ns, params.think_ns) == (4, 5, 6, 7)
    assert (params.hold_dist, params.think_dist, params.nlocks, params.spin) == (8, 9, 10, 11)
    assert (params.duration_ns, params.warmup_ns, params.seed, params.tsc_khz) == (12, 13, 14, 15)
    assert (params.loop_ns_fp, params.start_tsc, params.measure_tsc, params.end_tsc) == (16, 17, 18, 19)
    assert params.lock_name == "mcs"


def test_a_lock_that_does_not_exist_has_no_name(layout, memory):
    set_params(memory, lock=8)
    assert layout.read_params(memory.read).lock_name == "?"


def test_statistics_of_each_cpu(layout, memory):
    memory.write(AT["lock_stats"] + 64 * 9, "8Q", 1, 2, 3, 4, 5, 6, 7, 8)
    stats = layout.read_cpu(memory.read, 9)
    assert (stats.ops_total, stats.ops_measured, stats.wait_sum_tsc, stats.wait_max_tsc) == (1, 2, 3, 4)
    assert (stats.halts, stats.kicks, stats.acquired_after_halt, stats.spins) == (5, 6, 7, 8)


def test_results_add_up_over_the_cpus(layout, memory):
    set_params(memory, cpus=2, nlocks=2)
    for cpu, (total, measured, longest) in enumerate([(10, 8, 900), (20, 15, 40)]):
        memory.write(AT["lock_stats"] + 64 * cpu, "8Q", total, measured, 0, longest, 0, 0, 0, 0)
        memory.write(AT["wait_hist"] + 7680 * cpu + 4 * 5, "I", measured)
        memory.write(AT["lock_ops"] + 512 * cpu, "2Q", total - 1, 1)
    memory.write(AT["lock_count"], "Q", 28)
    memory.write(AT["lock_count"] + 64, "Q", 1)
    results = layout.read(memory.read)
    assert [cpu.ops_total for cpu in results.cpus] == [10, 20]
    assert results.operations == 23
    assert results.done == (28, 2)
    assert results.counted == (28, 1)
    assert results.lost == 1
    assert (results.waits.total, results.waits.counts[5], results.waits.longest) == (23, 23, 900)


def test_nonsense_from_the_guest_reads_as_something(layout, memory):
    set_params(memory, cpus=2**64 - 1, nlocks=2**64 - 1)
    results = layout.read(memory.read)
    assert (len(results.cpus), len(results.done)) == (256, 64)
    set_params(memory, cpus=0, nlocks=0)
    assert layout.read(memory.read).waits.percentile(99) == 0


def test_an_image_without_the_variables_is_refused():
    with pytest.raises(ConfigError, match="not the lock guest: lock_state is missing"):
        LockLayout.from_elf(guests.path("hello").read_bytes())


def test_a_variable_of_another_size_is_refused():
    symbols = Symbols(IMAGE)
    symbols._table()["lock_ops"] = Symbol(AT["lock_ops"], 8, "lock_ops")
    with pytest.raises(ConfigError, match="lock_ops has 0x8 bytes, not 0x20000"):
        LockLayout(symbols)


def test_buckets_tile_all_waits_in_order():
    assert [bucket_range(i) for i in (0, 31, 32, 63, 64, 65, 96)] == [
        (0, 0),
        (31, 31),
        (32, 32),
        (63, 63),
        (64, 65),
        (66, 67),
        (128, 131),
    ]
    assert bucket_range(1919)[1] == 2**64 - 1
    for index in range(1, 1920):
        assert bucket_range(index)[0] == bucket_range(index - 1)[1] + 1


@pytest.mark.parametrize("wait", [0, 31, 32, 63, 64, 127, 128, 4095, 4096, 10**6, 2**40 + 12345, 2**64 - 1])
def test_bucket_ranges_undo_the_guests_formula(wait):
    low, high = bucket_range(guest_bucket(wait))
    assert low <= wait <= high
    assert high - low <= low // 32


def histogram(waits):
    counts = [0] * 1920
    for wait in waits:
        counts[guest_bucket(wait)] += 1
    return WaitHistogram(tuple(counts), max(waits, default=0))


def test_percentiles_are_exact_for_short_waits():
    waits = histogram(range(1, 21))  # 1 to 20, once each
    assert (waits.p50, waits.percentile(95), waits.p99, waits.percentile(100)) == (10, 19, 20, 20)
    assert waits.percentile(0) == 1
    assert waits.percentile(1, 1000) == 1


def test_percentiles_of_long_waits_are_within_a_32nd_and_not_above_the_longest():
    waits = histogram(list(range(1000, 101_000, 100)))
    assert 50_900 <= waits.p50 <= 50_900 * 33 // 32
    assert 99_900 <= waits.p99 <= 100_900
    assert waits.percentile(100) == 100_900


@pytest.mark.parametrize("rank", [-1, 101])
def test_a_percentile_outside_its_scale_is_refused(rank):
    with pytest.raises(ConfigError):
        histogram([1]).percentile(rank)
