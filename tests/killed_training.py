"""Kill a run at random moments, resume it each time, and compare its end with that of a run that nobody killed.

    python -m tests.killed_training FOLDER KILLS

It writes what it found as JSON. Each run is a fork of one process that has everything imported, so that it starts fast.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from flamingo_blocks.training import UNFINISHED
from tests.tiny_stream import make_trainer

STEPS = 44


class TellSteps(TrainerCallback):
    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        os.write(self.pipe, b"!")


def start(folder: Path, *, pipe: int | None = None) -> int:
    """Train in a process of its own, from the last checkpoint if there is one, saving each step."""
    if process := os.fork():
        return process
    callbacks = [] if pipe is None else [TellSteps(pipe)]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    trainer = make_trainer(folder, max_steps=STEPS, keywords={"callbacks": callbacks}, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None)
    os._exit(0)


def is_whole(checkpoint: Path) -> bool:
    """Whether all that a resumed run reads is there, and can be read."""
    load_file(checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(checkpoint / name, weights_only=False)
    steps = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    given = json.loads((checkpoint / "stream_0.json").read_text())["stream"]["given"]
    return bool(given == 3 * steps and checkpoint.name == f"checkpoint-{steps}")


def main(folder: Path, kills: int) -> dict[str, Any]:
    draw = random.Random(0)
    (folder / "killed").mkdir(parents=True)
    found: dict[str, Any] = {"kills": 0, "in_the_middle": 0, "not_whole": [], "steps": []}
    for _ in range(kills):
        reading, writing = os.pipe()
        process = start(folder / "killed", pipe=writing)
        os.read(reading, 1)
        begin = time.monotonic()
        os.read(reading, 1)  # a step, and its checkpoint
        time.sleep(draw.uniform(0, time.monotonic() - begin))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(reading)
        os.close(writing)
        found["kills"] += os.WIFSIGNALED(status)
        found["in_the_middle"] += any((folder / "killed" / UNFINISHED).glob("*"))
        there = list((folder / "killed").glob("checkpoint-*"))
        found["not_whole"] += [path.name for path in there if not is_whole(path)]
        found["steps"].append(max((int(path.name.removeprefix("checkpoint-")) for path in there), default=0))
    os.waitpid(start(folder / "killed"), 0)
    os.waitpid(start(folder / "uninterrupted"), 0)
    ends = [folder / run / f"checkpoint-{STEPS}" for run in ("killed", "uninterrupted")]
    killed, uninterrupted = (load_file(end / "model.safetensors") for end in ends)
    found["same_end"] = all(torch.equal(killed[name], tensor) for name, tensor in uninterrupted.items())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
