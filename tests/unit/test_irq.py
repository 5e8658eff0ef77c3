"""An interrupt line tells its sink about changes only."""

from aiovm.irq import IrqLine


def test_only_changes_are_told():
    seen = []
    line = IrqLine(seen.append)
    for level in (False, True, True, False, False, True):
        line.set(level)
    assert seen == [True, False, True]
    assert line.level is True


def test_pulse_is_one_edge_up_and_down():
    seen = []
    line = IrqLine(seen.append)
    line.pulse()
    assert seen == [True, False]
    assert line.level is False


def test_pulse_of_a_high_line_only_falls():
    seen = []
    line = IrqLine(seen.append)
    line.set(True)
    line.pulse()
    assert seen == [True, False]


def test_a_line_that_ends_nowhere_keeps_its_level():
    line = IrqLine()
    line.set(True)
    assert line.level is True


def test_the_level_is_set_before_the_sink_hears_it():
    line = IrqLine(lambda level: seen.append((level, line.level)))
    seen = []
    line.set(True)
    assert seen == [(True, True)]
