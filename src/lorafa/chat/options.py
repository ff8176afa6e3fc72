"""How long an answer may be, how its tokens are drawn, and where it ends."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from lorafa.evals.generation import Sampling, seed_at


@dataclass(frozen=True)
class Options:
    """What is asked of an answer. Ranges are checked where they are read: from a command line or a request."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Tokens are drawn among the likeliest ones that have this probability together."""
    seed: int | None = None
    """What is drawn depends on it alone; None: draws anew each time."""
    stops: tuple[str, ...] = ()
    """Texts before which an answer ends."""

    def sampling(self, place: int = 0) -> Sampling | None:
        """How the tokens of an answer are drawn; None where the likeliest is taken.

        Args:
            place: number of the answer among those with this seed. Two with one number are drawn with the same random
                numbers, so that what they differ in comes from their models.
        """
        if not self.temperature:
            return None
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_p, seed_at(seed, place))
