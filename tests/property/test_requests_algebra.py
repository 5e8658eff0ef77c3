"""The request word behaves as a set of bits, whatever order they come in."""

from hypothesis import given
from hypothesis import strategies as st

from aiovm.requests import Request, Requests

REQUESTS = st.sampled_from(list(Request))
OPERATIONS = st.tuples(st.sampled_from(["make_request", "check_request", "clear_request", "test_request"]), REQUESTS)


@given(st.lists(OPERATIONS, max_size=60))
def test_a_request_word_is_a_set(operations):
    word, model = Requests(), set()
    for name, request in operations:
        answer = getattr(word, name)(request)
        if name in ("check_request", "test_request"):
            assert answer is (request in model)
        if name == "make_request":
            model.add(request)
        elif name != "test_request":
            model.discard(request)
        assert word.bits == sum(1 << r.value for r in model)
        assert word.pending is bool(model)


@given(st.lists(REQUESTS, max_size=20), st.randoms(use_true_random=False))
def test_makes_commute(requests, random):
    first, second = Requests(), Requests()
    for r in requests:
        first.make_request(r)
    random.shuffle(requests)
    for r in requests:
        second.make_request(r)
    assert first.bits == second.bits
