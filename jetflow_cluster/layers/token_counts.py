"""How often each token occurs in a request, kept up as tokens are committed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class TokenCounts:
    """The distinct tokens of prompt and output with their numbers of occurrences in the output.

    Nothing is counted before someone asks, so requests without penalties pay nothing; from then on a committed token
    costs the same however long the request is.
    """

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()):
        self._prompt = prompt_token_ids
        self._pending = list(output_token_ids)
        #: Place of each distinct token in the lists and the tensors; None before the first question.
        self._places: dict[int, int] | None = None
        self._ids: list[int] = []
        self._counts: list[int] = []
        #: Places whose entries in the tensors are out of date.
        self._stale: set[int] = set()
        self._ids_tensor = torch.empty(0, dtype=torch.int64)
        self._counts_tensor = torch.empty(0, dtype=torch.float64)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds committed output tokens."""
        self._pending += token_ids

    def num_in_output(self, token_id: int) -> int:
        """Occurrences of one token in the output."""
        place = self._up_to_date().get(token_id)
        return 0 if place is None else self._counts[place]

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct tokens of prompt and output, int64 ``[n]``, and their occurrences in the output, float64 ``[n]``.

        Views, valid until the next call.
        """
        self._up_to_date()
        num = len(self._ids)
        if num > self._ids_tensor.shape[0] or self._ids_tensor.device != device:
            room = [0] * (num // 2 + 16)
            self._ids_tensor = torch.tensor(self._ids + room, dtype=torch.int64, device=device)
            self._counts_tensor = torch.tensor(self._counts + room, dtype=torch.float64, device=device)
        elif self._stale:
            stale = list(self._stale)
            places = torch.tensor(stale, device=device)
            self._ids_tensor[places] = torch.tensor([self._ids[i] for i in stale], device=device)
            counts = torch.tensor([self._counts[i] for i in stale], dtype=torch.float64, device=device)
            self._counts_tensor[places] = counts
        self._stale.clear()
        return self._ids_tensor[:num], self._counts_tensor[:num]

    def _up_to_date(self) -> dict[int, int]:
        """Counts what was added since the last question."""
        if self._places is None:
            self._ids = list(dict.fromkeys(self._prompt))
            self._counts = [0] * len(self._ids)
            self._places = {token: i for i, token in enumerate(self._ids)}
        for token in self._pending:
            place = self._places.setdefault(token, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token)
                self._counts.append(0)
            self._counts[place] += 1
            self._stale.add(place)
        self._pending.clear()
        return self._places
