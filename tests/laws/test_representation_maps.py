"""The law of distances between states: 0 where they are alike, with the invariances each claims, and true gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafa.alignment import MAPS
from lorafa.alignment.maps.base import States
from lorafa.alignment.maps.proj import projection
from lorafa.errors import ConfigError
from toys.compare import close

N, D, V = 30, 6, 11
ROTATION_DOES_NOT_MATTER = {"cka", "gram", "procrustes"}
SCALE_DOES_NOT_MATTER = {"cka", "gram", "procrustes", "cos"}
ANY_WIDTH = {"cka", "gram", "procrustes", "lens", "proj"}


def states(seed: int, width: int = D) -> Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def lens(width: int = D) -> Tensor:
    return torch.randn(width, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def distance(name: str, H: Tensor, T: Tensor) -> Tensor:
    heads = {width: lens(width) for width in (H.shape[1], T.shape[1])}
    between = MAPS.get(name)()
    P = projection(H.shape[1], T.shape[1], torch.float64).requires_grad_(False) if between.projects else None
    return between(States(H, lambda h: h @ heads[h.shape[1]], P), States(T, lambda h: h @ heads[h.shape[1]]))


def rotation() -> Tensor:
    return torch.linalg.qr(states(5, D)[:D])[0]


@pytest.mark.parametrize("name", MAPS.names())
def test_it_is_zero_where_the_states_are_alike_and_positive_elsewhere(name: str) -> None:
    H, T = states(0), states(1)
    close(distance(name, T.clone(), T), torch.zeros((), dtype=torch.float64), torch.float64)
    assert float(distance(name, H, T)) > 1e-2


@pytest.mark.parametrize("name", MAPS.names())
def test_rotations_and_scales_matter_where_they_should(name: str) -> None:
    H, T, R = states(0), states(1), rotation()
    plain = distance(name, H, T)
    for changed, invariant in ((H @ R, name in ROTATION_DOES_NOT_MATTER), (2.5 * H, name in SCALE_DOES_NOT_MATTER)):
        difference = float((distance(name, changed, T) - plain).abs())
        assert difference < 1e-12 if invariant else difference > 1e-4


@pytest.mark.parametrize("name", MAPS.names())
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    H, T = states(0)[:8], states(1)[:8]
    leaf = H.clone().requires_grad_()
    distance(name, leaf, T).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    step = 1e-6
    for row, column in ((0, 0), (3, 2), (7, 5)):
        ends = []
        for sign in (step, -step):
            moved = H.clone()
            moved[row, column] += sign
            ends.append(distance(name, moved, T))
        close((ends[0] - ends[1]) / (2 * step), leaf.grad[row, column], 1e-6)


@pytest.mark.parametrize("name", MAPS.names())
def test_other_widths_are_compared_or_refused(name: str) -> None:
    H, T = states(0, D), states(1, D + 3)
    if name in ANY_WIDTH:
        assert 0 < float(distance(name, H, T)) < 10
    else:
        with pytest.raises(ConfigError, match=f"align.map={name} compares states number by number.*6 and 9 numbers"):
            distance(name, H, T)


def test_procrustes_is_the_distance_after_the_best_rotation() -> None:
    """min over R of ||H R - T||^2 for states of norm 1 is 2 (1 - nuclear norm of H' T)."""
    H, T = states(0), states(1)
    H, T = H / H.norm(), T / T.norm()
    U, _, Vh = torch.linalg.svd(H.T @ T)
    close(2 * distance("procrustes", H, T), (H @ (U @ Vh) - T).square().sum(), 1e-10)
    close(distance("procrustes", 3 * T @ rotation(), T), torch.zeros((), dtype=torch.float64), torch.float64)


def test_gram_compares_all_pairs_of_positions() -> None:
    H, T = states(0), states(1)
    K, L = H @ H.T / H.square().sum(), T @ T.T / T.square().sum()
    close(distance("gram", H, T), (K - L).square().sum() / L.square().sum(), 1e-10)


def test_cka_is_that_of_centred_kernels() -> None:
    H, T = states(0), states(1)
    centre = torch.eye(N, dtype=torch.float64) - 1 / N
    K, L = centre @ H @ H.T @ centre, centre @ T @ T.T @ centre
    close(distance("cka", H, T), 1 - (K * L).sum() / (K.norm() * L.norm()), 1e-10)


def test_functional_is_the_kl_of_the_outputs_to_second_order() -> None:
    T = states(1)
    H = T + 1e-4 * states(2)
    log_p, log_q = (T @ lens()).log_softmax(-1), (H @ lens()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    close(distance("functional", H, T), kl, 1e-3)


def test_what_the_head_does_not_read_makes_no_difference_to_it() -> None:
    T, W = states(1, V + 4), lens(V + 4)
    unread = torch.linalg.svd(W)[0][:, V:]
    H = T + states(2, 4) @ unread.T
    for name in ("functional", "lens"):
        assert float(distance(name, H, T)) < 1e-20


def test_proj_is_zero_for_the_map_that_makes_the_states_the_teachers() -> None:
    H = states(0)
    wanted = torch.randn(D + 3, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    made = projection(D, D + 3, torch.float64)
    begun = distance("proj", H, H @ wanted.T)
    with torch.no_grad():
        made.weight.copy_(wanted)
    end = MAPS.get("proj")()(States(H, projection=made), States(H @ wanted.T))
    assert float(end.detach()) < 1e-25 < float(begun.detach())


def test_the_gradient_of_the_projection_is_that_of_finite_differences() -> None:
    H, T, made, between = states(0), states(1, D + 3), projection(D, D + 3, torch.float64), MAPS.get("proj")()
    between(States(H, projection=made), States(T)).backward()  # type: ignore[no-untyped-call]
    assert made.weight.grad is not None
    for row, column in ((0, 0), (5, 2), (8, 5)):
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                made.weight[row, column] += step
                ends.append(between(States(H, projection=made), States(T)))
                made.weight[row, column] -= step
        close((ends[0] - ends[1]) / 2e-6, made.weight.grad[row, column], 1e-6)


def test_a_projection_begins_as_the_identity_or_with_orthonormal_rows_and_draws_from_nobody() -> None:
    before = torch.get_rng_state()
    for student, teacher in ((D, D), (D, D + 3), (D + 3, D)):
        P = projection(student, teacher, torch.float64).weight.detach()
        assert P.shape == (teacher, student)
        gram = P @ P.T if teacher <= student else P.T @ P
        close(gram, torch.eye(min(student, teacher), dtype=torch.float64), 1e-12)
    assert torch.equal(torch.get_rng_state(), before)


def test_states_without_a_projection_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"align\.map=proj is trained, and these states come without its projection"):
        MAPS.get("proj")()(States(states(0)), States(states(1)))
