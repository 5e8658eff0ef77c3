"""The local APIC (SDM vol. 3A, ch. 10)."""

import pytest

from aiovm.errors import ConfigError
from aiovm.lapic import Accepted, DeliveryMode, IpiMessage, Lapic, LapicEffect, Lvt, Shorthand

FIXED = DeliveryMode.FIXED


def make(vcpu_id=0, *, bsp=True, enabled=True, **kw):
    lapic = Lapic(vcpu_id, bsp=bsp, **kw)
    if enabled:
        lapic.mmio_write(0xF0, 4, 0x1FF, 0)
    return lapic


def x2(vcpu_id=0x23, **kw):
    lapic = make(vcpu_id, enabled=False, **kw)
    assert lapic.set_apic_base(lapic.apic_base | 0x400)
    lapic.msr_write(0x80F, 0x1FF, 0)
    return lapic


def read(lapic, offset, now=0):
    return lapic.mmio_read(offset, 4, now)


def write(lapic, offset, value, now=0):
    return lapic.mmio_write(offset, 4, value, now)


# ---- reset -------------------------------------------------------------------------------------------------------


def test_reset_values():
    lapic = make(5, bsp=False, enabled=False)
    assert lapic.apic_base == 0xFEE0_0800
    assert not lapic.is_bsp
    assert lapic.base_address == 0xFEE0_0000
    for offset, value in {
        0x20: 0x0500_0000,
        0x30: 0x0005_0014,
        0x80: 0,
        0x90: 0,
        0xA0: 0,
        0xB0: 0,
        0xD0: 0,
        0xE0: 0xFFFF_FFFF,
        0xF0: 0xFF,
        0x280: 0,
        0x320: 0x1_0000,
        0x350: 0x1_0000,
        0x370: 0x1_0000,
        0x380: 0,
        0x3E0: 0,
    }.items():
        assert read(lapic, offset) == value, hex(offset)
    assert not lapic.enabled


def test_bsp_takes_the_8259_at_reset():
    assert make(enabled=False).apic_base == 0xFEE0_0900
    assert read(make(enabled=False), 0x350) == 0x700
    assert make(enabled=False).accepts_extint()
    assert not make(1, bsp=False, enabled=False).accepts_extint()


def test_init_keeps_base_and_id():
    lapic = make(3)
    write(lapic, 0x20, 0x7700_0000)
    write(lapic, 0xD0, 0x0100_0000)
    lapic.accept(FIXED, 0x40)
    lapic.accept(DeliveryMode.STARTUP, 9)
    lapic.reset(init=True)
    assert read(lapic, 0x20) == 0x7700_0000
    assert read(lapic, 0xD0) == 0
    assert not lapic.has_irr
    assert lapic.pending_events, "a SIPI that followed the INIT is still there"
    lapic.reset()
    assert read(lapic, 0x20) == 0x0300_0000


def test_init_keeps_x2apic_mode_and_ldr():
    lapic = x2()
    lapic.reset(init=True)
    assert lapic.x2apic
    assert lapic.msr_read(0x80D, 0) == 0x0002_0008


def test_bad_construction():
    with pytest.raises(ConfigError):
        Lapic(-1, bsp=False)
    with pytest.raises(ConfigError):
        Lapic(0, bsp=False, maxphyaddr=60)
    with pytest.raises(ConfigError):
        Lapic(0, bsp=False, bus_cycle_ns=0)


# ---- IA32_APIC_BASE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "value", "ok"),
    [
        ([], 0xFEE0_0D00, True),
        ([], 0xFEE0_0100, True),
        ([], 0xFEE0_0500, False),
        ([], 0xFEE0_0901, False),
        ([], 0xFEE0_0B00, False),
        ([], 1 << 46 | 0xFEE0_0900, False),
        ([0xFEE0_0D00], 0xFEE0_0900, False),
        ([0xFEE0_0D00], 0xFEE0_0100, True),
        ([0xFEE0_0100], 0xFEE0_0D00, False),
        ([0xFEE0_0100], 0xFEE0_0900, True),
        ([], 0xFED0_0900, True),
    ],
)
def test_base_transitions(start, value, ok):
    lapic = make()
    for step in start:
        assert lapic.set_apic_base(step)
    assert lapic.set_apic_base(value) is ok
    assert (lapic.apic_base == value) is ok


