"""To be removed: the place of these is now tests/toys."""

from toys.calibration import *  # noqa: F403
