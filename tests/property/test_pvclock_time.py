"""A guest's clock never steps back, and the scale is as exact as its fixed point allows."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from aiovm.kvmclock import KvmClock
from aiovm.memory import GuestMemory
from aiovm.paravirt import StealTime
from aiovm.pvclock import PvClock, PvclockRecord, clock_scale, time_scale
from aiovm.tsc import GuestTsc, ns_to_tsc, tsc_to_ns

KHZ = st.integers(1_000_000, 6_000_000)


@given(st.integers(1, 20_000_000), st.integers(0, 10**13))
def test_scale_errs_downwards_and_little(khz, cycles):
    scale = clock_scale(khz)
    assert 1 << 31 <= scale.mul < 1 << 32
    exact = Fraction(cycles * 1_000_000, khz)
    error = exact - scale.scale(cycles)
    # The product's floor, what the pre-shift drops, and a multiplier that is up to 2^-31 too small; a frequency of more
    # than 32 bits or so loses its low bits in normalising, at most 2^-30 of it either way.
    lost = 1 + Fraction(1 << max(0, -scale.shift), 1) * 1_000_000 / khz + exact / (1 << 30)
    assert -exact / (1 << 30) <= error <= lost


@given(st.integers(1000, 10**10), st.integers(1000, 10**10))
def test_scale_multiplier_is_normalised(scaled, base):
    scale = time_scale(scaled, base)
    assert 0 < scale.mul < 1 << 32
    assert -40 < scale.shift < 40


@given(KHZ, st.lists(st.integers(0, 1 << 40), min_size=2, max_size=20))
def test_one_record_is_monotone(khz, deltas):
    record = PvclockRecord(2, 0, 0, clock_scale(khz), 0)
    times = [record.read(d) for d in sorted(deltas)]
    assert times == sorted(times)


STEPS = st.lists(
    st.tuples(st.integers(0, 10**10), st.sampled_from(["read", "publish", "masterclock", "no masterclock"])),
    max_size=40,
)


@given(KHZ, st.integers(0, 10**15), st.integers(0, (1 << 64) - 1), STEPS)
def test_a_guest_clock_never_steps_back(khz, start, first_tsc, steps):
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000)
    kvmclock = KvmClock(host_khz=khz, now=start)
    tsc, pvclock = GuestTsc(), PvClock(memory)
    tsc.write(first_tsc, ns_to_tsc(start, khz))
    pvclock.write_msr(1)
    now, seen, version = start, 0, 0

    def publish():
        snapshot = kvmclock.snapshot(now)
        assert pvclock.update(snapshot, tsc.read(snapshot.host_tsc), khz)

    publish()
    for step, what in steps:
        now += step
        if what == "publish":
            publish()
        elif what != "read":
            kvmclock.update_masterclock(now, tscs_match=what == "masterclock")
            publish()
        record = PvclockRecord.unpack(memory.read(0, 32))
        assert record.version % 2 == 0
        assert record.version >= version
        time = record.read(tsc.read(ns_to_tsc(now, khz)))
        assert time >= seen
        assert abs(time - (now - start)) <= 2 + (now - start) // (1 << 30)
        seen, version = time, record.version


@given(st.integers(1, 10_000_000), st.integers(0, 10**18))
def test_tsc_to_ns_is_the_first_moment(khz, cycles):
    ns = tsc_to_ns(cycles, khz)
    assert ns_to_tsc(ns, khz) >= cycles
    assert ns == 0 or ns_to_tsc(ns - 1, khz) < cycles


@given(st.integers(1 << 40, 1 << 56), st.integers(0, 1 << 62), st.integers(0, (1 << 64) - 1), st.integers(1, 1 << 40))
def test_tsc_deadlines_are_reached_exactly(ratio, host, value, ahead):
    tsc = GuestTsc(ratio)
    tsc.write(value, host)
    target = value + ahead
    if target >> 64:
        return
    at = tsc.reach(target, host)
    assert at > host
    assert (tsc.read(at) - value) % (1 << 64) >= ahead
    assert (tsc.read(at - 1) - value) % (1 << 64) < ahead


@given(st.integers(0, (1 << 32) - 1), st.lists(st.integers(0, 1 << 40), max_size=20))
def test_steal_time_adds_up(junk, waits):
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000)
    memory.write_u(8, 4, junk)
    steal = StealTime(memory)
    steal.write_msr(1)
    total = 0
    for wait in waits:
        total += wait
        steal.update(total)
        assert memory.read_u(0, 8) == total
        assert memory.read_u(8, 4) % 2 == 0
