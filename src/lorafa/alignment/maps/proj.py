"""Squared error of states after a linear map that is trained with the student (as in FitNets, arXiv:1412.6550)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import RepresentationMap, States, square
from lorafa.errors import ConfigError


@dataclass(frozen=True)
class Projected(RepresentationMap):
    """||H_S P' - H_T||^2 / ||H_T||^2 with a trained P (d_T, d_S): student and teacher may be of any width.

    P is no part of the model: it is trained by the same optimizer, kept in checkpoints, and in no adapter's file. It
    begins as the identity where the widths are the same, so that a teacher that is the student has no distance, and
    else with orthonormal rows or columns.
    """

    name = "proj"
    projects = True

    def between(self, student: States, teacher: States) -> Tensor:
        if student.projection is None:
            raise ConfigError("align.map=proj is trained, and these states come without its projection. Pass one.")
        P = student.projection.weight.to(student.hidden)
        return (student.hidden @ P.mT - teacher.hidden).square().sum() / square(teacher.hidden)


def projection(student: int, teacher: int, dtype: torch.dtype, seed: int = 0) -> nn.Linear:
    """P as it begins, between states of these sizes; the same each time."""
    made: nn.Linear = skip_init(nn.Linear, student, teacher, bias=False, dtype=dtype)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if student == teacher:
            made.weight.copy_(torch.eye(student))
        else:
            generator = torch.Generator().manual_seed(seed)
            tall = torch.randn(max(student, teacher), min(student, teacher), generator=generator, dtype=torch.float64)
            Q = torch.linalg.qr(tall).Q
            made.weight.copy_(Q if teacher > student else Q.mT)
    return made


PROJ = MapEntry(settings=Projected)
