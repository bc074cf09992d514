"""The base of all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class InferenceModule(nn.Module):
    """A module without hooks whose parts are plain attributes.

    `nn.Module` looks hooks up at every call and finds parts only after a failed look-up: about 1 us each, which adds
    up to more than the small operations of a layer cost.
    """

    def __call__(self, *args: Any) -> Any:
        """Runs `forward`."""
        return self.forward(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, (nn.Module, nn.Parameter)):
            self.__dict__[name] = value

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> InferenceModule:
        # Behind `to` and `to_empty`, which may put new parameters in the place of the old ones.
        super()._apply(fn, recurse)
        self.__dict__.update({name: part for name, part in self._parameters.items() if part is not None})
        return self
