"""Ports and registers that the embedding program answers: KVM_RUN's exits, and the run that finishes them."""

import asyncio

import pytest
from bare import CODE, DATA, END, TABLES, prepare

from aiovm.errors import ConfigError, StateError, UnhandledExit
from aiovm.exits import ExitReason, Interrupted, Mmio, Pio, SystemEvent
from aiovm.loop import Host, run, run_wall
from aiovm.memory import SlotFlags
from aiovm.vm import Vm

PAGE = 0xD000_0000
#: Where long mode maps PAGE.
MAPPED = 0x3FE0_0000


def machine(code, mode="long", *, regs=None, cpl=0, **options):
    vm = Vm(Host(1), memory=4 << 20, **options)
    vm.load(b"\xf4", kind="flat")
    vm.memory.write(CODE, bytes.fromhex(code))
    prepare(vm, mode, cpl)
    if mode == "long":
        vm.memory.write_u(TABLES + 0x2000 + 8 * 511, 8, PAGE | 0x87)
    for register, value in (regs or {}).items():
        vm.vcpus[0].context.state.gpr[register] = value
    return vm, vm.vcpus[0]


def drive(code, answers, *, mmio=((PAGE, 0x3000),), ports=((0x300, 8),), look=lambda vm: None, setup=None, **options):
    """Run ``code`` as a program that calls ``Vcpu.run`` by itself; the exits, and what ``look`` sees at the end."""

    async def main():
        vm, vcpu = machine(code, **options)
        for base, length in mmio:
            vm.claim_mmio(base, length)
        for base, length in ports:
            vm.claim_ports(base, length)
        if setup is not None:
            setup(vm)
        exits, left = [], list(answers)
        while True:
            exit_ = await vcpu.run()
            assert vcpu.kvm_run.exit is exit_
            if isinstance(exit_, SystemEvent):
                break
            exits.append(exit_)
            if not exit_.is_write:
                vcpu.kvm_run.data = left.pop(0)
        assert not left
        seen = look(vm)
        vm.close()
        return exits, seen

    return run(main())


def gpr(index):
    return lambda vm: vm.vcpus[0].context.state.gpr[index]


@pytest.fixture(params=[True, False], ids=["pointers", "public"])
def pointers(request):
    return request.param


# ---- ports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "data", "rax"),
    [
        ("ec", 1, b"\x7f", 0x1122_3344_5566_777F),
        ("66ed", 2, b"\x7f\x80", 0x1122_3344_5566_807F),
        ("ed", 4, b"\x7f\x80\x81\x82", 0x8281_807F),
    ],
)
def test_in_gets_its_data_at_the_next_run(code, size, data, rax, pointers):
    exits, found = drive(
        code + "4889c3" + END, [data], regs={0: 0x1122_3344_5566_7788, 2: 0x304}, look=gpr(3), pointers=pointers
    )
    assert exits == [Pio(0x304, size, False, bytes(size))]
    assert found == rax


def test_out_leaves_with_its_bytes_behind_the_instruction():
    seen = []

    async def main():
        vm, vcpu = machine("66ef" + END, regs={0: 0xAABB, 2: 0x302})
        vm.claim_ports(0x300, 8)
        assert await vcpu.run() == Pio(0x302, 2, True, b"\xbb\xaa")
        seen.append((vcpu.context.state.rip, vcpu.kvm_run.exit_reason))
        vm.close()

    run(main())
    assert seen == [(CODE + 2, ExitReason.IO)]


def test_string_input_leaves_for_each_element(pointers):
    # rep insw
    exits, memory = drive(
        "f366 6d" + END,
        [b"ab", b"cd", b"ef"],
        regs={1: 3, 2: 0x300, 7: DATA},
        look=lambda vm: (vm.memory.read(DATA, 8), gpr(7)(vm), gpr(1)(vm)),
        pointers=pointers,
    )
    assert exits == [Pio(0x300, 2, False, b"\0\0")] * 3
    assert memory == (b"abcdef\0\0", DATA + 6, 0)


def test_string_output_leaves_for_each_element():
    exits, _ = drive("f3 6e" + END, [], regs={1: 3, 2: 0x300, 6: DATA}, setup=lambda vm: vm.memory.write(DATA, b"xyz"))
    assert exits == [Pio(0x300, 1, True, bytes((byte,))) for byte in b"xyz"]


