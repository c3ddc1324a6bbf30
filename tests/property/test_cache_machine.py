"""Any sequence of operations on a cache, against a model of it; tens of thousands of steps in `make nightly`."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.cache_machine import CacheMachine, ForeignMachine
from tests.unit.cache.test_foreign import HAVE_FP8, HAVE_HQQ, HAVE_QUANTO

FEW = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=[*HealthCheck])
MANY = settings(FEW, max_examples=900, stateful_step_count=30, derandomize=False, database=None, print_blob=True)
hugging_face = pytest.mark.skipif(not (HAVE_FP8 and HAVE_HQQ and HAVE_QUANTO), reason="a backend is missing")


@pytest.mark.timeout(900)  # a failure is made small before it is shown
@pytest.mark.parametrize("machine", [CacheMachine, pytest.param(ForeignMachine, marks=hugging_face)])
def test_any_sequence_of_operations(machine: type[CacheMachine]) -> None:
    run_state_machine_as_test(machine, settings=FEW)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [CacheMachine, pytest.param(ForeignMachine, marks=hugging_face)])
def test_tens_of_thousands_of_steps(machine: type[CacheMachine]) -> None:
    machine.done.clear()
    run_state_machine_as_test(machine, settings=MANY)
    print({name: int(count) for name, count in machine.done.items()})
    assert machine.done["steps"] > 20_000
    assert machine.done["crops into packed tokens"] > 100
