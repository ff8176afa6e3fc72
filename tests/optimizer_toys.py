"""To be removed: the place of these is now tests/toys."""

from toys.models import *  # noqa: F403
from toys.optimizers import *  # noqa: F403
