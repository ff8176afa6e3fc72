"""To be removed: the place of these is now tests/toys."""

from toys.adapters import *  # noqa: F403
from toys.compare import *  # noqa: F403
from toys.layers import *  # noqa: F403
