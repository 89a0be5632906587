"""The command line: from a model and a benchmark in folders to scores in a folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_blocks.evaluation import AnswerLog
from flamingo_blocks.evaluation.__main__ import load_model, main
from tests.evaluation.tiny_annotations import write_hateful_memes, write_image_folder, write_karpathy, write_vqa
from tests.tiny_flamingo import make_flamingo

OPTIONS = ("--batch-size", "2", "--max-new-tokens", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model`."""
    root = tmp_path_factory.mktemp("evaluation")
    model: Any
    model, processor = make_flamingo()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


def fill(root: Path) -> Path:
    """Draw each image, which the annotations only name."""
    for number, path in enumerate(sorted([*root.rglob("*.jpg"), *root.rglob("*.png"), *root.rglob("*.JPEG")])):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


BENCHMARKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "vqav2": (write_vqa, "vqa_accuracy"),
    "coco": (write_karpathy, "cider"),
    "hateful_memes": (write_hateful_memes, "roc_auc"),
    "image_folder": (write_image_folder, "top_1"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_evaluated(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, metric = BENCHMARKS[name]
    data, out = fill(write(tmp_path / "data")), tmp_path / "new" / "out"
    arguments = [str(folder / "model"), name, "--data", str(data), "--out", str(out), "--shots", "1"]
    arguments += ["--seeds", "0", "3", *OPTIONS]
    main(arguments)
    found = json.loads((out / "scores.json").read_text())
    assert found["benchmark"] == name
    assert found["metric"] == metric
    assert set(found["by_shots"]["1"]) == {"0", "3"}
    assert all(0 <= score <= 10 for score in found["by_shots"]["1"].values())
    table = (out / "scores.md").read_text()
    assert table in capsys.readouterr().out
    assert Image.open(out / "scores.png").width > 300
    written = (out / "answers-0.jsonl").read_text()
    main(arguments)
    assert (out / "answers-0.jsonl").read_text() == written, "nothing is asked twice"


def test_support_is_chosen_by_likeness(folder: Path, tmp_path: Path) -> None:
    data, out = fill(write_vqa(tmp_path / "data")), tmp_path / "out"
    # Each query's image is one of the support's.
    for number, image in enumerate(sorted((data / "val2014").iterdir())):
        twin = sorted((data / "train2014").iterdir())[number]
        Image.open(twin).save(image)
    main(
        [
            str(folder / "model"),
            "vqav2",
            "--data",
            str(data),
            "--out",
            str(out),
            "--shots",
            "1",
            "--support",
            "rices",
            *OPTIONS,
        ]
    )
    nearest = {answer.key: answer.support for answer in AnswerLog(out).answers.values()}
    assert nearest["262148000"][0].startswith("9")
    assert nearest["393225001"][0].startswith("581921")


def test_a_model_and_an_adapter_are_loaded(folder: Path, tmp_path: Path) -> None:
    model, processor = load_model(str(folder / "model"), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    trained: Any
    trained, _ = make_flamingo(freeze=())  # so that the adapter holds the backbones, too
    trained.save_adapter(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, of_adapter = load_model(str(tmp_path))
    assert type(of_adapter) is type(processor)
    tensors = loaded.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--support", "rices", "--seeds", "0", "1"], "nothing is drawn"),
        (["--support", "rices", "--balanced"], "nothing is drawn"),
        (["--shots", "9"], "shots must be at most"),
        (["--data", "nowhere"], "put files and folders of these names there"),
    ],
)
def test_what_is_wrong_is_said(options: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    data = fill(write_vqa(tmp_path / "data"))
    arguments = [
        str(folder / "model"),
        "vqav2",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        *OPTIONS,
        *options,
    ]
    with pytest.raises(SystemExit, match=message):
        main(arguments)


@pytest.mark.slow
def test_several_processes_find_what_one_finds(folder: Path, tmp_path: Path) -> None:
    data = fill(write_vqa(tmp_path / "data"))
    arguments = [
        str(folder / "model"),
        "vqav2",
        "--data",
        str(data),
        "--support",
        "rices",
        "--shots",
        "0",
        "2",
        *OPTIONS,
    ]
    main([*arguments, "--out", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "flamingo_blocks.evaluation", *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert AnswerLog(tmp_path / "one").answers == AnswerLog(tmp_path / "two").answers
    assert (tmp_path / "one" / "scores.json").read_text() == (tmp_path / "two" / "scores.json").read_text()
    assert (tmp_path / "two" / "answers-1.jsonl").exists()
    assert not torch.distributed.is_initialized()
