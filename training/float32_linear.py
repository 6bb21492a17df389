"""A linear layer that computes in float32 under autocast too."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Float32Linear(nn.Linear):
    """A layer whose outputs are float32 under autocast too: the 8 bits of bf16 would make close scores equal."""

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Linear's
        """(..., out_features) float32."""
        # Not is_autocast_available: Dynamo of torch 2.11 breaks the graph there. Meta tensors have no autocast.
        with nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            return linear(input.float(), self.weight, self.bias)