# ---- memory-mapped loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "data", "rax"),
    [
        ("8a07", 1, b"\x90", 0x1190),
        ("668b07", 2, b"\x90\x91", 0x9190),
        ("8b07", 4, b"\x90\x91\x92\x93", 0x9392_9190),
        ("488b07", 8, bytes(range(0x90, 0x98)), 0x9796_9594_9392_9190),
        ("0fbe07", 1, b"\xff", 0xFFFF_FFFF),
    ],
)
def test_a_load_waits_and_happens_once(code, size, data, rax, pointers):
    # inc rbx before and after: had the block been executed again, rbx would tell.
    exits, found = drive(
        "48ffc3" + code + "48ffc3 4889c1" + END,
        [data],
        regs={0: 0x1111, 7: MAPPED + 0x10, 3: 0},
        look=lambda vm: (gpr(1)(vm), gpr(3)(vm)),
        pointers=pointers,
    )
    assert exits == [Mmio(PAGE + 0x10, size, False, bytes(size))]
    assert found == (rax, 2)


def test_until_the_data_are_there_nothing_has_happened():
    async def main():
        vm, vcpu = machine("48ffc3 8b07" + END, regs={0: 5, 3: 0, 7: MAPPED})
        vm.claim_mmio(PAGE, 0x1000)
        assert await vcpu.run() == Mmio(PAGE, 4, False, bytes(4))
        state = vcpu.context.state
        assert (state.rip, state.gpr[0], state.gpr[3]) == (CODE + 3, 5, 1)
        assert vcpu.mmio.needed
        assert not vcpu.mmio.is_write
        assert not vcpu.mmio.read_completed
        with pytest.raises(StateError, match=r"wants 4 bytes in kvm_run\.data, there are none"):
            await vcpu.run()
        vcpu.kvm_run.data = b"abc"
        with pytest.raises(StateError, match=r"wants 4 bytes in kvm_run\.data, there are 3"):
            await vcpu.run()
        vcpu.kvm_run.data = b"abcd"
        vcpu.immediate_exit = True
        assert await vcpu.run() == Interrupted()  # finished all the same
        assert (state.rip, state.gpr[0]) == (CODE + 5, 0x6463_6261)
        assert (vcpu.mmio.needed, vcpu.mmio.read_completed) == (False, True)
        vm.close()

    run(main())


def test_a_load_across_a_page_has_two_fragments():
    def look(vm):
        mmio = vm.vcpus[0].mmio
        return gpr(0)(vm), mmio.nr_fragments, mmio.cur_fragment, [(f.gpa, f.len, f.data) for f in mmio.fragments]

    exits, found = drive("488b07" + END, [b"abc", b"defgh"], regs={7: MAPPED + 0xFFD}, look=look)
    assert exits == [Mmio(PAGE + 0xFFD, 3, False, bytes(3)), Mmio(PAGE + 0x1000, 5, False, bytes(5))]
    assert found == (
        int.from_bytes(b"abcdefgh", "little"), 2, 2, [(PAGE + 0xFFD, 3, b"abc"), (PAGE + 0x1000, 5, b"defgh")]
    )  # fmt: skip


def test_sixteen_bytes_are_two_loads():
    # movups xmm0, [rdi]; movq rax, xmm0; psrldq xmm0, 8; movq rbx, xmm0
    exits, found = drive(
        "0f1007 66480f7ec0 660f73d808 66480f7ec3" + END,
        [b"abcdefgh", b"ijklmnop"],
        regs={7: MAPPED + 8},
        look=lambda vm: (gpr(0)(vm), gpr(3)(vm)),
    )
    assert exits == [Mmio(PAGE + 8, 8, False, bytes(8)), Mmio(PAGE + 16, 8, False, bytes(8))]
    assert [n.to_bytes(8, "little") for n in found] == [b"abcdefgh", b"ijklmnop"]


def test_the_same_place_read_twice_is_asked_twice():
    exits, found = drive("8b07 8b1f" + END, [b"abcd", b"efgh"], regs={7: MAPPED}, look=gpr(3))
    assert len(exits) == 2
    assert found == int.from_bytes(b"efgh", "little")


def test_both_operands_of_cmps():
    # cmpsb; setz bl
    exits, found = drive("a6 0f94c3" + END, [b"x", b"x"], regs={3: 0, 6: MAPPED, 7: MAPPED + 0x20}, look=gpr(3))
    assert sorted(exit_.gpa for exit_ in exits) == [PAGE, PAGE + 0x20]
    assert found == 1


