"""examples/train.py trains on what it is given, and a run that was interrupted goes on with --resume."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import save_for_hf

import train
from flamingo_blocks import FlamingoForConditionalGeneration
from flamingo_blocks.data import Document, Medium, write_shards
from flamingo_blocks.training import FlamingoTrainer
from tests.tiny_flamingo import make_tokenizer
from tests.tiny_language_models import make_lm

ROOT = Path(__file__).parents[1]
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data as a user has them: two photographs, their captions, a page, a video's folder, and text."""
    root = tmp_path_factory.mktemp("files")
    make_lm("llama").save_pretrained(root / "lm")
    make_tokenizer().save_pretrained(root / "lm")
    overlay = {"input_size": (3, 32, 32)}
    save_for_hf(
        timm.create_model("test_vit", pretrained_cfg_overlay=overlay, img_size=32),
        str(root / "vit"),
        safe_serialization=True,
    )
    names = ("temple", "flower")
    for name, image in zip(names, load_sample_images().images, strict=True):
        Image.fromarray(image).save(root / f"{name}.jpg")
    lines = [{"image": f"{name}.jpg", "text": f"w1{i} w2{i}"} for i, name in enumerate(names)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    photos = [Medium("image", root / f"{name}.jpg") for name in names]
    pages = [Document((f"w3{i}", photos[0], "w41", photos[1], "w42 w43"), key=f"page {i}") for i in range(2)]
    write_shards(pages, root / "pages", per_shard=1)
    (root / "text.jsonl").write_text('{"text": "w40 w41 w42"}\n{"text": "w43 w44"}\n')
    return root


def options_for(files: Path) -> list[str]:
    return [
        *("--language_model", str(files / "lm"), "--vision_encoder", str(files / "vit"), "--data"),
        f"pairs={files / 'pairs.jsonl'},weight=0.2,batch_size=2,row_length=16",
        f"pages={files / 'pages'},kind=documents,batch_size=1",
        f"text={files / 'text.jsonl'},weight=0.1,batch_size=2",
    ]


def logs(path: Path) -> list[dict[str, Any]]:
    history = json.loads((path / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if key != "epoch"} for entry in history if "loss" in entry]


def test_it_trains_on_your_own_data_and_saves_the_model(files: Path, tmp_path: Path) -> None:
    words = [*QUICK, *options_for(files), "--max_steps", "2", "--learning_rate", "0.01", "--warmup_steps", "0"]
    words += ["--report_to", "tensorboard"]
    model = train.main([*words, "--output_dir", str(tmp_path / "run")])
    entries = logs(tmp_path / "run" / "checkpoint-2")
    assert len(entries) == 2
    for entry in entries:
        expected = entry["loss/pages"] + 0.2 * entry["loss/pairs"] + 0.1 * entry["loss/text"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)
    assert entries[0]["gate/0_attention"] > 0
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    shown = {f"train/{name}" for name in entries[0] if "/" in name}
    assert shown <= set(board.Tags()["scalars"])
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in trained.items())
    assert torch.equal(loaded.language_model.lm_head.weight, make_lm("llama").lm_head.weight)


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*QUICK, *options_for(files), "--max_steps", "4", "--save_steps", "2"]
    train.main([*words, "--output_dir", str(tmp_path / "whole")])
    step = FlamingoTrainer.training_step

    def stop(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(FlamingoTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main([*words, "--output_dir", str(tmp_path / "parts")])
    train.main([*words, "--output_dir", str(tmp_path / "parts"), "--resume"])
    assert logs(tmp_path / "parts" / "checkpoint-4") == logs(tmp_path / "whole" / "checkpoint-4")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_cached_features_give_the_same_losses(files: Path, tmp_path: Path) -> None:
    words = [*QUICK, *options_for(files), "--max_steps", "2", "--frozen_dtype", "bfloat16"]
    train.main([*words, "--output_dir", str(tmp_path / "pixels")])
    cached = [*words, "--feature_cache", str(tmp_path / "cache")]
    train.main([*cached, "--output_dir", str(tmp_path / "features")])
    pixels, features = (logs(tmp_path / name / "checkpoint-2") for name in ("pixels", "features"))
    for expected, found in zip(pixels, features, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.slow
def test_the_demonstration_learns(tmp_path: Path) -> None:
    train.main([*QUICK, "--max_steps", "12", "--output_dir", str(tmp_path), "--data_workers", "1"])
    entries = logs(tmp_path / "checkpoint-12")
    assert entries[-1]["loss"] < 0.95 * entries[0]["loss"]
    assert {"loss/pages", "loss/pairs", "loss/text", "gate/0_attention"} <= entries[0].keys()


def test_the_demonstrations_data_can_be_sent_to_workers_that_are_not_forked() -> None:
    for source, _ in train.tiny_data().values():
        assert next(pickle.loads(pickle.dumps(source)).read(0)) == next(source.read(0))


def test_every_kind_of_data_is_read(files: Path) -> None:
    words = [f"pairs={files}", f"a={files / 'pages'},kind=documents", f"text={files / 'text.jsonl'}"]
    with pytest.raises(ValueError, match="cannot read a in tar; known are documents in tar"):
        train.open_data([f"a={files / 'pages'}"])
    (files / "folder").mkdir()
    for name in ("temple", "flower"):
        Image.new("RGB", (4, 4)).save(files / "folder" / f"{name}.png")
        (files / "folder" / f"{name}.txt").write_text(name)
    sources = train.open_data([f"pairs={files / 'folder'},batch_size=4", *words[1:]])
    assert sources["pairs"][1] == {"batch_size": 4.0}
    texts = {name: [d.text for d in islice(source.read(0), 5)] for name, (source, _) in sources.items()}  # type: ignore[union-attr]
    assert texts == {
        "pairs": ["flower", "temple"],
        "a": ["w30w41w42 w43"],
        "text": ["w40 w41 w42", "w43 w44"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding", [[], ["--fsdp", "full_shard", "--fsdp_config", '{"version": 2}']], ids=["ddp", "fsdp2"]
)
def test_two_processes_train_as_one_with_batches_of_twice_the_size(
    sharding: list[str], files: Path, tmp_path: Path
) -> None:
    def words(rows: int) -> list[str]:
        data = [f"pairs={files / 'pairs.jsonl'},weight=0.2,batch_size={rows}"]
        data += [f"pages={files / 'pages'},kind=documents,batch_size={rows}"]
        data += [f"text={files / 'text.jsonl'},weight=0.1,batch_size={rows}"]
        return [*QUICK, *options_for(files)[:4], "--data", *data, "--max_steps", "4", "--save_steps", "2"]

    train.main([*words(2), "--output_dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed_example", *words(1), "--output_dir", str(tmp_path / "two"), *sharding]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    for resume in ([], ["--resume"]):
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, *resume], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        for expected, found in zip(
            logs(tmp_path / "one" / "checkpoint-4"), logs(tmp_path / "two" / "checkpoint-4"), strict=True
        ):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        whole = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "two" / "model")
        alone = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "one" / "model")
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-3, atol=1e-5)
        shutil.rmtree(tmp_path / "two" / "checkpoint-4")


@pytest.mark.parametrize(
    "word, message",
    [
        ("pairs=PATH,weight=much", "could not convert"),
        ("pairs=PATH,batch_size=2.5", "invalid literal for int"),
        ("pairs=PATH,colour=red", "--data must be NAME=PATH"),
        ("pairs=nowhere.jsonl", "nowhere.jsonl"),
        ("pairs", "cannot read pairs|there is no|--data must be"),
    ],
)
def test_data_that_cannot_be_understood_are_errors(word: str, message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train.open_data([word.replace("PATH", str(files / "pairs.jsonl"))])


def test_two_datasets_of_one_name_are_an_error(files: Path) -> None:
    with pytest.raises(ValueError, match="there is a dataset pairs already"):
        train.open_data([f"pairs={files / 'pairs.jsonl'}"] * 2)


@pytest.mark.parametrize("option", ["per_device_train_batch_size", "num_train_epochs", "dataloader_num_workers"])
def test_options_without_an_effect_are_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([*QUICK, f"--{option}", "2"])
    assert f"--{option} has no effect here; give " in capsys.readouterr().err


def test_data_may_be_given_one_by_one_and_a_run_goes_on_from_any_checkpoint(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, resume_from_checkpoint: Any = None) -> None:
        assert [dataset.name for dataset in self.loader.datasets] == ["pairs", "pages", "text"]
        raise InterruptedError(resume_from_checkpoint)

    monkeypatch.setattr(FlamingoTrainer, "train", stop)
    models, data = options_for(files)[:4], options_for(files)[5:]
    words = [*QUICK, *models, *(word for each in data for word in ("--data", each)), "--output_dir", str(tmp_path)]
    for more, expected in (([], "None"), (["--resume"], "True"), (["--resume_from_checkpoint", "here"], "here")):
        with pytest.raises(InterruptedError, match=expected):
            train.main([*words, *more])


def test_models_without_data_are_an_error(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--language_model", str(files / "lm")])
    assert "or none of them for the demonstration" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_tar_files_are_known_by_each_of_their_suffixes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        ((source, _),) = train.open_data([f"documents={path}"]).values()
        assert len(source) == 1
