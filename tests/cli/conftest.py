"""The small trained model in examples/, and a picture that it knows."""

import pytest

from helpers.command_line import CHECKPOINT, SCENE


@pytest.fixture
def checkpoint():
    return CHECKPOINT


@pytest.fixture
def scene():
    return SCENE
