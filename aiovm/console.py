"""A guest's serial console for the embedding program: what it said, waiting for words, typing commands.

    await console.expect("login: ")
    print(await console.shell("nproc"))

Output comes byte by byte from inside slices, maybe on another thread; a waiter is told at the loop's time, a moment
after the first byte that it has not seen, so that a line costs one look and not eighty.

Rules: each :meth:`Console.expect` goes on behind the last match; the newest mebibyte is kept. Nobody waits for a guest
that has ended: the wait raises what ended it. A kernel whose console this is writes its messages straight to the port,
between any two characters that a program has written: a text is found with such messages in its midst.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from aiovm.errors import CommandFailed, StateError, TimeoutExpired

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Console"]

_KEPT = 1 << 20
_LOOK_AFTER_NS = 200_000
_SHOWN = 400

#: Messages of the kernel's, each with the time before it (``printk.time``, Debian's default) and to its line's end.
_MESSAGES = r"(?:\[ *\d+\.\d{6}\][^\n]*\n)*"


def _amid_messages(*parts: str) -> str:
    """The pattern of ``parts``, each a pattern of one character, with the kernel's messages between any two."""
    return _MESSAGES.join(parts)


def _characters(text: str) -> list[str]:
    """Each character of ``text`` as a pattern."""
    return [re.escape(character) for character in text]


class Console:
    """One console. ``soon(ns, callback)`` runs a callback on the loop after that time; ``send`` types."""

    def __init__(self, *, soon: Callable[[int, Callable[[], object]], object], send: Callable[[bytes], None]) -> None:
        self._soon = soon
        self._send = send
        self._text = bytearray()
        #: How much was forgotten, and how far the last match reached, in bytes since the beginning.
        self._forgotten = 0
        self._matched = 0
        self._looking = False
        self._waiters = 0
        self._news = asyncio.Event()
        self._over: Exception | None = None
        self._commands = 0

    # ---- the machine's side ------------------------------------------------------------------------------------

    def put(self, data: bytes) -> None:
        """The guest says something."""
        self._text.extend(data)
        if len(self._text) > 2 * _KEPT:
            self._forgotten += len(self._text) - _KEPT
            del self._text[:-_KEPT]
        if self._waiters and not self._looking:
            self._looking = True
            self._soon(_LOOK_AFTER_NS, self._look)

    def _look(self) -> None:
        self._looking = False
        self._news.set()

    def end(self, why: Exception) -> None:
        """No more will come; waiters raise ``why``."""
        self._over = why
        self._news.set()

    # ---- the embedding program's side ----------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """What was said, as far as it is kept."""
        return self._text.decode("utf-8", "replace")

    def type(self, text: str) -> None:
        """Type on the console."""
        self._send(text.encode())

    async def expect(self, wanted: str | re.Pattern[str], *, timeout: float | None = None) -> re.Match[str]:  # noqa: ASYNC109
        """Wait until the guest has said ``wanted`` (a text or a pattern) since the last match; the match.

        A text may have messages of the kernel's in its midst; a pattern is taken as it is.
        ``timeout``: seconds of the loop's time. Raises :class:`~aiovm.errors.TimeoutExpired`, or what ended the guest.
        """
        source = _amid_messages(*_characters(wanted)) if isinstance(wanted, str) else wanted.pattern
        flags = 0 if isinstance(wanted, str) else wanted.flags & ~re.UNICODE
        found = await self._find(re.compile(source.encode(), flags), repr(wanted), timeout)
        again = re.compile(source, flags).search(found[0].decode("utf-8", "replace"))
        assert again is not None
        return again

    async def shell(self, command: str, *, timeout: float | None = None, check: bool = True) -> str:  # noqa: ASYNC109
        """Run ``command`` in the shell that reads the console; what it printed, and what the kernel said meanwhile.

        With ``check`` a non-zero status raises :class:`~aiovm.errors.CommandFailed`.
        """
        self._commands += 1
        begin, end = f"__begin{self._commands}", f"__end{self._commands}:"
        # The quotes keep the typed line, which the terminal echoes, from looking like the marks.
        self.type(f'echo "__""{begin[2:]}"; {{ {command}\n}}; echo "__""{end[2:]}$?__"\n')
        first = _amid_messages(*_characters(begin), r"\r?", r"\n")
        await self._find(re.compile(first.encode()), f"{begin!r} for {command!r}", timeout)
        began = self._matched
        # The mark alone: a pattern with the output in it would look through all of it again at each of its bytes.
        last = _amid_messages(*_characters(end), rf"((?:\d{_MESSAGES})+)_", "_")
        found = await self._find(re.compile(last.encode()), f"{end!r} for {command!r}", timeout)
        said = self._text[max(began - self._forgotten, 0) : found.start()].decode("utf-8", "replace")
        output, status = said.replace("\r\n", "\n"), int(re.sub(_MESSAGES.encode(), b"", found[1]))
        if check and status:
            raise CommandFailed(f"{command!r} ended with status {status}: {output.strip()[-_SHOWN:]}")
        return output

    async def _find(self, pattern: re.Pattern[bytes], wanted: str, timeout: float | None) -> re.Match[bytes]:  # noqa: ASYNC109
        """The first match behind the last one, in the text as it is then; ``wanted`` is what the error calls it."""
        if self._waiters:
            raise StateError("somebody waits for this console already: two readers would take each other's words")
        self._waiters += 1
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self._news.clear()
                    found = pattern.search(self._text, max(self._matched - self._forgotten, 0))
                    if found is not None:
                        self._matched = self._forgotten + found.end()
                        return found
                    if self._over is not None:
                        raise self._over
                    await self._news.wait()
        except TimeoutError:
            said = bytes(self._text[-_SHOWN:]).decode("utf-8", "replace")
            raise TimeoutExpired(f"the guest did not say {wanted} within {timeout} s; it said {said!r}") from None
        finally:
            self._waiters -= 1
