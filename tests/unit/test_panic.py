"""The words of a panicking Linux kernel (kernel/panic.c)."""

from aiovm.panic import PanicWatch

STACK = b"[    2.5] CPU: 0 PID: 1\r\n[    2.5] Call Trace:\r\n"
BEGIN = b"[    2.091559] Kernel panic - not syncing: VFS: no root\r\n"
END = b"[    2.092543] ---[ end Kernel panic - not syncing: VFS: no root ]---\r\n"


def said(text):
    watch = PanicWatch()
    return watch, [watch.put(byte) for byte in text]


def test_the_end_line_is_the_last_word():
    watch, over = said(b"[    1.0] fine\r\n" + BEGIN + STACK + END)
    assert over.count(True) == 1
    assert over[-1]
    assert watch.message == "VFS: no root"
    assert watch.lines[0] == "[    2.091559] Kernel panic - not syncing: VFS: no root"
    assert watch.lines[1] == "[    2.5] CPU: 0 PID: 1"
    assert len(watch.lines) == 4


def test_a_panic_that_resets_is_known_before_the_reset():
    watch, over = said(BEGIN + STACK)
    assert not any(over)
    assert watch.message == "VFS: no root"


def test_without_timestamps_and_with_callers():
    assert said(b"Kernel panic - not syncing: Attempted to kill init!\n")[0].message == "Attempted to kill init!"
    assert said(b"[    2.1][    T1] Kernel panic - not syncing: x\n")[0].message == "x"


def test_words_in_the_middle_of_a_line_mean_nothing():
    watch, over = said(b"cat: Kernel panic - not syncing: joke\n---[ end Kernel panic - not syncing: joke ]---\n")
    assert watch.message is None
    assert watch.lines == ()
    assert not any(over)


def test_only_the_first_reason_counts():
    assert said(BEGIN + b"Kernel panic - not syncing: second\n")[0].message == "VFS: no root"


def test_what_a_hostile_guest_prints_is_bounded():
    watch, _ = said(BEGIN + b"x" * 5000 + b"\n" + b"y\n" * 500 + b"\xff\xfe\n")
    assert len(watch.lines) == 60
    assert max(map(len, watch.lines)) == 1024