def test_a_string_copy_leaves_for_each_element():
    exits, found = drive(
        "f3a4" + END,
        [b"q", b"r", b"s"],
        regs={1: 3, 6: MAPPED, 7: DATA},
        look=lambda vm: (vm.memory.read(DATA, 4), gpr(1)(vm)),
    )
    assert [exit_.gpa for exit_ in exits] == [PAGE, PAGE + 1, PAGE + 2]
    assert found == (b"qrs\0", 0)


# ---- stores ----------------------------------------------------------------------------------------------------


def test_stores_leave_in_order_with_their_bytes(pointers):
    # mov [rdi], eax; mov [rdi+4], bx; mov [rdi+8], rcx
    exits, _ = drive(
        "8907 66895f04 48894f08" + END, [], regs={0: 0x11223344, 3: 0x5566, 1: 0x0102_0304_0506_0708, 7: MAPPED},
        pointers=pointers,
    )  # fmt: skip
    assert exits == [
        Mmio(PAGE, 4, True, b"\x44\x33\x22\x11"),
        Mmio(PAGE + 4, 2, True, b"\x66\x55"),
        Mmio(PAGE + 8, 4, True, b"\x08\x07\x06\x05"),
        Mmio(PAGE + 12, 4, True, b"\x04\x03\x02\x01"),
    ]


def test_a_load_comes_after_the_stores_before_it():
    exits, found = drive("8907 8b5f08" + END, [b"done"], regs={0: 1, 7: MAPPED}, look=gpr(3))
    assert exits == [Mmio(PAGE, 4, True, b"\1\0\0\0"), Mmio(PAGE + 8, 4, False, bytes(4))]
    assert found == int.from_bytes(b"done", "little")


def test_read_modify_write_is_a_load_and_a_store():
    exits, _ = drive("ff07" + END, [b"\xff\0\0\0"], regs={7: MAPPED})
    assert exits == [Mmio(PAGE, 4, False, bytes(4)), Mmio(PAGE, 4, True, b"\0\1\0\0")]


def test_stores_are_told_in_kvms_fields():
    async def main():
        vm, vcpu = machine("8907 8907" + END, regs={0: 7, 7: MAPPED})
        vm.claim_mmio(PAGE, 0x1000)
        exit_ = await vcpu.run()
        assert (vcpu.mmio.needed, vcpu.mmio.is_write, vcpu.mmio.nr_fragments) == (True, True, 1)
        assert vcpu.mmio.fragments[0].data == exit_.data == b"\7\0\0\0"
        assert vcpu.kvm_run.exit_reason == ExitReason.MMIO
        await vcpu.run()
        await vcpu.run()
        assert not vcpu.mmio.needed
        vm.close()

    run(main())


# ---- what surrounds them ---------------------------------------------------------------------------------------


def test_the_rest_of_a_claimed_page_is_answered_in_place():
    class Clock:
        def read(self, offset, size, now):
            return 0x42 + offset

        def write(self, offset, size, value, now):
            raise AssertionError

    exits, found = drive(
        "8b07 8b5f20" + END,
        [b"abcd"],
        regs={7: MAPPED},
        mmio=((PAGE, 0x10),),
        setup=lambda vm: vm.mmio.register(PAGE + 0x20, 4, Clock()),
        look=gpr(3),
    )
    assert len(exits) == 1
    assert found == 0x42


def test_a_fault_of_the_other_operand_is_the_guests():
    # push qword [rdi] with RSP at a page that is not there: #PF behind the load, and RFLAGS as they were.
    def setup(vm):
        vm.memory.write_u(TABLES + 0x2000 + 8 * 510, 8, 0)
        vm.vcpus[0].context.state.gpr[4] = 0x3FD0_0000

    async def main():
        vm, vcpu = machine("ff37" + END, regs={7: MAPPED}, cpl=3)
        vm.claim_mmio(PAGE, 0x1000)
        setup(vm)
        assert await vcpu.run() == Mmio(PAGE, 8, False, bytes(8))
        vcpu.kvm_run.data = bytes(8)
        exit_ = await vcpu.run()
        assert exit_ == SystemEvent("debug-exit", 14 << 1 | 1)
        frame = vm.memory.read(vcpu.context.state.gpr[4], 48)
        assert int.from_bytes(frame[24:32], "little") & 0x100 == 0
        vm.close()

    run(main())


