"""Ports and memory-mapped registers that the embedding program answers: ``kvm_vcpu``'s ``mmio_*`` and PIO.

A :class:`UserRange` on a bus is a place whose accesses leave: ``Vcpu.run`` returns :class:`~aiovm.exits.Pio` or
:class:`~aiovm.exits.Mmio`. A store is done by then. A load is not: the program puts its bytes into ``kvm_run.data`` and
calls ``run`` again, which finishes the instruction first (``complete_userspace_io``).

Rules (``arch/x86/kvm/x86.c``; Linux 6.16):

* One exit a fragment: at most 8 bytes, within one page. A load across a page has two fragments, a load of 16 bytes is
  two loads.
* Stores of one basic block are posted and leave one after the other, in order, before the next load is looked at.
* String instructions leave for each element.
* No event is delivered between a load that left and its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Reg
from aiovm.errors import ConfigError, StateError
from aiovm.exits import Exit, Mmio, Pio
from aiovm.memory import PAGE
from aiovm.mmu import write_virt
from aiovm.page_walk import PagingRegs

if TYPE_CHECKING:
    from aiovm.vcpu import Vcpu

__all__ = ["MmioFragment", "UserHandler", "UserIo", "UserRange", "within_page"]

#: Answers an exit: the bytes of a load or IN; what it returns for a store or OUT is not looked at.
UserHandler = Callable[[Pio | Mmio], Awaitable[bytes | None]]
_EAX: Final = 4


def within_page(gpa: int, size: int) -> int:
    """How many of ``size`` bytes from ``gpa`` on lie in its page."""
    return min(size, PAGE - gpa % PAGE)


@dataclass(slots=True)
class MmioFragment:
    """``kvm_mmio_fragment``: a piece of an access within one page; ``data`` once it is known."""

    gpa: int
    len: int
    data: bytes = b""


@dataclass(slots=True)
class UserIo:
    """What a vCPU waits for from the program; KVM's names without their ``mmio_``."""

    needed: bool = False
    read_completed: bool = False
    is_write: bool = False
    cur_fragment: int = 0
    nr_fragments: int = 0
    fragments: list[MmioFragment] = field(default_factory=list)
    #: Bytes of the present load that lie on the next page, whose place is not known yet.
    rest: int = 0
    #: Stores that have happened and have not left yet.
    posted: deque[Mmio] = field(default_factory=deque)
    #: Why the slice ended with them, if it was something else.
    deferred: Exit | None = None
    #: The IN that waits for its data.
    port_read: Pio | None = None

    @property
    def pending(self) -> bool:
        """Whether ``Vcpu.run`` owes something before the guest goes on."""
        return self.needed or self.port_read is not None or bool(self.posted) or self.deferred is not None

    def begin_read(self, gpa: int, size: int) -> Mmio:
        """A load, ``size`` bytes from ``gpa`` on, that has not happened."""
        near = within_page(gpa, size)
        self.rest = size - near
        self.fragments = [MmioFragment(gpa, near)]
        self.cur_fragment, self.nr_fragments = 0, 2 if self.rest else 1
        self.needed, self.is_write, self.read_completed = True, False, False
        return Mmio(gpa, near, False, bytes(near))

    def _next_read(self, gpa: int, size: int) -> Mmio:
        """Its next fragment, or the next load of the same instruction."""
        if not self.rest:
            return self.begin_read(gpa, size)
        size, self.rest = self.rest, 0
        self.fragments.append(MmioFragment(gpa, size))
        return Mmio(gpa, size, False, bytes(size))

    def _begin_write(self, exit_: Mmio) -> Mmio:
        self.fragments = [MmioFragment(exit_.gpa, exit_.size, exit_.data)]
        self.cur_fragment, self.nr_fragments = 0, 1
        self.needed, self.is_write, self.read_completed = True, True, False
        return exit_

    def leaving(self, exit_: Exit) -> Exit:
        """The run loop leaves with ``exit_``, and stores that came before it leave first."""
        if self.posted:
            if not isinstance(exit_, Mmio):
                self.deferred = exit_
            return self._begin_write(self.posted.popleft())
        return self._owe(exit_)

    def _owe(self, exit_: Exit) -> Exit:
        if isinstance(exit_, Pio) and not exit_.is_write:
            self.port_read = exit_
        return exit_

    def resume(self, vcpu: Vcpu) -> Exit | None:
        """``complete_userspace_io``: finish what the last exit was about; the next exit when more is owed."""
        if self.port_read is not None:
            self._finish_in(vcpu, self.port_read)
            self.port_read = None
        elif self.needed and self.is_write:
            self.needed = False
            self.cur_fragment = self.nr_fragments
        elif self.needed:
            missing = self._finish_read(vcpu)
            if missing is not None:
                return self._next_read(*missing)
        if self.posted:
            return self._begin_write(self.posted.popleft())
        deferred, self.deferred = self.deferred, None
        return None if deferred is None else self._owe(deferred)

    def _finish_read(self, vcpu: Vcpu) -> tuple[int, int] | None:
        fragment = self.fragments[self.cur_fragment]
        fragment.data = _answer(vcpu, fragment.len)
        self.cur_fragment += 1
        missing = vcpu.context.finish_read({fragment.gpa + at: byte for at, byte in enumerate(fragment.data)})
        self.needed = missing is not None
        self.read_completed = missing is None
        return missing

    def _finish_in(self, vcpu: Vcpu, exit_: Pio) -> None:
        """Into AL, AX or EAX, or where INS points."""
        data = _answer(vcpu, exit_.size)
        state = vcpu.context.state
        address = vcpu.context.ins_address
        if address is not None:
            write_virt(vcpu.vm.memory, PagingRegs.of(state), address, data)
            return
        value = int.from_bytes(data, "little")
        keep = 0 if exit_.size == _EAX else ~((1 << 8 * exit_.size) - 1)
        state.gpr[Reg.RAX] = state.gpr[Reg.RAX] & keep | value


def _answer(vcpu: Vcpu, size: int) -> bytes:
    data, vcpu.kvm_run.data = vcpu.kvm_run.data, None
    if not isinstance(data, bytes | bytearray | memoryview) or len(data) != size:
        given = f"{len(data)}" if isinstance(data, bytes | bytearray | memoryview) else f"none but {data!r}"
        raise StateError(
            f"vCPU {vcpu.index}: {vcpu.kvm_run.exit} wants {size} bytes in kvm_run.data, there are {given}"
        )
    return data


class UserRange:
    """A range on a bus whose accesses leave: ``leave`` is called from inside a slice with the exit.

    ``handler``: what :meth:`aiovm.vm.Vm.run` awaits for the answer; None for a program that calls ``Vcpu.run`` itself.
    """

    def __init__(
        self, base: int, *, ports: bool, leave: Callable[[Pio | Mmio], None], handler: UserHandler | None
    ) -> None:
        if handler is not None and not callable(handler):
            raise ConfigError(f"the handler of {base:#x}: {handler!r} cannot be called")
        self._base = base
        self._ports = ports
        self._leave = leave
        self.handler = handler

    def read(self, offset: int, size: int, now: int) -> int:
        """A port's; loads from memory leave before they get here."""
        if self._ports:
            self._leave(Pio(self._base + offset, size, False, bytes(size)))
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """Leaves with the bytes."""
        data = value.to_bytes(size, "little")
        address = self._base + offset
        self._leave(Pio(address, size, True, data) if self._ports else Mmio(address, size, True, data))
