"""The core's TLB, whose size a guest with stale entries can see: it follows the guest alone."""

import time

import pytest
from bare import bare

from aiovm.engine.unicorn.budget import NATIVE, _TlbTable
from aiovm.engine.unicorn.layout import CPU_TLB, MMU_MODES


class _Sleeper:
    def __init__(self, seconds):
        self._seconds = seconds

    def read(self, offset, size, now):
        return 0

    def write(self, offset, size, value, now):
        time.sleep(self._seconds)


def sizes_after(seconds, flushes=3):
    """The tables' masks after a guest used 768 pages, waited so long on the host's clock, and flushed so often."""
    # mov ecx, 768; mov esi, 0x100000; 1: mov al, [rsi]; add esi, 4096; loop 1b; mov rax, cr3; mov cr3, rax
    code = "b900030000be000010008a0681c600100000e2f60f20d80f22d8"
    # out 0x80, al; mov ecx, flushes; 1: mov cr3, rax; loop 1b; out 0xf4, al
    code += "e680" + "b9" + flushes.to_bytes(4, "little").hex() + "0f22d8" + "e2fb" + "e6f4"

    def look(vm):
        assert vm.engine.budget.struct.cpu
        tables = (_TlbTable * MMU_MODES).from_address(vm.engine.budget.struct.cpu + CPU_TLB)
        return [table.mask for table in tables]

    return bare(code, setup=lambda vm: vm.ports.register(0x80, 1, _Sleeper(seconds)), look=look).extra


@pytest.mark.skipif(not NATIVE, reason="the C hook was not built")
def test_the_hosts_clock_is_not_in_it():
    at_once = sizes_after(0)
    assert max(at_once) > 0x3FC0  # it has grown from 256 entries
    assert sizes_after(0.12) == at_once


@pytest.mark.skipif(not NATIVE, reason="the C hook was not built")
def test_a_table_that_has_become_too_large_shrinks_with_the_guests_flushes():
    """Each flush writes the whole table; the core's own window is a tenth of a second, ours 256 flushes."""
    assert max(sizes_after(0, flushes=200)) == max(sizes_after(0.12, flushes=200)) > 0x3FC0
    assert max(sizes_after(0, flushes=600)) == max(sizes_after(0.12, flushes=600)) <= 0x3FC0
