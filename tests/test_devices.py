"""Each device is the one that is meant: in tests one after another, and on machines with several GPUs.

Without a GPU: torch.cuda is that of a made-up machine, which writes down what it is asked.
"""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from infer import build_accelerator


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_test_sees_neither_device_nor_precision_of_the_one_before(precision: str) -> None:
    """Each of the two leaves behind what a test marked gpu would."""
    assert not PartialState._shared_state and not AcceleratorState._shared_state
    accelerator = build_accelerator(precision)
    assert accelerator.device.type == "cpu" and accelerator.mixed_precision == precision.replace("float32", "no")
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(_cpu=False, device=torch.device("cuda"))
