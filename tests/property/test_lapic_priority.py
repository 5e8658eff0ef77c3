"""The local APIC against a plain model: sets of vectors and the manual's sentences (SDM vol. 3A, 10.8)."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiovm.lapic import Accepted, DeliveryMode, Lapic

VECTORS = st.integers(0, 255)


class Model(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.lapic = Lapic(0, bsp=True)
        self.lapic.mmio_write(0xF0, 4, 0x1FF, 0)
        self.irr: set[int] = set()
        self.isr: set[int] = set()
        self.level: set[int] = set()
        self.tpr = 0

    def ppr(self):
        service = max(self.isr, default=0) // 16 * 16
        return self.tpr if self.tpr // 16 * 16 >= service else service

    def deliverable(self):
        best = max(self.irr, default=0)
        return best if best // 16 > self.ppr() // 16 else -1

    @rule(vector=VECTORS, trigger_level=st.booleans())
    def accept(self, vector, trigger_level):
        assert self.lapic.accept(DeliveryMode.FIXED, vector, trigger_level=trigger_level) is Accepted.EVENT
        self.irr.add(vector)
        (self.level.add if trigger_level else self.level.discard)(vector)

    @rule()
    def acknowledge(self):
        expected = self.deliverable()
        assert self.lapic.acknowledge() == expected
        if expected >= 0:
            self.irr.remove(expected)
            self.isr.add(expected)

    @rule()
    def eoi(self):
        effect = self.lapic.mmio_write(0xB0, 4, 0, 0)
        assert effect.event is bool(self.isr)
        if self.isr:
            retired = max(self.isr)
            self.isr.remove(retired)
            assert effect.eoi == (retired if retired in self.level else None)

    @rule(value=st.integers(0, 255))
    def write_tpr(self, value):
        before = self.ppr()
        self.tpr = value
        event = self.lapic.mmio_write(0x80, 4, value, 0).event
        assert event is (self.ppr() < before and self.deliverable() >= 0)

    @rule()
    def move_by_save(self):
        state = self.lapic.save()
        self.lapic = Lapic(0, bsp=True)
        self.lapic.restore(state)

    @rule()
    def move_by_page(self):
        page = self.lapic.to_page(0)
        self.lapic = Lapic(0, bsp=True)
        assert self.lapic.from_page(page, 0)

    @invariant()
    def agrees(self):
        assert self.lapic.ppr == self.ppr()
        assert self.lapic.pending_vector() == self.deliverable()
        assert self.lapic.highest_isr() == max(self.isr, default=-1)
        assert self.lapic.has_irr is bool(self.irr)


TestLapicPriority = Model.TestCase
TestLapicPriority.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
