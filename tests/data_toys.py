"""To be removed: the place of these is now tests/toys."""

from toys.language_models import *  # noqa: F403