def test_base_from_the_host_skips_the_transition_check_only():
    lapic = make()
    assert lapic.set_apic_base(0xFEE0_0D00, host_initiated=True)
    assert lapic.set_apic_base(0xFEE0_0900, host_initiated=True)
    assert not lapic.set_apic_base(0xFEE0_0500, host_initiated=True)
    assert lapic.set_apic_base(0xFEE0_0100)
    assert lapic.set_apic_base(0xFEE0_0D00, host_initiated=True)


def test_base_stored_again_or_moved_keeps_the_id():
    lapic = make()
    write(lapic, 0x20, 0x7700_0000)
    assert lapic.set_apic_base(0xFEE0_0900)
    assert lapic.set_apic_base(0xFED0_0900)
    assert lapic.base_address == 0xFED0_0000
    assert read(lapic, 0x20) == 0x7700_0000
    wide = x2(0x23)
    assert wide.set_apic_base(0xFED0_0D00)
    assert wide.msr_read(0x802, 0) == 0x23


def test_no_x2apic_without_cpuid():
    assert not make(x2apic=False).set_apic_base(0xFEE0_0D00)


def test_enabling_resets_the_id():
    lapic = make(4)
    write(lapic, 0x20, 0x7700_0000)
    lapic.set_apic_base(0xFEE0_0100)
    assert not lapic.hw_enabled
    lapic.set_apic_base(0xFEE0_0900)
    assert read(lapic, 0x20) == 0x0400_0000


def test_disabled_page_reads_all_ones_and_drops_writes():
    lapic = make()
    lapic.set_apic_base(0xFEE0_0100)
    assert read(lapic, 0x30) == 0xFFFF_FFFF
    assert write(lapic, 0x80, 0x20) == LapicEffect()
    assert lapic.tpr == 0
    assert lapic.accepts_extint()


def test_x2apic_hides_the_page():
    assert read(x2(), 0x20) == 0xFFFF_FFFF


# ---- access rules ------------------------------------------------------------------------------------------------


def test_byte_and_word_reads_inside_a_register():
    lapic = make(0x12)
    assert lapic.mmio_read(0x23, 1, 0) == 0x12
    assert lapic.mmio_read(0x22, 2, 0) == 0x1200
    assert lapic.mmio_read(0x23, 2, 0) == 0
    assert lapic.mmio_read(0x24, 4, 0) == 0
    assert lapic.mmio_read(0x20, 8, 0) == 0
    assert lapic.mmio_read(0xFF0, 4, 0) == 0


@pytest.mark.parametrize(("offset", "size"), [(0x80, 1), (0x80, 2), (0x80, 8), (0x84, 4)])
def test_only_aligned_dword_writes(offset, size):
    lapic = make()
    lapic.mmio_write(offset, size, 0x30, 0)
    assert lapic.tpr == 0


@pytest.mark.parametrize(
    ("offset", "value", "kept"),
    [
        (0x20, 0xFFFF_FFFF, 0xFF00_0000),
        (0x30, 0, 0x0005_0014),
        (0x80, 0x1FF, 0xFF),
        (0xA0, 0x55, 0),
        (0xD0, 0x1234_5678, 0x1200_0000),
        (0xE0, 0x0000_0000, 0x0FFF_FFFF),
        (0xF0, 0xFFFF_FFFF, 0x3FF),
        (0x100, 0xFFFF_FFFF, 0),
        (0x280, 0xFF, 0),
        (0x300, 0x0000_1000, 0),
        (0x310, 0xFFFF_FFFF, 0xFF00_0000),
        (0x320, 0xFFFF_FFFF, 0x0007_10FF),
        (0x330, 0xFFFF_FFFF, 0x0001_17FF),
        (0x340, 0xFFFF_FFFF, 0x0001_17FF),
        (0x350, 0xFFFF_FFFF, 0x0001_F7FF),
        (0x360, 0xFFFF_FFFF, 0x0001_F7FF),
        (0x370, 0xFFFF_FFFF, 0x0001_10FF),
        (0x3E0, 0xFFFF_FFFF, 0xB),
        (0x3F0, 0xFF, 0),
    ],
)
def test_writable_bits(offset, value, kept):
    lapic = make()
    write(lapic, offset, value)
    assert read(lapic, offset) == kept


