"""MetaMathQA with all of its 395,000 rows, those made from MATH too, written as those of ``meta_math``.

That the last 1,000 are held out is ours.
"""

from __future__ import annotations

from dataclasses import replace

from lorafa.data.sets.meta_math import PUBLISHED
from lorafa.data.sets.published import InOrder, PublishedSettings

META_MATH_FULL = replace(PUBLISHED, heldout=InOrder(trained=394_000, heldout=1_000), only=None).data_set(
    settings=PublishedSettings
)
