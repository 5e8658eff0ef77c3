"""The DNS stub (RFC 1035)."""

import struct

import pytest

from aiovm.backends.net.dns import answer_dns

NAMES = {"db.internal": "10.0.2.2"}
QUESTION = b"\2db\x08internal\0\0\1\0\1"


def query(question=QUESTION, *, flags=0x0100, count=1):
    return struct.pack(">HHHHHH", 0xBEEF, flags, count, 0, 0, 0) + question


def test_a_known_name():
    answer = answer_dns(query(), NAMES)
    assert answer[:12] == bytes.fromhex("beef 8180 0001 0001 0000 0000")
    assert answer[12:] == QUESTION + bytes.fromhex("c00c 0001 0001 0000003c 0004 0a000202")


def test_names_do_not_mind_case():
    assert answer_dns(query(b"\2DB\x08Internal\0\0\1\0\1"), NAMES)[-4:] == b"\x0a\0\2\2"


@pytest.mark.parametrize(
    ("data", "flags", "counts"),
    [
        (query(b"\2db\x08internal\0\0\x1c\0\1"), 0x8180, (1, 0)),
        (query(b"\2no\0\0\1\0\1"), 0x8183, (1, 0)),
        (query(b"\0\0\2\0\1"), 0x8183, (1, 0)),
        (query(count=2), 0x8181, (0, 0)),
        (query(count=0), 0x8181, (0, 0)),
        (query(QUESTION[:-1]), 0x8181, (0, 0)),
        (query(b"\x3f"), 0x8181, (0, 0)),
        (query(b"\xc0\x0c\0\1\0\1"), 0x8181, (0, 0)),
        (query(flags=0x2900), 0xA984, (0, 0)),
    ],
)
def test_other_queries(data, flags, counts):
    assert struct.unpack_from(">HHHH", answer_dns(data, NAMES)) == (0xBEEF, flags, *counts)


@pytest.mark.parametrize("data", [query()[:11], query(flags=0x8100)])
def test_no_answer_to_what_is_no_query(data):
    assert answer_dns(data, NAMES) is None
