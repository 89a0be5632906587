"""examples/train.py on CPU processes, as a script for torchrun. accelerate is told that they have GPUs, for FSDP2."""

import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

import train

_post_init: Any = TrainingArguments.__post_init__


def post_init(self: TrainingArguments) -> None:
    _post_init(self)
    if self.fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    TrainingArguments.__post_init__ = post_init  # type: ignore[method-assign]
    train.main(sys.argv[1:])