def test_without_tsc_deadline_only_bit_17_is_a_mode():
    lapic = make(tsc_deadline=False)
    write(lapic, 0x320, 0x6_0031)
    assert read(lapic, 0x320) == 0x2_0031


def test_map_changes_are_told_once():
    lapic = make(enabled=False)
    assert write(lapic, 0x20, 0x0700_0000).map_changed
    assert not write(lapic, 0x20, 0x0700_0000).map_changed
    assert write(lapic, 0xD0, 0x0100_0000).map_changed
    assert write(lapic, 0xE0, 0x0FFF_FFFF).map_changed
    assert write(lapic, 0xF0, 0x1FF).map_changed
    assert not write(lapic, 0xF0, 0x1FE).map_changed


# ---- x2APIC MSRs -------------------------------------------------------------------------------------------------


def test_x2apic_id_and_ldr():
    lapic = x2(0x23)
    assert lapic.msr_read(0x802, 0) == 0x23
    assert lapic.msr_read(0x80D, 0) == 0x0002_0008
    assert lapic.apic_id == 0x23


@pytest.mark.parametrize("index", [0x800, 0x809, 0x80B, 0x80E, 0x831, 0x83F, 0x8FF, 0x7FF, 0x900])
def test_x2apic_read_faults(index):
    assert x2().msr_read(index, 0) is None


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0x802, 1),
        (0x803, 0),
        (0x80A, 0),
        (0x80D, 0),
        (0x80E, 0),
        (0x810, 0),
        (0x828, 1),
        (0x831, 0),
        (0x839, 0),
        (0x83F, 0x100),
        (0x808, 1 << 32),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x830, 1 << 20),
        (0x8FF, 0),
        (0x900, 0),
    ],
)
def test_x2apic_write_faults(index, value):
    assert x2().msr_write(index, value, 0) is None


def test_msrs_fault_in_xapic_mode():
    assert make().msr_read(0x802, 0) is None
    assert make().msr_write(0x80B, 0, 0) is None


def test_x2apic_icr_is_one_register():
    lapic = x2()
    effect = lapic.msr_write(0x830, 0x12345678_0000_9C31, 0)
    assert effect.ipi == IpiMessage(0x31, DeliveryMode.NMI, True, False, True, Shorthand.NONE, 0x1234_5678)
    assert lapic.msr_read(0x830, 0) == 0x12345678_0000_8C31


def test_self_ipi():
    effect = x2().msr_write(0x83F, 0x42, 0)
    assert effect.ipi.shorthand is Shorthand.SELF
    assert effect.ipi.vector == 0x42
    assert effect.ipi.mode is FIXED
    assert not effect.ipi.trigger_level


def test_x2apic_esr_accepts_zero():
    assert x2().msr_write(0x828, 0, 0) == LapicEffect()


def test_xapic_icr():
    lapic = make()
    write(lapic, 0x310, 0x0500_0000)
    effect = write(lapic, 0x300, 0x000C_4500)
    assert effect.ipi == IpiMessage(0, DeliveryMode.INIT, False, True, False, Shorthand.OTHERS, 5)
    assert read(lapic, 0x300) == 0x000C_4500
    assert read(lapic, 0x310) == 0x0500_0000


# ---- priorities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tpr", "vector", "deliverable"), [(0x30, 0x35, False), (0x2F, 0x30, True), (0, 0x0F, False)])
def test_deliverable_is_above_ppr(tpr, vector, deliverable):
    lapic = make()
    write(lapic, 0x80, tpr)
    assert lapic.accept(FIXED, vector) is Accepted.EVENT
    assert lapic.pending_vector() == (vector if deliverable else -1)
    assert lapic.acknowledge() == (vector if deliverable else -1)


@pytest.mark.parametrize(("tpr", "ppr"), [(0x20, 0x40), (0x45, 0x45), (0x51, 0x51)])
def test_ppr_with_0x41_in_service(tpr, ppr):
    lapic = make()
    lapic.accept(FIXED, 0x41)
    assert lapic.acknowledge() == 0x41
    write(lapic, 0x80, tpr)
    assert read(lapic, 0xA0) == ppr == lapic.ppr


