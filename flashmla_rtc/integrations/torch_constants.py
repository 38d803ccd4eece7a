"""What a program that torch compiles takes for constant, because it can't ask a device.

Imported where a program is compiled, and only there: marking a function loads torch's compiler.
"""

from __future__ import annotations

from typing import Any

import torch

from . import torch as operators


@torch.compiler.assume_constant_result
def num_sms(device: Any) -> int:
    return operators.num_sms(device)
