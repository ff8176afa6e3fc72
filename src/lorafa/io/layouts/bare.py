"""Linear layers of the file that are bare parameters of this model, as routers of mixtures are in transformers 5."""

from __future__ import annotations

from dataclasses import replace

from lorafa.io.layouts.base import A, Arrangement, B, Contents, require_only
from lorafa.io.layouts.names import BaseNames
from lorafa.surgery.walk import dotted_ends


class Bare(Arrangement):
    """The module is there under its name and multiplies with its weight itself, so the weight is the target."""

    what = "linear layers for bare weights"

    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        given = contents.config.target_parameters or []
        return {
            name
            for name in contents.factors
            if name in base.routers and not any(end in given for end in dotted_ends(f"{name}.weight"))
        }

    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        for name in self.claims(contents, base):
            require_only(contents.path, name, contents.factors[name], {A, B}, "adapting a bare weight")
        return replace(contents, rearranged=True)
