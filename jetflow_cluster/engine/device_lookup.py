"""Guesses from requests' own texts among candidates that are on a device, as `jetflow_cluster.tree.lookup.mix_lookup`
and `lookup_table` put them into tables on the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jetflow_cluster.tree.build import MIN_SCORE, SCORE_UNIT


def mix_on_device(
    ids: torch.Tensor,
    scores: torch.Tensor,
    *,
    guess_ids: torch.Tensor,
    weights: torch.Tensor,
    num_guesses: torch.Tensor,
    num_own: torch.Tensor,
    widths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every request's guesses mixed in; no value is read by the host. Depths go from those of the candidates to those
    of the guesses, whichever is deeper.

    Args:
        ids: int64 ``[R, D, W]``.
        scores: fixed point, int32 ``[R, D, 1 or W, W]``.
        guess_ids: int64 ``[R, G]``.
        weights: of the guesses, float64 ``[R, G]``.
        num_guesses: int32 ``[R]``; 0 leaves a request as it is.
        num_own: int32 ``[R]``: depths of the candidates that count; 0 where the guesses are alone.
        widths: int32 ``[R]``: candidates of a depth that count; 0 where there is no request.

    Returns:
        ids int64 ``[R, max(D, G), W]`` and scores int32 ``[R, max(D, G), W, W]``, new.
    """
    width, depths = ids.shape[2], max(ids.shape[1], guess_ids.shape[1])
    o_d, o_w = torch.arange(depths, device=ids.device), torch.arange(width, device=ids.device)
    guess, weight = (F.pad(x, (0, depths - x.shape[1])) for x in (guess_ids, weights))
    # Requests that are not there have none.
    widths = widths.long().clamp_min(1)
    is_own, last = o_d < num_own[:, None], (widths - 1)[:, None]
    m_w = o_w <= last
    ids, scores = _deepened(ids, scores, is_own)

    # [R, D]: where each guess is among the candidates, or the place that it takes.
    found = torch.where((ids == guess[:, :, None]) & m_w[:, None], o_w, width).amin(2)
    is_new = is_own & (found == width)
    place = torch.where(is_own, torch.where(is_new, last, found), 0)
    o_row = _below(place)[:, :, None, None].expand(-1, -1, 1, width)
    row = _row_above(scores, o_row, _below(is_new) & is_own, m_w, widths)
    fixed = _fixed(weight)
    worst = row.gather(2, last[:, None].expand(-1, depths, 1)).squeeze(2)
    is_worthless = is_new & (fixed <= worst)
    is_taken = (o_d < num_guesses[:, None]) & (is_worthless.int().cumsum(1) == 0)

    # The guesses' own column under every parent, then the row that carries the one above.
    m_place = o_w == place[:, :, None]
    is_put = is_taken & (is_new | ~is_own)
    m_put = (is_put[:, :, None] & m_place)[:, :, None]
    ids = torch.where(m_put.squeeze(2), guess[:, :, None], ids)
    scores = torch.where(m_put & is_own[:, :, None, None], MIN_SCORE, scores)
    rest = torch.where(is_new[:, :, None] & m_place, MIN_SCORE, row)
    mixed = (1.0 - weight)[:, :, None] * (rest.double() / SCORE_UNIT).exp() + weight[:, :, None] * m_place
    alone = torch.where(m_place, fixed[:, :, None], MIN_SCORE)
    new_row = torch.where(is_own[:, :, None], _fixed(mixed), alone)
    was_put = _below(is_put & is_own) & is_own
    kept = torch.where(was_put[:, :, None], row, scores.gather(2, o_row).squeeze(2))
    new_row = torch.where(is_taken[:, :, None], new_row, kept)
    return ids, scores.scatter(2, o_row, new_row[:, :, None].to(torch.int32))


def shared_on_device(
    ids: torch.Tensor,
    *,
    guess_ids: torch.Tensor,
    num_guesses: torch.Tensor,
    num_own: torch.Tensor,
    widths: torch.Tensor,
) -> torch.Tensor:
    """How many of each request's guesses, the first ones, are candidates too, int32 ``[R]``: what
    `jetflow_cluster.tree.lookup.guess_of` counts on the host. Arguments as `mix_on_device`, which has not mixed yet."""
    depths = min(ids.shape[1], guess_ids.shape[1])
    o_d, o_w = torch.arange(depths, device=ids.device), torch.arange(ids.shape[2], device=ids.device)
    is_candidate = (ids[:, :depths] == guess_ids[:, :depths, None]) & (o_w < widths[:, None, None])
    is_shared = is_candidate.any(2) & (o_d < torch.minimum(num_own, num_guesses)[:, None])
    return is_shared.int().cumprod(1).sum(1, dtype=torch.int32)


def _deepened(ids: torch.Tensor, scores: torch.Tensor, is_own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates as deep as `is_own`, bool ``[R, D]``, and empty where it is False; scores under each of W parents."""
    more, width = is_own.shape[1] - ids.shape[1], ids.shape[2]
    ids = F.pad(ids, (0, 0, 0, more)).masked_fill(~is_own[:, :, None], 0)
    scores = F.pad(scores.expand(-1, -1, width, -1), (0, 0, 0, 0, 0, more))
    return ids, scores.masked_fill(~is_own[:, :, None, None], MIN_SCORE)


def _below(values: torch.Tensor) -> torch.Tensor:
    """What each depth's value is to the next one, ``[R, D]``; zeros at the first."""
    return F.pad(values, (1, 0))[:, :-1]


def _row_above(
    scores: torch.Tensor, o_row: torch.Tensor, is_behind_new: torch.Tensor, m_w: torch.Tensor, widths: torch.Tensor
) -> torch.Tensor:
    """The row under the guess above, ``[R, D, W]``; behind a guess that is no candidate, the mean of all."""
    own_row = scores.gather(2, o_row).squeeze(2)
    return torch.where(is_behind_new[:, :, None], _mean_row(scores, m_w, widths), own_row)


def _mean_row(scores: torch.Tensor, m_w: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """What the candidates that count say on average, ``[R, D, W]``."""
    shares = (scores.double() / SCORE_UNIT).exp().masked_fill(~m_w[:, None, :, None], 0.0)
    return _fixed(shares.sum(2) / widths[:, None, None])


def _fixed(shares: torch.Tensor) -> torch.Tensor:
    """Probabilities to fixed-point scores, int32."""
    return (shares.log() * SCORE_UNIT).round().clamp(MIN_SCORE, 0).to(torch.int32)