def test_cr8():
    lapic = make()
    write(lapic, 0x80, 0x07)
    lapic.write_cr8(5)
    assert lapic.tpr == 0x50
    assert lapic.cr8 == 5
    lapic.write_cr8(0xFFF3)
    assert lapic.tpr == 0x30


def test_tpr_drop_tells_of_an_event_only_when_something_is_deliverable():
    lapic = make()
    lapic.write_tpr(0x80)
    assert not lapic.write_tpr(0x70).event
    lapic.accept(FIXED, 0x55)
    assert not lapic.write_tpr(0x60).event
    assert lapic.write_tpr(0x40).event
    assert not lapic.write_tpr(0x40).event


def test_vector_is_in_service_and_requested_at_once_and_a_third_merges():
    lapic = make()
    lapic.accept(FIXED, 0x41)
    lapic.acknowledge()
    assert lapic.accept(FIXED, 0x41) is Accepted.EVENT
    assert lapic.accept(FIXED, 0x41) is Accepted.EVENT
    assert lapic.pending_vector() == -1
    lapic.eoi()
    assert lapic.acknowledge() == 0x41
    lapic.eoi()
    assert lapic.pending_vector() == -1
    assert lapic.acknowledge() == -1


def test_higher_class_nests_and_eoi_retires_the_highest():
    lapic = make()
    lapic.accept(FIXED, 0x41)
    lapic.acknowledge()
    lapic.accept(FIXED, 0x4F)
    assert lapic.acknowledge() == -1, "same class waits"
    lapic.accept(FIXED, 0x61)
    assert lapic.acknowledge() == 0x61
    assert read(lapic, 0x130) == 0x2
    assert read(lapic, 0x120) == 0x2
    assert read(lapic, 0x220) == 0x8000
    assert write(lapic, 0xB0, 0) == LapicEffect(event=True)
    assert lapic.highest_isr() == 0x41
    lapic.eoi()
    assert lapic.highest_isr() == -1
    assert lapic.acknowledge() == 0x4F


def test_eoi_without_service_is_nothing():
    assert make().eoi() == LapicEffect()


def test_eoi_of_a_level_vector_is_reported():
    lapic = make()
    lapic.accept(FIXED, 0x51, trigger_level=True)
    assert read(lapic, 0x1A0) == 0x2_0000
    lapic.acknowledge()
    assert lapic.eoi() == LapicEffect(eoi=0x51, eoi_level=True, event=True)
    lapic.accept(FIXED, 0x51)
    assert read(lapic, 0x1A0) == 0, "TMR holds the last accepted trigger mode"
    lapic.acknowledge()
    assert lapic.eoi() == LapicEffect(event=True)


def test_eoi_of_a_watched_edge_vector_is_reported():
    lapic = make()
    lapic.watched_vectors = 1 << 0x30
    lapic.accept(FIXED, 0x30)
    lapic.acknowledge()
    assert lapic.eoi() == LapicEffect(eoi=0x30, eoi_level=False, event=True)


def test_x2apic_eoi():
    lapic = x2()
    lapic.accept(FIXED, 0x30)
    lapic.acknowledge()
    assert lapic.msr_write(0x80B, 0, 0) == LapicEffect(event=True)


def test_software_disable_holds_irr_but_takes_no_more():
    lapic = make()
    lapic.accept(FIXED, 0x31)
    write(lapic, 0xF0, 0xFF)
    assert lapic.accept(FIXED, 0x41) is Accepted.DROPPED
    assert lapic.pending_vector() == 0x31


def test_hardware_disable_delivers_nothing():
    lapic = make()
    lapic.accept(FIXED, 0x31)
    lapic.set_apic_base(0xFEE0_0100)
    assert lapic.pending_vector() == -1
    assert lapic.acknowledge() == -1
    assert lapic.has_irr


# ---- accepting ---------------------------------------------------------------------------------------------------


def test_accept_needs_an_assertion_only_for_level():
    lapic = make()
    assert lapic.accept(FIXED, 0x31, level=False, trigger_level=True) is Accepted.DROPPED
    assert lapic.accept(FIXED, 0x31, level=False) is Accepted.EVENT


