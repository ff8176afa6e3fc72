# ruff: noqa: F401, F403
"""To be removed: the place of these is now tests/toys."""

from toys.compare import assert_equal_bits
from toys.compare import trained_values as weights
from toys.data import *
from toys.training import *
