"""To be removed: the place of these is now tests/toys."""

from toys.several import *  # noqa: F403
