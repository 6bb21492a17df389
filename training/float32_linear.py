"""Computing in float32 under autocast too: the 8 bits of bf16 would make close scores equal."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def float32_only(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of `like`."""
    # Not is_autocast_available: Dynamo of torch 2.11 breaks the graph there. Meta tensors have no autocast.
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


class Float32Linear(nn.Linear):
    """A layer whose outputs are float32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Linear's
        """(..., out_features) float32."""
        with float32_only(input):
            return linear(input.float(), self.weight, self.bias)
