"""The small trained model in examples/, and a picture that it knows.

Loaded before ``pytest_configure`` has said whether kernels are interpreted where this folder is an argument, so nothing of ours
is imported ahead of that.
"""

import pytest


@pytest.fixture
def checkpoint():
    from helpers.command_line import CHECKPOINT

    return CHECKPOINT


@pytest.fixture
def scene():
    from helpers.command_line import SCENE

    return SCENE
