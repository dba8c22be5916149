"""Failures inside the helpers show the values that they compared."""

import pytest

pytest.register_assert_rewrite("laws")
