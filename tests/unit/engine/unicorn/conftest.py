"""What tests of the Unicorn engine share."""

import pytest
from core_machine import ENGINES, IDS, Machine, code


@pytest.fixture(params=ENGINES, ids=IDS)
def make(request):
    """Builds machines on one kind of engine and frees them."""
    native, pointers = request.param
    built = []

    def build(*parts, **options):
        machine = Machine(code(*parts), native=native, pointers=pointers, **options)
        built.append(machine)
        return machine

    build.pointers = pointers
    yield build
    for machine in built:
        machine.engine.close()
