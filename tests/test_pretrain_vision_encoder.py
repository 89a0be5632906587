"""examples/pretrain_vision_encoder.py: it runs, goes on where it was stopped, and says what it cannot read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.transforms_factory import create_transform
from torch import Tensor
from transformers import BertConfig, LlamaConfig

import pretrain_vision_encoder as example
import tiny_world
from flamingo_blocks import build_flamingo
from flamingo_blocks.data import Document, IndexedSource, Medium

SCRIPT = Path(example.__file__)
DIGITS = [
    "--steps",
    "4",
    "--batch-size",
    "6",
    "--warmup",
    "1",
    "--held-out",
    "8",
    "--save-every",
    "2",
    "--workers",
    "0",
]
TEXTS = ["a handwritten two .", "a handwritten seven .", "a left three ."]


def train(*options: str, out: Path) -> Any:
    arguments = example.parse_arguments([*options, "--out", str(out), "--device", "cpu"])
    out.mkdir(exist_ok=True)
    example.train(arguments, 0, 1, torch.device("cpu"))
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of two photographs with texts, three of which cannot be read; and a BERT that knows the words."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    lines = []
    for i in range(12):
        photograph = Image.fromarray(load_sample_images().images[i % 2])
        name, text = f"images/{i}.jpg", TEXTS[i % 3]
        photograph.crop((30 * i, 0, 30 * i + 80, 60)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(text)
        lines.append(json.dumps({"image": name, "text": text}))
    whole = (folder / "images" / "3.jpg").read_bytes()
    (folder / "images" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    lines += [json.dumps({"image": "images/none.jpg", "text": "a"}), json.dumps({"image": "images/1.jpg", "text": " "})]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    config = BertConfig(
        vocab_size=len(tiny_world.VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.save_pretrained(folder / "bert")
    tiny_world.make_tokenizer().save_pretrained(folder / "bert")
    return folder


def options_for(data: Path) -> list[str]:
    options = ["--data", str(data / "pairs.jsonl"), "--text-tower", str(data / "bert"), "--image-size", "32"]
    options += ["--architecture", "test_nfnet", "--steps", "4", "--batch-size", "6"]
    return [*options, "--held-out", "3", "--workers", "0"]


@pytest.mark.parametrize(("architecture", "precision"), [("test_nfnet", "float32"), ("test_vit", "bf16")])
def test_what_is_saved_builds_a_flamingo_and_what_is_corrupt_is_told(
    architecture: str, precision: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(*options_for(data), "--architecture", architecture, "--precision", precision, out=tmp_path)
    assert torch.tensor(found["losses"]).isfinite().all()
    assert len(found["losses"]) == 4
    # All of the 14 pairs were drawn in 24.
    lines = {f"{data / 'pairs.jsonl'}: line {number}" for number in (13, 14)}
    assert found["corrupt"].keys() == {"images/3.jpg", *lines}
    printed = capsys.readouterr()
    assert all(f"cannot read {key}: {error}" in printed.err for key, error in found["corrupt"].items())
    assert "Pairs that could not be read: 3" in printed.out
    state = torch.load(tmp_path / "checkpoint.pt")["model"]
    path = str(tmp_path / "vision_encoder")
    words = len(tiny_world.VOCABULARY)
    lm = LlamaConfig(vocab_size=words, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model, processor = build_flamingo(lm, path, tokenizer=tiny_world.make_tokenizer(), num_latents=2)
    arguments = {"num_classes": 0} | json.loads(Path(path, "config.json").read_text()).get("model_args", {})
    loaded = timm.create_model(architecture, checkpoint_path=f"{path}/model.safetensors", **arguments)
    assert processor.image_processor.size == {"height": 32, "width": 32}
    for backbone in (model.vision_encoder.backbone, loaded):
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, state[f"backbone.{name}"])


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*options_for(data), "--save-every", "2", "--warmup", "1", "--workers", "1"]
    expected = train(*options, out=tmp_path / "whole")

    def stop(*_: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(example, "recall_at_1", stop)  # after the last step
        with pytest.raises(KeyboardInterrupt):
            train(*options, out=tmp_path / "stopped")
    assert len(torch.load(tmp_path / "stopped" / "checkpoint.pt")["losses"]) == 2
    found = train(*options, out=tmp_path / "stopped")
    assert (found["losses"], found["recall_at_1"]) == (expected["losses"], expected["recall_at_1"])
    states = [torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "stopped")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with pytest.raises(SystemExit, match="is of a run with other options"):
        train(*options, "--seed", "1", out=tmp_path / "stopped")


def test_too_much_that_is_corrupt_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="more pairs than --max-corrupt 1 cannot be read"):
        train(*options_for(data), "--max-corrupt", "1", out=tmp_path)
    with pytest.raises(SystemExit, match="--held-out 14 leaves nothing to train on of the 14 pairs"):
        example.load_data(data / "pairs.jsonl", 14)
    nothing = IndexedSource([Document((Medium("image", Path("none.jpg")), "a"), key=f"pair {i}") for i in range(5)])
    with pytest.raises(ValueError, match="3 pairs one after another cannot be read, such as pair 0, pair 1, pair 2"):
        example.Pairs(nothing, None, seed=None, max_corrupt=2)[0]


def test_a_folder_holds_the_same_pairs_as_a_file(data: Path) -> None:
    def pairs(path: Path) -> set[Any]:
        documents = [next(source.read(i)) for source in example.load_data(path, 4) for i in range(len(source))]
        return {(document.media, document.text) for document in documents if isinstance(document, Document)}

    more = {
        ((Medium("image", data / "images" / "none.jpg"),), "a"),
        ((Medium("image", data / "images" / "1.jpg"),), " "),
    }
    assert pairs(data / "images") == pairs(data / "pairs.jsonl") - more


def test_what_is_drawn_depends_on_seed_and_number_alone() -> None:
    def draw(seed: int, numbers: list[int]) -> dict[int, tuple[Tensor, str]]:
        source = example.digits_source(tiny_world.load_splits()["val"], 10)
        augment = create_transform(32, is_training=True)
        pairs = example.Pairs(source, augment, seed=seed, max_corrupt=0)
        return {number: pairs[number][:2] for number in numbers}

    expected, again = draw(3, list(range(20))), draw(3, [15, 2, 19, 4])
    for number, (image, text) in again.items():
        assert torch.equal(image, expected[number][0])
        assert text == expected[number][1]
    other = draw(4, list(range(10)))
    assert [text for _, text in other.values()] != [expected[number][1] for number in other]
    # An epoch shows each pair once.
    assert sorted(expected[i][1] for i in range(10)) == sorted(expected[i][1] for i in range(10, 20))


def test_recall_counts_equal_texts_as_one() -> None:
    class Known(torch.nn.Module):
        def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return batch["images"], batch["texts"]

    texts = torch.eye(3)[[0, 1, 0, 2]]
    images = torch.eye(3)[[0, 1, 0, 1]]  # the last one is taken for the second
    ids = torch.tensor([7, 8, 7, 9])
    batches = [{"images": images[part], "texts": texts[part], "text_ids": ids[part]} for part in ([0, 1, 2], [3])]
    model: Any = Known()
    assert example.recall_at_1(model, batches) == 3 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps: give at least 1"),
        (("--data", "none.jsonl"), "--data: there is no none.jsonl"),
        (("--text-tower", "bert"), "--text-tower: give --data, too"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.parse_arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        out = tmp_path / str(processes)
        options = [*DIGITS, "--batch-size", str(12 // processes), "--device", "cpu", "--out", str(out)]
        command = [sys.executable, *launch, str(SCRIPT), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found.append(json.loads((out / "metrics.json").read_text()))
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-5)
