# ruff: noqa: F401, F403
"""To be removed: the place of these is now tests/toys."""

import transformers

from toys.language_models import *
from toys.language_models import inference as logits
