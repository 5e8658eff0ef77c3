"""What an entry serves, and in which order (``vcpu_enter_guest`` of Linux 6.16)."""

import pytest

from aiovm.exits import Shutdown, TprAccess
from aiovm.loop import Host, run
from aiovm.requests import Request, Requests
from aiovm.vm import Vm

#: Without VM_DEAD, REPORT_TPR_ACCESS and TRIPLE_FAULT, which leave.
ORDER = (21, 24, 12, 0, 35, 15, 16, 20, 17, 36, 14)


class Recorder(Requests):
    """A request word that notes which bits were taken out of it, one after the other."""

    __slots__ = ("taken", "word")

    def __init__(self, word):
        self.taken = []
        self.word = word

    @property
    def bits(self):
        return self.word

    @bits.setter
    def bits(self, value):
        self.taken += [n for n in range(64) if self.word >> n & 1 and not value >> n & 1]
        self.word = value


def served(*numbers, tpr=None, again=0):
    """Which bits were taken in one pass, the exit, and what stands afterwards."""

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(b"\xf4", kind="flat")
            vcpu = vm.vcpus[0]
            vcpu.tpr_access = tpr
            recorder = vcpu.requests = Recorder(sum(1 << n for n in numbers))
            return vcpu.service_requests(), recorder.taken, recorder.word

    return run(main())


def test_the_whole_order():
    assert served(*sorted(ORDER)) == (None, list(ORDER), 0)


@pytest.mark.parametrize("first", range(len(ORDER) - 1))
def test_each_before_the_next(first):
    pair = ORDER[first : first + 2]
    _, taken, _ = served(*pair)
    assert [n for n in taken if n in pair][:2] == list(pair)


def test_those_that_leave_let_later_ones_stand():
    everything = [1, *ORDER, 9, 10]
    leaving, taken, left = served(*everything)
    assert isinstance(leaving, Shutdown)
    assert taken == [1]
    assert left == sum(1 << n for n in everything) & ~2
    tpr = TprAccess(0x1234, True)
    leaving, taken, left = served(*ORDER, 9, 10, tpr=tpr)
    assert leaving is tpr
    assert taken == [21, 24, 12, 0, 35, 9]
    leaving, taken, left = served(*ORDER, 10)
    assert isinstance(leaving, Shutdown)
    assert taken == [21, 24, 12, 0, 35, 10]
    assert left == 1 << 15 | 1 << 16 | 1 << 20 | 1 << 17 | 1 << 36 | 1 << 14


def test_the_clock_requests_cascade_in_one_pass():
    assert served(21)[1] == [21, 12]  # the master clock: everybody's clock
    assert served(24)[1] == [24, 12]


def test_what_nobody_serves_does_not_stand():
    assert served(2, 8, 11, 26, 27) == (None, [2, 8, 11, 26, 27], 0)


def test_an_smi_and_an_nmi_are_queued_before_events_are_chosen():
    """All three in one pass: SMM is entered in it, and the NMI waits (SDM vol. 3C, 32.3)."""

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(b"\xf4", kind="flat")
            vcpu = vm.vcpus[0]
            vcpu.events.queue_nmi()
            vcpu.requests.bits = 1 << Request.SMI | 1 << Request.NMI | 1 << Request.EVENT
            assert vcpu.service_requests() is None
            return vcpu.events.s.smm, vcpu.events.s.nmi_pending

    assert run(main()) == (True, 1)


def test_from_inside_a_slice_only_the_records_are_served():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(b"\xf4", kind="flat")
            vcpu = vm.vcpus[0]
            recorder = vcpu.requests = Recorder((1 << 37) - 1)
            vcpu.service_paravirt()
            return recorder.taken

    assert run(main()) == [21, 24, 12, 16, 36]