def test_a_single_step_of_the_guest_follows_the_finished_load():
    async def main():
        vm, vcpu = machine("8b07 90" + END, regs={7: MAPPED})
        vm.claim_mmio(PAGE, 0x1000)
        vcpu.context.state.rflags = 0x102
        assert await vcpu.run() == Mmio(PAGE, 4, False, bytes(4))
        vcpu.kvm_run.data = bytes(4)
        assert await vcpu.run() == SystemEvent("debug-exit", 1 << 1 | 1)
        assert vcpu.context.state.get_dr(6) & 0x4000
        vm.close()

    run(main())


def test_an_interrupt_waits_until_the_load_is_done():
    async def main():
        vm, vcpu = machine("8b07 90 90" + END, regs={7: MAPPED})
        vm.claim_mmio(PAGE, 0x1000)
        assert await vcpu.run() == Mmio(PAGE, 4, False, bytes(4))
        vcpu.inject_nmi()
        vcpu.kvm_run.data = b"\1\0\0\0"
        assert await vcpu.run() == SystemEvent("debug-exit", 2 << 1 | 1)
        frame = vm.memory.read(vcpu.context.state.gpr[4], 8)
        assert int.from_bytes(frame, "little") == CODE + 2, "behind the load"
        vm.close()

    run(main())


def test_claims_are_checked():
    async def main():
        vm, _ = machine(END)
        with pytest.raises(ConfigError, match="lies in memory"):
            vm.claim_mmio(0x10_0000, 0x1000)
        with pytest.raises(ConfigError, match="overlaps"):
            vm.claim_ports(0xF0, 8)
        vm.claim_mmio(PAGE, 0x1000)
        with pytest.raises(ConfigError, match="overlaps"):
            vm.claim_mmio(PAGE + 0xFFF, 2)
        vm.memory.set_region(9, 0xE000_0000, 0x1000, flags=SlotFlags.NONE)
        vm.close()

    run(main())


# ---- handlers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", [run, run_wall], ids=["virtual", "wall"])
def test_a_handler_may_wait_while_others_run(runner):
    """A device whose register takes 3 ms to read, in a coroutine."""
    log = []

    async def device(exit_):
        log.append(exit_)
        if exit_.is_write:
            return None
        await asyncio.sleep(0.003)
        return (0x1234_5678).to_bytes(4, "little")[: exit_.size]

    async def main():
        vm, vcpu = machine("8b07 894704 e4 01" + END, regs={7: MAPPED})
        async with vm:
            vm.claim_mmio(PAGE, 0x1000, device)
            vm.claim_ports(1, 1, device)
            began = vm.clock.now()
            outcome = await vm.run()
            return outcome.status, vm.clock.now() - began, vcpu.context.state.gpr[0]

    status, took, rax = runner(main())
    assert status == (0x78 << 1 | 1) & 0xFF
    assert took >= 6_000_000
    assert rax == 0x1234_5678
    assert log == [
        Mmio(PAGE, 4, False, bytes(4)), Mmio(PAGE + 4, 4, True, b"\x78\x56\x34\x12"), Pio(1, 1, False, b"\0")
    ]  # fmt: skip


def test_nobody_answers():
    async def main():
        vm, _ = machine("8b07" + END, regs={7: MAPPED})
        async with vm:
            vm.claim_mmio(PAGE, 0x1000)
            with pytest.raises(UnhandledExit, match=r"nobody answers Mmio\(gpa=3489660928, size=4"):
                await vm.run()

    run(main())


@pytest.mark.parametrize(("answer", "given"), [("x", "none but 'x'"), (5, "none but 5"), (b"12", "there are 2")])
def test_an_answer_that_is_no_bytes_is_the_programs_error(answer, given):
    async def handler(exit_):
        return answer

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.claim_ports(0x300, 1, handler)
            vm.load(bytes.fromhex("ba0003 ec"))  # mov dx, 0x300; in al, dx
            with pytest.raises(StateError, match=given):
                await vm.run()

    run(main())


def test_a_handler_can_be_called():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            with pytest.raises(ConfigError, match="handler of 0x300: 5 cannot be called"):
                vm.claim_ports(0x300, 1, 5)
            assert vm.ports.find(0x300, 1) is None

    run(main())
