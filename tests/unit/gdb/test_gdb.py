"""The GDB server's wire and commands, without GDB: what the manual says, and what nobody should send."""

import asyncio
import random
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from aiovm import guests
from aiovm.errors import ConfigError, StateError, TripleFault
from aiovm.gdb import DebugSession, GdbServer
from aiovm.gdb.packets import INTERRUPT, PacketStream, escape, frame, unescape
from aiovm.gdb.registers import DESCRIPTIONS
from aiovm.loop import Host, run
from aiovm.vm import Vm

#: inc eax; again: inc ebx; jmp again -- in real mode at 0x7C00.
LOOP = bytes.fromhex("6640 6643 ebfc")
#: mov al, 3; out 0xf4, al
END = bytes.fromhex("b003 e6f4")


class Wire:
    """A writer that remembers."""

    def __init__(self):
        self.out = b""

    def write(self, data):
        self.out += data

    async def drain(self):
        pass


async def received(data):
    reader, wire = asyncio.StreamReader(), Wire()
    reader.feed_data(data)
    reader.feed_eof()
    stream = PacketStream(reader, wire)
    packets = []
    while (packet := await stream.receive()) is not None:
        packets.append(packet)
    return packets, wire.out


# ---- the wire --------------------------------------------------------------------------------------------------


def test_a_packet_is_its_data_and_their_sum():
    assert frame(b"OK") == b"$OK#9a"
    assert frame(b"") == b"$#00"


def test_escapes():
    assert escape(b"a#b$c}d*") == b"a}\x03b}\x04c}\x5dd}\x0a"
    assert unescape(escape(bytes(range(256)))) == bytes(range(256))
    assert unescape(b"ab}") == b"ab"


def test_packets_are_acknowledged_and_noise_is_skipped():
    async def main():
        assert await received(b"+++noise$g#67$m0,1#fa") == ([b"g", b"m0,1"], b"++")
        assert await received(b"$g#68$g#67") == ([b"g"], b"-+")
        assert await received(b"\x03$?#3f") == ([INTERRUPT, b"?"], b"+")
        assert await received(b"$given up$g#67") == ([b"g"], b"+")
        assert await received(b"$never ends") == ([], b"")
        assert await received(b"$" + b"x" * 100_000 + b"#00") == ([], b"")
        assert await received(b"$g#zz") == ([], b"-")

    run(main())


def test_garbage_on_the_wire_ends_in_packets_or_nothing():
    chance = random.Random(3)

    async def main():
        for _ in range(200):
            noise = bytes(chance.choice(b"$#}+-*\x03g0a\xff") for _ in range(chance.randrange(80)))
            packets, out = await received(noise + b"#00$g#67")
            assert packets[-1] == b"g", noise
            assert out.endswith(b"+")

    run(main())


@pytest.mark.parametrize(
    ("bits", "architecture", "pc", "core"), [(64, "i386:x86-64", 16, 17 * 64 + 7 * 32), (32, "i386", 8, 16 * 32)]
)
def test_the_description_numbers_each_register_once(bits, architecture, pc, core):
    description = DESCRIPTIONS[bits]
    registers = description.registers
    assert f"<architecture>{architecture}</architecture>" in description.xml
    assert [description.xml.count(f'regnum="{n}"') for n in range(len(registers))] == [1] * len(registers)
    assert registers[pc].type == "code_ptr"
    assert sum(r.bits for r in registers[: pc + 8]) == core


# ---- the commands ----------------------------------------------------------------------------------------------


