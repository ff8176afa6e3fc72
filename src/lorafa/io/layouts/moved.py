"""Parts that another version of the model has elsewhere, as models of images and text since transformers 4.52."""

from __future__ import annotations

from dataclasses import replace

from lorafa.errors import CheckpointError
from lorafa.io.layouts.base import OWN_LAYER, Arrangement, Contents
from lorafa.io.layouts.names import BaseNames
from lorafa.settings.checks import repeated

_INSIDE = (OWN_LAYER, ".token_adapter")


class Moved(Arrangement):
    """Names of transformers' own table of renamings, and of the parts that 4.52 has moved, in both directions."""

    what = "layers under the names of another version of the model"

    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        return {name for name in contents.factors if _place(name, base) not in (None, name)}

    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        new = {name: _place(name, base) or name for name in contents.factors}
        if len(set(new.values())) != len(new):
            twice = sorted(repeated(new.values()))
            raise CheckpointError(
                f"{contents.path} has {twice[0]} under two names, of two versions of the model. Nothing was loaded."
            )
        config = contents.config
        saved = [base.home(name) or name for name in config.modules_to_save or ()] or None
        return replace(
            contents,
            config=replace(config, modules_to_save=saved) if saved else config,
            factors={new[name]: factors for name, factors in contents.factors.items()},
            others={_whole(key, base): tensor for key, tensor in contents.others.items()},
        )


def _place(name: str, base: BaseNames) -> str | None:
    """Where the layer is here; None where it is nowhere."""
    head, inside, rest = name.partition(OWN_LAYER)
    home = base.home(head)
    return None if home is None else f"{home}{inside}{rest}"


def _whole(key: str, base: BaseNames) -> str:
    """The name here of a tensor that is no factor."""
    module, _, tensor = key.rpartition(".")
    inside = next((part for part in _INSIDE if part in module), "")
    head, found, rest = module.partition(inside) if inside else (module, "", "")
    home = base.home(head)
    return key if home is None else f"{home}{found}{rest}.{tensor}"
