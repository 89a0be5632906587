"""Run where the wheel is installed without extras: build, train, generate, save and load a model."""

import importlib
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import flamingo_blocks
from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.data import document_from_html
from flamingo_blocks.video import VideoFile

if not Path(flamingo_blocks.__file__).is_relative_to(sys.prefix):
    raise SystemExit(f"the package is not the installed one: {flamingo_blocks.__file__}")
if not flamingo_blocks.__version__ == version("flamingo-blocks") == sys.argv[1]:
    raise SystemExit(f"versions differ: {flamingo_blocks.__version__}, {version('flamingo-blocks')}, {sys.argv[1]}")

words = ["<bos>", "<eos>", "<pad>", "<unk>", "a", "picture", "of", "cat"]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")),
    bos_token="<bos>",
    eos_token="<eos>",
    pad_token="<pad>",
    unk_token="<unk>",
)
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
model, processor = build_flamingo(
    LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    FlamingoVisionConfig(architecture="test_vit", image_size=32),
    tokenizer=tokenizer,
    resampler_depth=1,
    resampler_heads=2,
    resampler_dim=16,
    num_latents=3,
)
inputs = processor(text="<image> a picture of", images=Image.new("RGB", (40, 30)))
model.train()
model(**inputs, labels=inputs["input_ids"]).loss.backward()
model.train(False)
generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again = FlamingoForConditionalGeneration.from_pretrained(folder).train(False)
    inputs = FlamingoProcessor.from_pretrained(folder)(text="<image> a picture of", images=Image.new("RGB", (40, 30)))
    if not torch.equal(again(**inputs).logits, model(**inputs).logits):
        raise SystemExit("the saved model is another one")

images: dict[str, bytes] = {}
uses: dict[str, Callable[[], object]] = {
    "data": lambda: document_from_html("<p>text</p>", resolve=images.get),
    "training": lambda: importlib.import_module("flamingo_blocks.training"),
    "video": lambda: VideoFile(__file__).duration(),
}
for extra, use in uses.items():
    try:
        use()
    except ImportError as error:
        if f"flamingo-blocks[{extra}]" not in str(error):
            raise SystemExit(f"the extra {extra} is missing, but the error does not name it: {error}") from error
    else:
        raise SystemExit(f"the environment is not empty: it has what the extra {extra} installs")
