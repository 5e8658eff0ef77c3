"""GDB's commands on a machine: ``target remote localhost:PORT``.

    async with GdbServer(vm, port=1234):
        await vm.run()          # stops before the first instruction until GDB lets it go

A vCPU is a thread. GDB gets registers and memory as the vCPU sees it, breakpoints, watchpoints, steps, Ctrl-C,
``monitor`` commands, and is told how the guest ended. When GDB detaches or its connection breaks, the guest runs on and
another GDB may connect.

Source: the GDB manual, appendix E ("GDB Remote Serial Protocol"). Rules: all-stop; what is not known is answered by an
empty packet; what cannot be done by an error; nothing that GDB sends raises.

Not modelled: non-stop, reverse execution, file transfer, selectors that are written.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from aiovm.errors import ConfigError, TripleFault
from aiovm.gdb.control import Action, DebugSession, Stop, Watch
from aiovm.gdb.packets import INTERRUPT, LONGEST, PacketStream, escape, unescape
from aiovm.gdb.registers import DESCRIPTIONS, Description
from aiovm.units import format_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from aiovm.vcpu import Vcpu
    from aiovm.vm import Outcome, Vm

__all__ = ["GdbServer"]

_OK: Final = b"OK"
_UNKNOWN: Final = b""
_NO_MEMORY: Final = b"E0e"  # EFAULT
_BAD: Final = b"E16"  # EINVAL
_HELP: Final = "monitor info   every vCPU's state, and the time\nmonitor stat   the counters of the present vCPU\n"
#: Z1 to Z4.
_WATCHES: Final = {"1": Watch.EXECUTE, "2": Watch.WRITE, "3": Watch.ACCESS, "4": Watch.ACCESS}
_WATCH_WORDS: Final = {Watch.WRITE: "watch", Watch.ACCESS: "awatch"}
_SEGV: Final = 11
#: With and without a signal for the guest, which takes none.
_ACTIONS: Final = {"c": Action.CONTINUE, "C": Action.CONTINUE, "s": Action.STEP, "S": Action.STEP}

T = TypeVar("T")


class GdbServer:
    """Listens on ``host``:``port`` (0: a free one, see :attr:`port`) for a debugger of ``vm``.

    Make it before the machine runs: it stops before its first instruction, until a debugger lets it go.
    ``bits``: 32 shows GDB an i386, for guests whose code is 32 bits (or 16); 64 an x86-64.
    """

    def __init__(self, vm: Vm, port: int = 0, *, host: str = "127.0.0.1", bits: int = 64) -> None:
        if not 0 <= port <= 0xFFFF:
            raise ConfigError(f"port {port}: 0 to 65535")
        if bits not in DESCRIPTIONS:
            raise ConfigError(f"gdb is shown registers of 32 or 64 bits, not {bits!r}")
        self.vm = vm
        self.port = port
        self._host = host
        self._description = DESCRIPTIONS[bits]
        self._server: asyncio.Server | None = None
        self._session: DebugSession | None = None
        self._busy = False
        #: How the guest ended, as GDB wants to hear it.
        self._ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(self._connected, self._host, self.port)
        except OSError as error:
            raise ConfigError(f"gdb: cannot listen on {self._host}:{self.port}: {error.strerror}") from error
        self.port = self._server.sockets[0].getsockname()[1]
        self._session = DebugSession(self.vm)
        self.vm.on_end(self._on_end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended.done():
            fault = isinstance(error, TripleFault)
            self._ended.set_result(b"X%02x" % _SEGV if fault else b"W00")
        assert self._server is not None
        self._server.close()
        for client in list(self._clients):
            with suppress(asyncio.CancelledError):
                await client
        if self._session is not None:
            self._session.detach()

    def _on_end(self, outcome: Outcome) -> None:
        if not self._ended.done():
            self._ended.set_result(b"W%02x" % (outcome.status & 0xFF))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if not self._busy and not self._ended.done():
                self._busy = True
                if self._session is None:
                    self._session = DebugSession(self.vm)
                client = _Client(self.vm, self._session, self._description, PacketStream(reader, writer), self._ended)
                await client.serve()
                if not self._ended.done():
                    self._session.detach()
                    self._session = None
        except ConnectionError:
            pass
        finally:
            self._busy = False
            writer.close()
            self._clients.discard(task)


class _Client:
    """One GDB."""

    def __init__(
        self,
        vm: Vm,
        session: DebugSession,
        description: Description,
        stream: PacketStream,
        ended: asyncio.Future[bytes],
    ) -> None:
        self._vm = vm
        self._session = session
        self._description = description
        self._stream = stream
        self._ended = ended
        self._current = 0
        self._last: Stop = Stop(0)
        self._gone = False
        #: What has come in; None when the connection is over.
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queries: dict[str, Callable[[str], bytes]] = {
            "Supported": self._supported,
            "fThreadInfo": lambda _: b"m" + b",".join(b"%x" % (v.index + 1) for v in vm.vcpus),
            "sThreadInfo": lambda _: b"l",
            "C": lambda _: b"QC%x" % (self._current + 1),
            "Attached": lambda _: b"1",
            "Xfer": self._xfer,
            "ThreadExtraInfo": self._extra,
            "Rcmd": self._monitor,
            "Symbol": lambda _: _OK,
            "TStatus": lambda _: _UNKNOWN,
        }

    async def serve(self) -> None:
        """Until GDB leaves, or the guest ends."""
        reading = asyncio.ensure_future(self._read())
        try:
            await self._serve()
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self) -> None:
        try:
            while (packet := await self._stream.receive()) is not None:
                self._inbox.put_nowait(packet)
        except ConnectionError:
            pass
        finally:
            self._inbox.put_nowait(None)

    async def _serve(self) -> None:
        self._session.stop()
        self._last = await self._unless_ended(self._session.wait_stopped()) or self._last
        while not self._gone:
            packet = await self._unless_ended(self._inbox.get())
            if packet is None:  # the connection or the machine is over
                return
            if packet == INTERRUPT:
                continue
            resume = self._actions(packet.decode("latin-1"))
            if resume is None:
                answer = self._answer(packet)
                if answer is not None:
                    await self._stream.send(answer)
                if packet == b"QStartNoAckMode":
                    self._stream.acknowledge = False
            else:
                await self._run(resume)

    async def _unless_ended(self, coming: Coroutine[Any, Any, T]) -> T | None:
        """What comes; None when the machine ends first."""
        future = asyncio.ensure_future(coming)
        waiting: list[asyncio.Future[Any]] = [future, self._ended]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        future.cancel()
        return None

    async def _run(self, actions: dict[int, Action]) -> None:
        """Let go, and wait for a stop, the end or Ctrl-C; tell GDB."""
        self._session.resume(actions)
        stopped = asyncio.ensure_future(self._session.wait_stopped())
        received = asyncio.ensure_future(self._inbox.get())
        while True:
            waiting: list[asyncio.Future[Any]] = [stopped, received, self._ended]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() or self._ended.done():
                break
            if received.result() != INTERRUPT:
                self._gone = received.result() is None
                if self._gone:
                    break
            self._session.stop()
            received = asyncio.ensure_future(self._inbox.get())
        if not received.cancel() and received.result() != INTERRUPT:
            self._inbox.put_nowait(received.result())
        if stopped.done():
            self._last = stopped.result()
            self._current = self._last.vcpu
            await self._stream.send(self._stop_reply())
        else:
            stopped.cancel()
            if self._ended.done():
                await self._stream.send(self._ended.result())
                self._gone = True

    # ---- the commands ----------------------------------------------------------------------------------------------

    @property
    def _vcpu(self) -> Vcpu:
        return self._vm.vcpus[self._current]

    def _stop_reply(self) -> bytes:
        stop = self._last
        signal = 2 if stop.reason == "signal" else 5
        words = f"T{signal:02x}thread:{stop.vcpu + 1:x};"
        if stop.reason in ("swbreak", "hwbreak"):
            words += f"{stop.reason}:;"
        elif stop.reason == "watch":
            words += f"{_WATCH_WORDS[stop.kind]}:{stop.address:x};"
        return words.encode()

    def _actions(self, command: str) -> dict[int, Action] | None:
        """What vCPUs shall do, when the command is one that resumes."""
        action = _ACTIONS.get(command[:1])
        if action is not None:
            return dict.fromkeys(range(len(self._vm.vcpus)), Action.CONTINUE) | {self._current: action}
        if not command.startswith("vCont;"):
            return None
        found: dict[int, Action] = {}
        for part in command[6:].split(";"):
            word, _, thread = part.partition(":")
            action = _ACTIONS.get(word[:1])
            if action is None:
                continue
            named = range(len(self._vm.vcpus)) if thread in ("", "-1") else [self._thread(thread)]
            for index in named:
                if index is not None:
                    found.setdefault(index, action)
        return found or None

    def _thread(self, text: str) -> int | None:
        """The index of GDB's thread; 0 is any."""
        number = _hex(text)
        if number == 0:
            return self._current
        return number - 1 if number is not None and 1 <= number <= len(self._vm.vcpus) else None

    def _answer(self, packet: bytes) -> bytes | None:
        """The answer to a command that does not resume; None when there is none."""
        command = packet.decode("latin-1")
        letter, rest = command[:1], command[1:]
        match letter:
            case "?":
                return self._stop_reply()
            case "g":
                return b"".join(self._description.read(self._vcpu)).hex().encode()
            case "G":
                return self._write_all(rest)
            case "p":
                return self._read_one(rest)
            case "P":
                return self._write_one(rest)
            case "m":
                return self._read_memory(rest)
            case "M":
                return self._write_memory(rest)
            case "X":
                return self._write_binary(packet[1:])
            case "Z" | "z":
                return self._point(rest, insert=letter == "Z")
            case "H":
                index = self._thread(rest[1:]) if rest[1:] != "-1" else self._current
                if index is None:
                    return _BAD
                self._current = index
                return _OK
            case "T":
                return _OK if self._thread(rest) is not None else _BAD
            case "q":
                name, separator = _split_query(rest)
                query = self._queries.get(name)
                return _UNKNOWN if query is None else query(separator)
            case "D":
                self._gone = True
                return _OK
            case "k":
                self._gone = True
                self._vm.stop()
                return None
            case "v" if command == "vCont?":
                return b"vCont;c;C;s;S"
            case "Q" if command == "QStartNoAckMode":
                return _OK
            case _:
                return _UNKNOWN

    def _write_all(self, text: str) -> bytes:
        data = _bytes(text)
        if data is None:
            return _BAD
        at = 0
        for number, register in enumerate(self._description.registers):
            size = register.bits // 8
            if at + size > len(data):
                break
            self._description.write(self._vcpu, number, data[at : at + size])
            at += size
        return _OK

    def _read_one(self, text: str) -> bytes:
        number = _hex(text)
        if number is None or number >= len(self._description.registers):
            return _BAD
        return self._description.read(self._vcpu)[number].hex().encode()

    def _write_one(self, text: str) -> bytes:
        name, _, value = text.partition("=")
        number, data = _hex(name), _bytes(value)
        if number is None or data is None:
            return _BAD
        return _OK if self._description.write(self._vcpu, number, data) else _BAD

    def _read_memory(self, text: str) -> bytes:
        where = _range(text)
        if where is None:
            return _BAD
        data = self._session.read(self._vcpu, where[0], min(where[1], LONGEST // 2))
        return _NO_MEMORY if data is None else data.hex().encode()

    def _write_memory(self, text: str) -> bytes:
        head, _, body = text.partition(":")
        return self._store(head, _bytes(body))

    def _write_binary(self, packet: bytes) -> bytes:
        head, _, body = packet.partition(b":")
        return self._store(head.decode("latin-1"), unescape(body))

    def _store(self, place: str, data: bytes | None) -> bytes:
        where = _range(place)
        if where is None or data is None or len(data) != where[1]:
            return _BAD
        return _OK if self._session.write(self._vcpu, where[0], data) else _NO_MEMORY

    def _point(self, text: str, *, insert: bool) -> bytes:
        kind, *rest = text.split(";")[0].split(",")
        where = _range(",".join(rest))
        if where is None:
            return _BAD
        address, length = where
        session = self._session
        if kind == "0":
            done = session.insert_breakpoint(self._vcpu, address) if insert else session.remove_breakpoint(address)
            return _OK if done else _NO_MEMORY
        watch = _WATCHES.get(kind)
        if watch is None:
            return _UNKNOWN
        change = session.insert_watch if insert else session.remove_watch
        return _OK if change(watch, address, length) else _BAD

    # ---- the queries -----------------------------------------------------------------------------------------------

    def _supported(self, _: str) -> bytes:
        return (
            f"PacketSize={LONGEST:x};qXfer:features:read+;swbreak+;hwbreak+;vContSupported+;QStartNoAckMode+".encode()
        )

    def _xfer(self, text: str) -> bytes:
        what, _, place = text.rpartition(":")
        where = _range(place)
        if what != "features:read:target.xml" or where is None:
            return b"E00"
        xml = self._description.xml.encode()
        piece = xml[where[0] : where[0] + min(where[1], LONGEST // 2)]
        more = where[0] + len(piece) < len(xml)
        return (b"m" if more else b"l") + escape(piece)

    def _extra(self, text: str) -> bytes:
        index = self._thread(text)
        return _BAD if index is None else self._vm.vcpus[index].describe().encode().hex().encode()

    def _monitor(self, text: str) -> bytes:
        data = _bytes(text)
        command = "" if data is None else data.decode("latin-1").strip()
        if command == "info":
            lines = [vcpu.describe() for vcpu in self._vm.vcpus]
            words = "\n".join((*lines, f"at {format_ns(self._vm.clock.now())}", ""))
        elif command == "stat":
            words = f"{self._vcpu.stat}\n"
        else:
            words = _HELP
        return words.encode().hex().encode()


def _split_query(text: str) -> tuple[str, str]:
    """A query's name and what stands behind it."""
    for at, letter in enumerate(text):
        if letter in ":,":
            return text[:at], text[at + 1 :]
    return text, ""


def _hex(text: str) -> int | None:
    try:
        return int(text, 16) if text.strip() == text and "_" not in text else None
    except ValueError:
        return None


def _bytes(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def _range(text: str) -> tuple[int, int] | None:
    """``address,length``."""
    first, _, second = text.partition(",")
    address, length = _hex(first), _hex(second)
    if address is None or length is None or not 0 <= address < 1 << 64 or not 0 <= length < 1 << 32:
        return None
    return address, length
