"""What people write becomes whole nanoseconds and bytes, or an error that says how to write it."""

import pytest

from aiovm.errors import ConfigError
from aiovm.units import GIB, KIB, MIB, MS, SEC, US, format_ns, parse_duration, parse_size


def test_constants():
    assert (US, MS, SEC) == (1_000, 1_000_000, 1_000_000_000)
    assert (KIB, MIB, GIB) == (1024, 1048576, 1073741824)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0ns", 0),
        ("7ns", 7),
        ("6ms", 6_000_000),
        ("1.5us", 1_500),
        ("2µs", 2_000),
        ("0.000000001s", 1),
        ("2 min", 120_000_000_000),
        ("  3s  ", 3_000_000_000),
        ("9007199254740993ns", 9007199254740993),  # beyond what a float holds
    ],
)
def test_durations(text, ns):
    assert parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "6", "ms", "-1ms", "1h", "1e3ms", "1.ms", ".5ms", "1 m s", "6ms 2us"])
def test_bad_durations_are_refused(text):
    with pytest.raises(ConfigError, match="6ms"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0.5ns", "1.0005us"])
def test_a_fraction_of_a_nanosecond_is_refused(text):
    with pytest.raises(ConfigError, match="finer than a nanosecond"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1024),
        ("64M", 67108864),
        ("64m", 67108864),
        ("64 MiB", 67108864),
        ("1GB", 1073741824),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1.5M", "-1K", "1T", "64MM", "0x10"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="64M"):
        parse_size(text)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1.00 µs"),
        (12_345, "12.3 µs"),
        (123_456, "123 µs"),
        (1_234_567, "1.23 ms"),
        (2_500_000_000, "2.50 s"),
        (-1_500, "-1.50 µs"),
        (9_996, "10.0 µs"),  # rounding carries into another digit
        (999_999, "1.00 ms"),  # and into another unit
        (99_960_000, "100 ms"),
        (99_949_999, "99.9 ms"),
        (1_050_000, "1.05 ms"),
        (987_654_321_000, "988 s"),
        (123_456_700_000_000, "123457 s"),
    ],
)
def test_formatting(ns, text):
    assert format_ns(ns) == text
