"""Where A and B start, by the names ``init_lora_weights`` uses (True is "kaiming", False is "random")."""

from lorafa.initializers.base import Initializer
from lorafa.registry import Registry

INITIALIZERS: Registry[Initializer] = Registry(
    "initializer",
    {
        "kaiming": "lorafa.initializers.kaiming:kaiming",
        "random": "lorafa.initializers.random:random",
        "gaussian": "lorafa.initializers.gaussian:gaussian",
        "orthogonal": "lorafa.initializers.orthogonal:orthogonal",
        "pissa": "lorafa.initializers.pissa:pissa",
    },
)


def initializer_name(init_lora_weights: bool | str) -> str:
    """The registry's name for a value of ``init_lora_weights``."""
    if isinstance(init_lora_weights, bool):
        return "kaiming" if init_lora_weights else "random"
    return init_lora_weights.lower()
