"""A hook of pytest for tests on a GPU: after an illegal access every later test of the process would fail for it."""

import os

import pytest
from micro.restart import LOST, device_lost


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that loses the device ends its process; xdist fails that test and goes on in another one."""
    if call.excinfo is not None and device_lost(call.excinfo.value):
        line = f"{item.nodeid}: the device is lost: {call.excinfo.value}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(line, LOST)
        os.write(2, f"{line}\n".encode())
        os._exit(LOST)
    return (yield)
