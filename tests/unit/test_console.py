"""A console for the embedding program, against a scripted guest in virtual time."""

import asyncio
import re

import pytest

from aiovm.console import Console
from aiovm.errors import CommandFailed, StateError, TimeoutExpired
from aiovm.loop import run


class Guest:
    """Answers each typed line by ``answer(line)``, 1 ms later, after echoing it as a terminal does."""

    def __init__(self, answer=lambda line: b""):
        self.loop = asyncio.get_running_loop()
        self.looks = 0
        self.typed = b""
        self.answer = answer
        self.console = Console(soon=self.soon, send=self.send)

    def soon(self, ns, callback):
        self.looks += 1
        self.loop.clock.call_at(self.loop.clock.now() + ns, callback)

    def send(self, data):
        self.typed += data
        self.console.put(data.replace(b"\n", b"\r\n"))
        self.say(0.001, self.answer(data))

    def say(self, after, data):
        self.loop.call_later(after, lambda: [self.console.put(bytes((byte,))) for byte in data])


def play(scene, **kw):
    async def main():
        guest = Guest(**kw)
        return await scene(guest, guest.console)

    return run(main())


def test_expect_waits_and_goes_on_behind_the_match():
    async def scene(guest, console):
        guest.say(0.5, b"debian login: one two")
        assert (await console.expect("login: "))[0] == "login: "
        assert guest.loop.time() == pytest.approx(0.5002)
        assert (await console.expect(re.compile(r"(\w+) two")))[1] == "one"
        guest.say(0.1, b"login: ")
        await console.expect("login: ", timeout=1)
        assert console.text == "debian login: one twologin: "

    play(scene)


def test_a_text_is_taken_literally():
    async def scene(guest, console):
        console.put(b"~ # ")
        assert (await console.expect("~ # "))[0] == "~ # "
        console.put(b"aXb")
        with pytest.raises(TimeoutExpired, match=r"did not say 'a\.b' within 2 s"):
            await console.expect("a.b", timeout=2)
        assert guest.loop.time() == pytest.approx(2)

    play(scene)


def test_many_bytes_are_looked_at_once_and_none_when_nobody_waits():
    async def scene(guest, console):
        console.put(b"x" * 100)
        assert guest.looks == 0
        guest.say(0.1, b"y" * 1000 + b"!")
        await console.expect("!")
        assert guest.looks == 1

    play(scene)


def test_the_end_of_the_guest_reaches_whoever_waits_now_or_later():
    async def scene(guest, console):
        guest.loop.call_later(1, console.end, StateError("powered off"))
        with pytest.raises(StateError, match="powered off"):
            await console.expect("never")
        console.put(b"last words")
        await console.expect("last words")
        with pytest.raises(StateError, match="powered off"):
            await console.expect("never")

    play(scene)


def test_two_readers_are_refused():
    async def scene(guest, console):
        first = asyncio.create_task(console.expect("a"))
        await asyncio.sleep(0)
        with pytest.raises(StateError, match="already"):
            await console.expect("b")
        console.put(b"a")
        await first

    play(scene)


def test_old_output_is_forgotten_and_matching_goes_on():
    async def scene(guest, console):
        console.put(b"first ")
        await console.expect("first ")
        console.put(b"z" * 3_000_000)
        console.put(b"second")
        await console.expect("second", timeout=1)
        assert len(console.text) < 2_200_000

    play(scene)


def shell(line):
    """A shell that can only run what these tests run."""
    begin = re.search(rb'echo "__""(begin\d+)"', line)[1]
    end = re.search(rb'echo "__""(end\d+:)\$\?', line)[1]
    command = re.search(rb"\{ (.*)\n\}", line, re.DOTALL)[1]
    output, status = {b"nproc": (b"4\r\n", 0), b"false": (b"", 1), b"printf x": (b"x", 0)}[command]
    return b"__" + begin + b"\r\n" + output + b"__" + end + b"%d__\r\n~ # " % status


@pytest.mark.timeout(20)  # it takes well below one; looking through all of it at each piece takes minutes
def test_a_long_output_is_not_looked_through_again_and_again():
    lines = [f"{number:06} {'.' * 60}" for number in range(3_000)]

    async def scene(guest, console):
        said = asyncio.create_task(console.shell("dmesg"))
        await asyncio.sleep(0.01)
        console.put(b"__begin1\r\n")
        for at in range(0, len(lines), 10):
            console.put("".join(f"{line}\r\n" for line in lines[at : at + 10]).encode())
            await asyncio.sleep(0.001)
        console.put(b"__end1:0__\r\n")
        assert (await said).splitlines() == lines

    play(scene)


def test_shell_gives_what_the_command_printed():
    async def scene(guest, console):
        assert await console.shell("nproc") == "4\n"
        assert await console.shell("printf x") == "x"
        assert await console.shell("false", check=False) == ""
        with pytest.raises(CommandFailed, match="'false' ended with status 1"):
            await console.shell("false")

    play(scene, answer=shell)


#: What a kernel said on the console whose program was writing: in a mark's midst, at its end, two at once.
DROPPED = "[    2.658337] sh (1): drop_caches: 3\r\n"


@pytest.mark.parametrize("message", [DROPPED, DROPPED + "[12345.000001][    T1] caf\xe9 (2): 0__\r\n"])
@pytest.mark.parametrize("at", range(len("__begin1\r\n__end1:13__\r\n")))
def test_shell_hears_its_marks_with_the_kernels_messages_in_their_midst(at, message):
    """Linux's console driver writes to the port at once; a program's text waits there for the transmitter."""
    said = "__begin1\r\n__end1:13__\r\n"

    async def scene(guest, console):
        output = await console.shell("false", check=False, timeout=1)
        heard = message.encode("latin-1").decode("utf-8", "replace").replace("\r\n", "\n")
        assert output == (heard if at == len("__begin1\r\n") else "")
        console.put(b"~ ")
        console.put(message.encode("latin-1"))
        console.put(b"# ")
        await console.expect("~ # ", timeout=1)

    play(scene, answer=lambda line: (said[:at] + message + said[at:]).encode("latin-1"))


def test_a_status_is_read_around_a_message():
    async def scene(guest, console):
        with pytest.raises(CommandFailed, match="'exit' ended with status 13: "):
            await console.shell("exit", timeout=1)

    play(scene, answer=lambda line: f"__begin1\r\n__end1:1{DROPPED}3__\r\n".encode())