def test_lowest_priority_counts_even_when_dropped():
    lapic = make(enabled=False)
    assert lapic.accept(DeliveryMode.LOWEST_PRIORITY, 0x31) is Accepted.DROPPED
    assert lapic.state.arb_prio == 1
    write(lapic, 0xF0, 0x100)
    assert lapic.accept(DeliveryMode.LOWEST_PRIORITY, 0x31) is Accepted.EVENT
    assert lapic.pending_vector() == 0x31


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        (DeliveryMode.SMI, Accepted.SMI),
        (DeliveryMode.REMOTE_READ, Accepted.UNHALT),
        (DeliveryMode.NMI, Accepted.NMI),
        (DeliveryMode.INIT, Accepted.INIT),
        (DeliveryMode.STARTUP, Accepted.STARTUP),
        (DeliveryMode.EXTINT, Accepted.DROPPED),
    ],
)
def test_other_modes_ignore_software_disable(mode, answer):
    lapic = make(enabled=False)
    assert lapic.accept(mode, 0x9A) is answer
    assert not lapic.has_irr


def test_init_deassert_is_ignored():
    lapic = make()
    assert lapic.accept(DeliveryMode.INIT, 0, level=False, trigger_level=True) is Accepted.DROPPED
    assert not lapic.pending_events


def test_two_inits_and_a_sipi():
    lapic = make()
    lapic.accept(DeliveryMode.INIT, 0)
    lapic.accept(DeliveryMode.INIT, 0)
    lapic.accept(DeliveryMode.STARTUP, 0x9A)
    assert lapic.pending_events
    assert lapic.take_init()
    assert not lapic.take_init()
    assert lapic.take_sipi() == 0x9A
    assert lapic.take_sipi() is None
    assert not lapic.pending_events


def test_init_wipes_a_sipi():
    lapic = make()
    lapic.accept(DeliveryMode.STARTUP, 0x9A)
    lapic.accept(DeliveryMode.INIT, 0)
    assert lapic.take_init()
    assert lapic.take_sipi() is None


# ---- local vectors -----------------------------------------------------------------------------------------------


def test_local_vectors_stay_masked_while_software_disabled():
    lapic = make(enabled=False)
    write(lapic, 0x370, 0x33)
    assert read(lapic, 0x370) == 0x1_0033
    write(lapic, 0xF0, 0x1FF)
    write(lapic, 0x370, 0x33)
    assert lapic.deliver_lvt(Lvt.ERROR) is Accepted.EVENT
    write(lapic, 0xF0, 0xFF)
    assert read(lapic, 0x370) == 0x1_0033
    assert lapic.deliver_lvt(Lvt.ERROR) is Accepted.DROPPED


def test_local_delivery_mode_and_trigger():
    lapic = make()
    write(lapic, 0x360, 0x400)
    assert lapic.deliver_lvt(Lvt.LINT1) is Accepted.NMI
    write(lapic, 0x350, 0x8035)
    assert lapic.deliver_lvt(Lvt.LINT0) is Accepted.EVENT
    assert read(lapic, 0x190) == 0x20_0000
    lapic.set_apic_base(0xFEE0_0100)
    assert lapic.deliver_lvt(Lvt.LINT0) is Accepted.DROPPED


def test_performance_interrupt_masks_itself():
    lapic = make()
    write(lapic, 0x340, 0x400)
    assert lapic.deliver_lvt(Lvt.PERFORMANCE) is Accepted.NMI
    assert read(lapic, 0x340) == 0x1_0400
    assert lapic.deliver_lvt(Lvt.PERFORMANCE) is Accepted.DROPPED


@pytest.mark.parametrize(
    ("lvt0", "extint", "nmi"),
    [(0x700, True, False), (0x1_0700, False, False), (0x31, False, False), (0x400, False, True)],
)
def test_lint0(lvt0, extint, nmi):
    lapic = make()
    write(lapic, 0x350, lvt0)
    assert lapic.accepts_extint() is extint
    assert lapic.lint0_is_nmi is nmi


# ---- the timer ---------------------------------------------------------------------------------------------------


