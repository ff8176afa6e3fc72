"""To be removed: the place of these is now tests/toys."""

from toys.blocks import *  # noqa: F403
