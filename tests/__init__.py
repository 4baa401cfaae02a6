"""Tests; each folder mirrors a room of the program."""

import pytest

# So that a failed assertion in a helper shows its values.
pytest.register_assert_rewrite("tests.helpers")