class Client:
    """Speaks the protocol by hand."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def ask(self, command):
        self.writer.write(frame(command))
        return await self.reply()

    async def reply(self):
        data = await self.reader.readuntil(b"#")
        await self.reader.readexactly(2)
        self.writer.write(b"+")
        return data[data.index(b"$") + 1 : -1]


def talk(code, dialogue, *, vcpus=1, name="image", bits=64):
    """``dialogue(client, vm)`` with a machine that stands before its first instruction; how the machine ended."""

    async def main():
        async with Vm(Host(1), vcpus=vcpus, memory=1 << 20) as vm:
            vm.load(code, name=name)
            async with GdbServer(vm, bits=bits) as server:
                running = asyncio.create_task(vm.run())
                client = Client(*await asyncio.open_connection("127.0.0.1", server.port))
                await dialogue(client, vm)
                client.writer.close()
                if not running.done():
                    vm.stop()
                return await running

    return run(main())


def test_it_waits_before_the_first_instruction():
    async def dialogue(gdb, vm):
        assert await gdb.ask(b"?") == b"T02thread:1;"
        assert vm.vcpus[0].context.state.rip == 0x7C00
        assert await gdb.ask(b"p10") == b"007c000000000000"
        registers = bytes.fromhex((await gdb.ask(b"g")).decode())
        assert len(registers) == sum(r.bits for r in DESCRIPTIONS[64].registers) // 8
        assert registers[128:136] == (0x7C00).to_bytes(8, "little")

    assert talk(LOOP, dialogue).reason == "stopped"


def test_a_step_is_one_instruction_and_time_stands_still_between():
    async def dialogue(gdb, vm):
        before = vm.clock.now()
        assert await gdb.ask(b"vCont;s:1") == b"T05thread:1;"
        assert vm.vcpus[0].context.state.rip == 0x7C02
        stepped = vm.clock.now()
        assert before < stepped < before + 10_000
        assert await gdb.ask(b"s") == b"T05thread:1;"
        assert await gdb.ask(b"p0") == b"0100000000000000"
        assert await gdb.ask(b"p1") == b"0100000000000000"

    talk(LOOP, dialogue)


def test_breakpoints_stop_and_cannot_be_seen():
    async def dialogue(gdb, vm):
        assert await gdb.ask(b"Z0,7c04,1") == b"OK"
        assert vm.memory.read(0x7C04, 1) == b"\xcc"
        assert await gdb.ask(b"m7c02,4") == b"6643ebfc"
        assert await gdb.ask(b"c") == b"T05thread:1;swbreak:;"
        assert vm.vcpus[0].context.state.rip == 0x7C04
        assert await gdb.ask(b"M7c04,2:ebfa") == b"OK"
        assert vm.memory.read(0x7C04, 2) == b"\xcc\xfa"
        assert await gdb.ask(b"z0,7c04,1") == b"OK"
        assert vm.memory.read(0x7C04, 2) == b"\xeb\xfa"
        assert await gdb.ask(b"z0,7c04,1") == b"E0e"
        assert await gdb.ask(b"Z1,7c02,1") == b"OK"
        assert await gdb.ask(b"c") == b"T05thread:1;hwbreak:;"
        assert await gdb.ask(b"z1,7c02,1") == b"OK"

    talk(LOOP, dialogue)


def test_watchpoints():
    # mov [0x600], ax; nop; mov bx, [0x600]; nop; end
    code = bytes.fromhex("a30006 90 8b1e0006 90") + END

    async def dialogue(gdb, vm):
        assert await gdb.ask(b"Z2,600,2") == b"OK"
        assert await gdb.ask(b"c") == b"T05thread:1;watch:600;"
        assert vm.vcpus[0].context.state.rip == 0x7C03
        assert await gdb.ask(b"z2,600,2") == b"OK"
        assert await gdb.ask(b"Z4,600,1") == b"OK"
        assert await gdb.ask(b"c") == b"T05thread:1;awatch:600;"
        assert vm.vcpus[0].context.state.rip == 0x7C08
        assert await gdb.ask(b"Z2,601,2") == b"E16", "not aligned"
        assert await gdb.ask(b"Z2,600,3") == b"E16"
        for address in (b"700", b"702", b"704"):
            assert await gdb.ask(b"Z2," + address + b",2") == b"OK"
        assert await gdb.ask(b"Z2,706,2") == b"E16", "there are four"

    talk(code, dialogue)


def test_an_int3_of_the_guests_own_is_the_guests():
    # IVT[3] = 0:0x7c10; int3; at 0x7c10: end
    code = bytes.fromhex("c7060c00107c c7060e000000 cc ebfe").ljust(0x10, b"\x90") + END

    async def dialogue(gdb, _vm):
        assert await gdb.ask(b"Z0,500,1") == b"OK"  # so that INT3 leaves
        assert await gdb.ask(b"c") == b"W07"

    assert talk(code, dialogue).status == 7


def test_ctrl_c_stops_a_guest_that_runs():
    async def dialogue(gdb, vm):
        gdb.writer.write(frame(b"c"))
        await asyncio.to_thread(time.sleep, 0.3)
        assert vm.clock.now() > 1_000_000, "it runs"
        gdb.writer.write(INTERRUPT)
        assert await gdb.reply() == b"T02thread:1;"
        assert vm.vcpus[0].context.state.rip in (0x7C00, 0x7C02, 0x7C04)

    talk(LOOP, dialogue)


def test_the_end_is_told():
    async def dialogue(gdb, _vm):
        assert await gdb.ask(b"vCont;c") == b"W07"

    assert talk(END, dialogue).status == 7


def test_a_breakpoint_goes_from_where_it_was_put_whatever_the_page_tables_say_now():
    async def dialogue(gdb, vm):
        vcpu = vm.vcpus[0]
        assert await gdb.ask(b"Z0,7c04,1") == b"OK"
        assert vm.memory.read(0x7C04, 1) == b"\xcc"
        before = vcpu.get_sregs()
        vcpu.set_sregs(replace(before, cr0=before.cr0 | 0x8000_0001, cr3=0x1_0000))  # an empty page directory
        assert await gdb.ask(b"m7c04,1") == b"E0e"
        assert await gdb.ask(b"z0,7c04,1") == b"OK"
        assert vm.memory.read(0x7C00, 6) == LOOP
        assert await gdb.ask(b"z0,7c04,1") == b"E0e", "once"
        vcpu.set_sregs(before)

    talk(LOOP, dialogue)


def test_a_triple_fault_is_told_as_a_signal():
    no_idt = bytes.fromhex("0f011e107c cc").ljust(0x10, b"\x90") + bytes(6)  # lidt [0x7c10]: no limit; int3

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(no_idt)
            with suppress(TripleFault):
                async with GdbServer(vm) as server:
                    running = asyncio.create_task(vm.run())
                    client = Client(*await asyncio.open_connection("127.0.0.1", server.port))
                    client.writer.write(frame(b"c"))
                    await running
            assert await client.reply() == b"X0b"
            client.writer.close()

    run(main())


def test_registers_are_written():
    async def dialogue(gdb, vm):
        assert await gdb.ask(b"P1=efbeadde00000000") == b"OK"
        assert vm.vcpus[0].context.state.gpr[3] == 0xDEADBEEF
        assert await gdb.ask(b"P11=46020000") == b"OK"
        assert vm.vcpus[0].context.state.rflags == 0x246
        assert await gdb.ask(b"P10=027c000000000000") == b"OK"
        assert vm.vcpus[0].context.state.rip == 0x7C02
        xmm3 = next(n for n, r in enumerate(DESCRIPTIONS[64].registers) if r.name == "xmm3")
        assert await gdb.ask(b"P%x=%s" % (xmm3, b"0123456789abcdef" * 2)) == b"OK"
        assert vm.vcpus[0].get_fpu().xmm[3] == bytes.fromhex("0123456789abcdef" * 2)
        assert await gdb.ask(b"P12=08000000") == b"E16", "a selector alone"
        everything = await gdb.ask(b"g")
        assert await gdb.ask(b"G" + everything) == b"OK"
        assert await gdb.ask(b"g") == everything

    talk(LOOP, dialogue)


def test_an_i386_has_registers_of_32_bits():
    async def dialogue(gdb, vm):
        state = vm.vcpus[0].context.state
        assert b"<architecture>i386</architecture>" in await gdb.ask(b"qXfer:features:read:target.xml:0,100")
        assert await gdb.ask(b"p8") == b"007c0000", "EIP"
        assert await gdb.ask(b"P1=efbeadde") == b"OK", "ECX"
        assert state.gpr[1] == 0xDEADBEEF
        assert await gdb.ask(b"P3=0100000000000000") == b"E16", "EBX, of 64 bits"
        state.gpr[3] = 0x1_0000_0002
        assert await gdb.ask(b"p3") == b"02000000"
        assert await gdb.ask(b"P3=05000000") == b"OK"
        assert state.gpr[3] == 5
        everything = await gdb.ask(b"g")
        assert len(everything) == 2 * sum(r.bits for r in DESCRIPTIONS[32].registers) // 8
        assert everything[:64] == b"".join(
            vm.vcpus[0].context.state.gpr[n].to_bytes(4, "little").hex().encode() for n in range(8)
        )
        assert await gdb.ask(b"G" + everything) == b"OK"
        assert await gdb.ask(b"g") == everything

    talk(LOOP, dialogue, bits=32)


def test_registers_have_32_or_64_bits():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            with pytest.raises(ConfigError, match="32 or 64 bits, not 16"):
                GdbServer(vm, bits=16)

    run(main())


def test_every_vcpu_is_a_thread():
    async def dialogue(gdb, vm):
        assert await gdb.ask(b"qfThreadInfo") == b"m1,2,3"
        assert await gdb.ask(b"qsThreadInfo") == b"l"
        assert await gdb.ask(b"Hg3") == b"OK"
        assert await gdb.ask(b"p10") == b"f0ff000000000000"
        assert await gdb.ask(b"Hg4") == b"E16"
        assert await gdb.ask(b"T2") == b"OK"
        assert await gdb.ask(b"T9") == b"E16"
        assert b"uninitialized" in bytes.fromhex((await gdb.ask(b"qThreadExtraInfo,3")).decode())
        info = bytes.fromhex((await gdb.ask(b"qRcmd," + b"info".hex().encode())).decode()).decode()
        assert info.count("vCPU") == 3
        assert info.splitlines()[-1].startswith("at ")

    talk(LOOP, dialogue, vcpus=3)


@pytest.mark.parametrize(
    "command",
    [b"m", b"m1", b"mx,1", b"m-1,4", b"m0,ffffffffffff", b"M0,2:0", b"M0,1:zz", b"X0,5:ab", b"Z0", b"Z0,,", b"Z9,0,1",
     b"z2,0,8", b"p", b"pzz", b"p999", b"P", b"P0", b"P0=1", b"P999=00", b"Gxyz", b"H", b"Hgzz", b"T", b"q", b"qXfer:x",
     b"qXfer:features:read:target.xml:zz,1", b"qRcmd,zz", b"vCont;", b"vMustReplyEmpty", b"vCont;s:9", b"!",
     b"\xff\xfe", b"qThreadExtraInfo", b"qThreadExtraInfo,99", b"", b"b", b"R00"],
)  # fmt: skip
def test_nothing_that_is_sent_raises(command):
    async def dialogue(gdb, _vm):
        answer = await gdb.ask(escape(command))
        assert answer[:1] in (b"", b"E", b"O", b"0", b"l", b"m") or answer.hex()
        assert (await gdb.ask(b"?"))[:1] == b"T"

    talk(LOOP, dialogue)


def test_memory_that_is_not_there():
    async def dialogue(gdb, _vm):
        assert await gdb.ask(b"mfffffff0,4") == b"E0e"
        assert await gdb.ask(b"Mfffffff0,1:00") == b"E0e"
        assert await gdb.ask(b"Zfffffff0,1,1") == b""
        assert await gdb.ask(b"Z0,fffffff0,1") == b"E0e"
        assert len(await gdb.ask(b"mffff0,20")) == 32, "as far as it goes"

    talk(LOOP, dialogue)


def test_who_detaches_leaves_nothing_behind_and_another_may_come():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(LOOP)
            async with GdbServer(vm) as server:
                running = asyncio.create_task(vm.run())
                first = Client(*await asyncio.open_connection("127.0.0.1", server.port))
                assert await first.ask(b"Z0,7c04,1") == b"OK"
                assert await first.ask(b"D") == b"OK"
                with suppress(ConnectionResetError):  # of the acknowledgement that nobody read any more
                    assert await first.reader.read() == b""
                assert vm.memory.read(0x7C00, 6) == LOOP
                second = Client(*await asyncio.open_connection("127.0.0.1", server.port))
                assert await second.ask(b"?") == b"T02thread:1;"
                second.writer.close()
                await asyncio.sleep(0.001)
                vm.stop()
                assert (await running).reason == "stopped"

    run(main())


def test_a_debugger_changes_nothing_that_the_guest_sees():
    """ticks.elf prints its times; with a debugger that only lets it go they are the same."""

    def output(debugged):
        said = bytearray()

        async def main():
            async with Vm(Host(1), memory=16 << 20, console=said.extend) as vm:
                vm.load(guests.path("ticks").read_bytes(), cmdline="mode=deadline n=3 period=2000")
                if debugged:
                    session = DebugSession(vm)
                    task = asyncio.create_task(vm.run())
                    await asyncio.sleep(0)
                    await asyncio.wait([asyncio.create_task(go(session)), task], return_when=asyncio.ALL_COMPLETED)
                else:
                    await vm.run()

        async def go(session):
            await session.wait_stopped()
            session.resume()

        run(main())
        return said.decode().splitlines()

    assert [line.split()[:2] for line in output(True)] == [line.split()[:2] for line in output(False)]


def test_mistakes_of_the_program():
    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        vm.load(LOOP)
        DebugSession(vm)
        with pytest.raises(StateError, match="has a debugger already"):
            DebugSession(vm)
        with pytest.raises(ConfigError, match="port 70000"):
            GdbServer(vm, 70_000)
        vm.close()

    run(main())