def test_timer_through_the_registers():
    lapic = make()
    assert write(lapic, 0x320, 0x2_00EC).timer
    assert write(lapic, 0x3E0, 0xB).timer
    assert write(lapic, 0x380, 1_000_000, 100).timer
    assert lapic.timer.next_deadline() == 1_000_100
    assert read(lapic, 0x380) == 1_000_000
    assert read(lapic, 0x390, 250_100) == 750_000
    assert not lapic.inject_timer()
    lapic.timer.advance(1_000_100)
    assert lapic.has_pending_timer()
    assert lapic.inject_timer()
    assert lapic.pending_vector() == 0xEC
    assert not lapic.has_pending_timer()


def test_masked_tick_is_lost():
    lapic = make()
    write(lapic, 0x320, 0x1_00EC)
    write(lapic, 0x380, 1000)
    lapic.timer.advance(5000)
    assert not lapic.has_pending_timer()
    assert not lapic.inject_timer()
    assert not lapic.timer.pending
    assert not lapic.has_irr


def test_software_disable_drops_a_pending_tick():
    lapic = make()
    write(lapic, 0x320, 0xEC)
    write(lapic, 0x380, 1000)
    lapic.timer.advance(5000)
    write(lapic, 0xF0, 0xFF)
    assert not lapic.timer.pending


def test_tsc_deadline():
    lapic = make()
    write(lapic, 0x320, 0x4_00EC)
    lapic.write_deadline(777, 5000, 0)
    assert lapic.read_deadline() == 777
    lapic.timer.advance(5000)
    assert lapic.read_deadline() == 777
    assert lapic.inject_timer()
    assert lapic.read_deadline() == 0
    lapic.write_deadline(778, 5000, 0)
    lapic.set_apic_base(0xFEE0_0100)
    assert lapic.read_deadline() == 0
    lapic.write_deadline(779, 6000, 0)
    assert lapic.timer.next_deadline() == 5000


# ---- state -------------------------------------------------------------------------------------------------------


def test_save_and_restore():
    lapic = make(2)
    lapic.accept(FIXED, 0x41)
    lapic.acknowledge()
    write(lapic, 0x380, 1000)
    saved = lapic.save()
    lapic.reset()
    other = make(2)
    other.restore(saved)
    assert other.ppr == 0x40
    assert other.timer.next_deadline() == 2000
    assert other.save() == saved
    other.timer.advance(2000)
    assert saved.timer.target_ns == 2000, "the saved copy is nobody's"


def test_page_round_trip():
    lapic = make(2)
    for offset, value in {0x20: 0x0900_0000, 0xD0: 0x0400_0000, 0xE0: 0, 0x80: 0x21, 0x320: 0x2_00EC, 0x3E0: 3}.items():
        write(lapic, offset, value)
    lapic.accept(FIXED, 0x41)
    lapic.accept(FIXED, 0xFF, trigger_level=True)
    lapic.acknowledge()
    write(lapic, 0x310, 0x0300_0000)
    write(lapic, 0x300, 0x4031)
    write(lapic, 0x380, 100_000)
    page = lapic.to_page(400_000)
    assert len(page) == 1024
    assert page[0x20:0x24] == b"\x00\x00\x00\x09"
    assert int.from_bytes(page[0x390:0x394], "little") == 75_000
    other = make(2, enabled=False)
    assert other.from_page(page, 1_000_000)
    assert other.highest_isr() == 0xFF
    assert other.state.irr == 1 << 0x41
    assert other.timer.next_deadline() == 1_000_000 + 75_000 * 16
    assert other.to_page(1_000_000) == page


def test_x2apic_page():
    lapic = x2(0x123)
    lapic.msr_write(0x830, 0x77_0000_0031, 0)
    page = lapic.to_page(0)
    assert page[0x20:0x24] == b"\x23\x01\x00\x00"
    assert page[0x310] == 0x77
    other = x2(0x123)
    assert other.from_page(page, 0)
    assert other.msr_read(0x830, 0) == 0x77_0000_0031
    assert not x2(0x124).from_page(page, 0)


def test_page_size_is_checked():
    with pytest.raises(ConfigError):
        make().from_page(bytes(4096), 0)
