"""The paper's ablations in miniature: does each part of Flamingo matter? No downloads.

Each row of the table turns one switch of the model or of its training, and nothing else: the same backbones, the same
data in the same order, the same number of steps. Rows are those of table 3 of the paper (Alayrac et al. 2022) that have
a miniature, and a few more. The world is that of `train_tiny.py`: digits withheld from stage 3 get new names in the
prompt, and images that no stage has seen get captions.

    python examples/ablations.py --quick      # everything once, about ten minutes on two cores
    python examples/ablations.py              # five seeds; stop it when you like, it goes on where it was

writes results.jsonl, and tables and pictures of what is in it, to runs/ablations. Each run uses one thread; as many
run at a time as there are cores, and the figures do not depend on how many.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ablation_plots import plot_rows, plot_scaling
from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo
from tiny_plots import plot_gates
from tiny_world import IMAGE_SIZE, Features, draw_prompts, load_splits, make_up_characters
from train_tiny import (
    NFNET,
    NFNET_ARGUMENTS,
    Descent,
    accuracy,
    answer,
    caption_accuracy,
    captions_loss,
    encode,
    encode_split,
    episodes_loss,
    gates_of,
    make_language_model_config,
    pretrain_language_model,
    pretrain_vision_encoder,
    text_accuracy,
    text_loss,
)

# ---------------------------------------------------------------- backbones

# Architecture and arguments for timm.create_model.
VISION_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "nfnet": (NFNET, NFNET_ARGUMENTS),
    "small_nfnet": (NFNET, {**NFNET_ARGUMENTS, "channels": [16, 16, 32, 32], "stem_chs": 16, "group_size": 8}),
    "vit": (
        "vit_tiny_patch16_224",
        {
            "img_size": IMAGE_SIZE,
            "patch_size": 8,
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            "in_chans": 1,
            "num_classes": 0,
            "class_token": False,
            "global_pool": "avg",
        },
    ),
}
LANGUAGE_MODELS: dict[str, LlamaConfig] = {
    "small": make_language_model_config(layers=2, width=64),
    "medium": make_language_model_config(),
    "large": make_language_model_config(layers=6, width=128),
}


class SelfAttentionHalf(nn.Module):
    """The self-attention of a layer of Llama, as a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.attention = layer.input_layernorm, layer.self_attn

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Add what attention gives."""
        return hidden_states + self.attention(hidden_states=self.norm(hidden_states), **kwargs)[0]


class FeedForwardHalf(nn.Module):
    """The feed-forward network of a layer of Llama, as a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.feed_forward = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Add what the network gives."""
        return hidden_states + self.feed_forward(self.norm(hidden_states))


class Nothing(nn.Module):
    """A network that adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Give zeros."""
        return torch.zeros_like(hidden_states)


def cut_layers(lm: Any) -> Any:
    """Make two layers of each layer of a Llama, so that a block can stand between attention and feed-forward."""
    lm.model.layers = nn.ModuleList(
        half for layer in lm.model.layers for half in (SelfAttentionHalf(layer), FeedForwardHalf(layer))
    )
    lm.config.num_hidden_layers = lm.model.config.num_hidden_layers = len(lm.model.layers)
    return lm


def stack_layers(lm: Any) -> Any:
    """Put as many new layers on top of a Llama as it has."""
    config = LlamaConfig(**{**lm.config.to_dict(), "num_hidden_layers": 2 * lm.config.num_hidden_layers})
    taller: Any = LlamaForCausalLM(config)
    taller.load_state_dict(lm.state_dict(), strict=False)
    return taller


def leave_as_it_is(lm: Any) -> Any:
    """Change nothing."""
    return lm


def start_from_scratch(lm: Any) -> Any:
    """Forget what was learned."""
    return LlamaForCausalLM(lm.config)


def take_out_feed_forward(model: Any) -> None:
    """Leave the blocks their cross-attention alone."""
    for block in model.injector.blocks.values():
        block.feed_forward, block.norm_feed_forward = Nothing(), nn.Identity()


def train_the_top(model: Any) -> None:
    """Train the upper half of the language model's layers."""
    layers = model.language_model.model.layers
    layers[len(layers) // 2 :].requires_grad_(True)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        label: What is different.
        section: Of the paper's table 3. Empty: it is not there.
        paper: The paper's score. None: it has none.
        options: For `build_flamingo`.
        vision_encoder: Name of the vision encoder.
        language_model: Name of the language model.
        change_lm: Makes the language model that the blocks are put into.
        change_model: Changes the whole model before training.
        episodes: Whether texts in which images get names are trained on.
        captions: Whether captions are trained on.
        text: Whether text alone is trained on, too.
        round_robin: A step for each kind of data, instead of one for all.
    """

    label: str
    section: str = ""
    paper: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    vision_encoder: str = "nfnet"
    language_model: str = "medium"
    change_lm: Callable[[Any], Any] = leave_as_it_is
    change_model: Callable[[Any], None] | None = None
    episodes: bool = True
    captions: bool = True
    text: bool = False
    round_robin: bool = False


TRAIN_LM: dict[str, Any] = {"freeze": ("vision_encoder",)}
VARIANTS: dict[str, Variant] = {
    "baseline": Variant("baseline", paper=70.7),
    "no_captions": Variant("without image-text pairs", "(i)", 60.9, captions=False),
    "no_episodes": Variant("without interleaved data", "(i)", 53.4, episodes=False),
    "round_robin": Variant("round robin instead of accumulation", "(ii)", 62.9, round_robin=True),
    "no_gates": Variant("no tanh gating", "(iii)", 66.5, {"gating": "none"}),
    "open_gates": Variant("tanh gating that starts open (alpha = 1)", options={"gate_init": 1.0}),
    "vanilla": Variant(
        "VANILLA XATTN: cross-attention inside the LM's layers",
        "(iv)",
        66.9,
        {"gating": "none", "layers": (1, 3, 5, 7), "decoder_layers": "model.layers"},
        change_lm=cut_layers,
        change_model=take_out_feed_forward,
    ),
    "grafting": Variant(
        "GRAFTING: new layers on top of the LM",
        "(iv)",
        63.1,
        {"gating": "none", "layers": (4, 5, 6, 7)},
        change_lm=stack_layers,
        change_model=train_the_top,
    ),
    "middle": Variant("cross-attention in the middle alone", "(v)", 59.8, {"layers": "middle"}),
    "every_4th": Variant("cross-attention every 4th layer", "(v)", 68.8, {"cross_attention_every": 4}),
    "every_2nd": Variant("cross-attention every 2nd layer", "(v)", 68.2, {"cross_attention_every": 2}),
    "mlp": Variant("MLP instead of the resampler", "(vi)", 66.6, {"resampler": "mlp"}),
    "transformer": Variant("Transformer instead of the resampler", "(vi)", 66.7, {"resampler": "transformer"}),
    "mean_pool": Variant("mean pooling instead of the resampler", options={"resampler": "mean_pool"}),
    "all_previous": Variant("text sees all images before it, not the last", options={"attend": "all_previous"}),
    "vit": Variant("a ViT instead of the NFNet (paper: CLIP ViT-L/14)", "(vii)", 64.9, vision_encoder="vit"),
    "small_nfnet": Variant("a smaller NFNet (paper: F0)", "(vii)", 62.7, vision_encoder="small_nfnet"),
    "scratch": Variant("LM trained from scratch", "(viii)", 57.8, TRAIN_LM, change_lm=start_from_scratch),
    "fine_tuned": Variant("LM fine-tuned", "(viii)", 62.7, TRAIN_LM),
    "fine_tuned_text": Variant("LM fine-tuned, text trained on, too", options=TRAIN_LM, text=True),
    "text": Variant("LM frozen, text trained on, too", text=True),
}
SIZES: dict[str, Variant] = {
    name: Variant(
        f"{config.num_hidden_layers} layers of {config.hidden_size}",
        options={"cross_attention_hidden": config.hidden_size * 4 // 3},
        language_model=name,
    )
    for name, config in LANGUAGE_MODELS.items()
}
RUNS = VARIANTS | {name: variant for name, variant in SIZES.items() if name != "medium"}  # which is the baseline

# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        steps: Of the vision encoder, the language model and Flamingo.
        prompts: For each number of shots.
        shots: Numbers of examples in the prompt; the table has those of `table_shots`.
        table_shots: As in the paper's table.
        evaluate_on: Split of the images.
    """

    steps: tuple[int, int, int] = (700, 300, 600)
    prompts: int = 500
    shots: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    table_shots: int = 4
    evaluate_on: str = "val"


@dataclass(frozen=True)
class World:
    """Images, as a vision encoder sees them."""

    train: Features
    unseen: Features
    characters: Tensor


def withheld_digits(seed: int) -> list[int]:
    """Choose two digits that stage 3 does not see; with five seeds, each digit once."""
    return sorted((seed % 10, (seed + 5) % 10))


def seen_digits(seed: int) -> list[int]:
    """Give the others."""
    return sorted(set(range(10)) - set(withheld_digits(seed)))


def pretrain(name: str, seed: int, settings: Settings, folder: Path) -> None:
    """Train a backbone, unless it is there."""
    prepare_process()
    path = folder / f"seed{seed}" / name
    if path.exists():
        return
    partial = path.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(seed)
    if name in LANGUAGE_MODELS:
        pretrain_language_model(settings.steps[1], partial, "cpu", config=LANGUAGE_MODELS[name])
    else:
        architecture, arguments = VISION_ENCODERS[name]
        train = load_splits()["train"]
        pretrain_vision_encoder(
            train, settings.steps[0], partial, "cpu", architecture=architecture, arguments=arguments
        )
    partial.rename(path)


def build(variant: Variant, seed: int, folder: Path) -> FlamingoForConditionalGeneration:
    """Build the model of a row, ready to be trained."""
    backbones = folder / f"seed{seed}"
    torch.manual_seed(seed)
    lm: Any = LlamaForCausalLM.from_pretrained(backbones / variant.language_model)
    options: dict[str, Any] = {
        "image_size": IMAGE_SIZE,
        "channels": 1,
        "cross_attention_heads": 4,
        "cross_attention_hidden": 128,
        "resampler_dim": 64,
        "resampler_depth": 1,
        "resampler_heads": 4,
        "num_latents": 4,
        "max_frames": 1,
        **variant.options,
    }
    model, _ = build_flamingo(
        variant.change_lm(lm),
        backbones / variant.vision_encoder,
        tokenizer=AutoTokenizer.from_pretrained(backbones / variant.language_model),
        **options,
    )
    if variant.change_model is not None:
        variant.change_model(model)
    return model


@functools.lru_cache(maxsize=1)
def see_the_world(vision_encoder: str, seed: int, settings: Settings, folder: Path) -> World:
    """Encode all images, once for all rows of a seed."""
    model = build(Variant("", vision_encoder=vision_encoder), seed, folder)
    splits = load_splits()
    torch.manual_seed(seed)
    return World(
        train=encode_split(model, splits["train"], copies=3),
        unseen=encode_split(model, splits[settings.evaluate_on]),
        characters=encode(model, make_up_characters(splits["train"], seen_digits(seed))),
    )


def losses(model: FlamingoForConditionalGeneration, variant: Variant, world: World, seed: int) -> Iterable[Tensor]:
    """Give the weighted loss of a batch of each kind of data, one after the other."""
    digits = seen_digits(seed)
    if variant.episodes:
        yield episodes_loss(model, world.train, world.characters, digits)
    if variant.captions:
        images = torch.isin(world.train.digits, torch.tensor(digits)).nonzero().squeeze(-1)
        yield 0.3 * captions_loss(model, world.train, images)
    if variant.text:
        yield text_loss(model, 32, 10)


def steps_of(
    model: FlamingoForConditionalGeneration, variant: Variant, world: World, seed: int, steps: int
) -> Iterable[None]:
    """Train, step by step: one for all kinds of data or, in turn, one for each."""
    kinds = variant.episodes + variant.captions + variant.text
    descent = Descent(model, steps * kinds if variant.round_robin else steps)
    model.train()
    torch.manual_seed(seed)
    for _ in range(steps):
        if variant.round_robin:
            for loss in losses(model, variant, world, seed):
                descent.step(loss)
        else:
            descent.step(torch.stack(list(losses(model, variant, world, seed))).sum())
        yield
    model.train(False)


def gates(model: Any) -> list[tuple[float, float]]:
    """Give |tanh(alpha)| of attention and feed-forward by layer, if there are gates."""
    has_gates = model.config.gating == "tanh"
    return [(round(a, 4), round(f, 4)) for a, f in gates_of(model)] if has_gates else []


def run(name: str, seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train and evaluate a row with a seed."""
    prepare_process()
    started = time.perf_counter()
    variant = RUNS[name]
    world = see_the_world(variant.vision_encoder, seed, settings, folder)
    model: Any = build(variant, seed, folder)
    text_before = text_accuracy(model.language_model)
    history = [gates(model)]
    for _ in steps_of(model, variant, world, seed, settings.steps[2]):
        history.append(gates(model))
    few_shot = {}
    for shots in settings.shots if name in ("baseline", *SIZES) else (settings.table_shots,):
        prompts = draw_prompts(world.unseen, withheld_digits(seed), shots, settings.prompts, seed=shots)
        of_two, of_all = accuracy(answer(model, world.unseen, prompts), prompts)
        few_shot[str(shots)] = {"of_two_names": of_two, "of_all_words": of_all}
    unseen = load_splits()[settings.evaluate_on]
    return {
        "name": name,
        "seed": seed,
        "few_shot": few_shot,
        "captions": caption_accuracy(model, unseen, seen_digits(seed), blank=False),
        "text": text_accuracy(model),
        "text_of_the_lm": {"before": text_before, "after": text_accuracy(model.language_model)},
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gates": history if name == "baseline" else history[-1:],
        "seconds": round(time.perf_counter() - started, 1),
    }


def time_steps(names: Iterable[str], settings: Settings, folder: Path, *, rounds: int = 15) -> dict[str, float]:
    """Measure a training step of each row, in turns, on one thread: medians of the seconds of this process."""
    prepare_process()
    running: dict[str, Any] = {}
    for name in sorted(names, key=lambda name: RUNS[name].vision_encoder):
        variant = RUNS[name]
        world = see_the_world(variant.vision_encoder, 0, settings, folder)
        running[name] = iter(steps_of(build(variant, 0, folder), variant, world, 0, rounds + 1))
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in tqdm(range(rounds + 1), desc="timing steps"):
        for name, steps in running.items():
            begin = time.process_time()
            next(steps)
            seconds[name].append(time.process_time() - begin)
    return {name: median(values[1:]) for name, values in seconds.items()}


def prepare_process() -> None:
    """One thread, and no bars but our own."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


# ---------------------------------------------------------------- the table

Result = Mapping[str, Any]
Figure = Callable[[Result], float]


@dataclass(frozen=True)
class Spread:
    """Mean of several runs, its standard error, and how many there are."""

    mean: float
    error: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Take the mean; of a single run there is no error."""
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(fmean(values), error, len(values))

    @property
    def half_interval(self) -> float:
        """Half of the 95% interval, by Student's t."""
        return STUDENT_T[min(self.runs - 1, len(STUDENT_T) - 1)] * self.error

    @property
    def direction(self) -> str:
        """Tell whether a difference is more than chance: whether zero is outside of its 95% interval."""
        if self.runs > 1 and abs(self.mean) > self.half_interval:
            return "better" if self.mean > 0 else "worse"
        return "cannot tell"

    def write(self, *, sign: str = "") -> str:
        """Write it in points, of a hundred."""
        mean = f"{100 * self.mean:{sign}.1f}"
        return mean if math.isnan(self.error) else f"{mean} ± {100 * self.error:.1f}"


# Two-sided quantiles of Student's t at 95%, by degrees of freedom from 0 on.
STUDENT_T = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def figures_of(settings: Settings) -> dict[str, Figure]:
    """Give what is tabulated of each run. The score is the mean of both tasks; the paper's is that of five."""

    def names(result: Result) -> float:
        return float(result["few_shot"][str(settings.table_shots)]["of_all_words"])

    return {
        f"new names, {settings.table_shots} shots": names,
        "captions": lambda result: float(result["captions"]),
        "score": lambda result: (names(result) + float(result["captions"])) / 2,
        "text": lambda result: float(result["text"]),
        "text, LM alone": lambda result: float(result["text_of_the_lm"]["after"]),
    }


def by_name(results: Iterable[Result]) -> dict[str, dict[int, Result]]:
    """Sort results by row and seed."""
    found: dict[str, dict[int, Result]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        found.setdefault(result["name"], {})[result["seed"]] = result
    return found


def difference(rows: Mapping[int, Result], baseline: Mapping[int, Result], figure: Figure) -> Spread | None:
    """Compare a row with the baseline, seed by seed. None: they have no seed in common."""
    found = [figure(rows[seed]) - figure(baseline[seed]) for seed in rows if seed in baseline]
    return Spread.of(found) if found else None


def verdict(found: Spread, in_paper: float | None) -> str:
    """Say whether the miniature and the paper agree."""
    if in_paper is None or found.direction == "cannot tell":
        return found.direction
    return f"{found.direction}, {'as in' if (found.mean < 0) == (in_paper < 0) else 'unlike'} the paper"


def paper_difference(variant: Variant) -> float | None:
    """Give how far the paper's row is from its baseline."""
    baseline = VARIANTS["baseline"].paper
    return None if variant.paper is None or baseline is None else variant.paper - baseline


def table(found: Mapping[str, Mapping[int, Result]], step_times: Mapping[str, float], settings: Settings) -> str:
    """Write the table of all rows that there are results of."""
    figures = figures_of(settings)
    columns = ["", "row", *figures, "difference", "the paper's", "direction", "trained", "step"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, variant in VARIANTS.items():
        if name not in found:
            continue
        rows, in_paper = found[name], paper_difference(variant)
        compared = None if name == "baseline" else difference(rows, found.get("baseline", {}), figures["score"])
        cells = [
            variant.section,
            variant.label,
            *(Spread.of([figure(result) for result in rows.values()]).write() for figure in figures.values()),
            "" if compared is None else compared.write(sign="+"),
            "" if in_paper is None or name == "baseline" else f"{in_paper:+.1f}",
            "" if compared is None else verdict(compared, in_paper),
            f"{next(iter(rows.values()))['trained_parameters'] / 1000:.0f}k",
            f"{step_times[name] / step_times['baseline']:.2f}" if {name, "baseline"} <= step_times.keys() else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def footer(found: Mapping[str, Mapping[int, Result]]) -> str:
    """Say how many runs the tables are of, and with which versions."""
    runs = {len(rows) for rows in found.values()}
    numbers = str(min(runs)) if len(runs) == 1 else f"{min(runs)} to {max(runs)}"
    settings = next(iter(next(iter(found.values())).values()))["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    return f"Runs a row: {numbers}, of {settings['steps'][-1]} steps. With {versions}.\n"


def gates_table(baseline: Mapping[int, Result]) -> str:
    """Write the baseline's gates at the end of training, by layer."""
    ends = [result["gates"][-1] for result in baseline.values()]
    lines = ["| layer | attention | feed-forward |", "|---|---|---|"]
    for layer in range(len(ends[0])):
        cells = (Spread.of([gates[layer][kind] for gates in ends]) for kind in range(2))
        written = (f"{c.mean:.3f}" + ("" if math.isnan(c.error) else f" ± {c.error:.3f}") for c in cells)
        lines.append(f"| {layer} | {' | '.join(written)} |")
    return "\n".join(lines) + "\n"


def scaling_curves(found: Mapping[str, Mapping[int, Result]]) -> dict[str, dict[int, Spread]]:
    """Collect accuracy by shots for each size of the language model."""
    curves = {}
    for name, variant in SIZES.items():
        rows = found.get("baseline" if name == "medium" else name)
        if rows:
            shots = next(iter(rows.values()))["few_shot"]
            curves[variant.label] = {
                int(number): Spread.of([result["few_shot"][number]["of_all_words"] for result in rows.values()])
                for number in shots
            }
    return curves


def scaling_table(curves: Mapping[str, Mapping[int, Spread]]) -> str:
    """Write accuracy by shots for each size."""
    shots = list(next(iter(curves.values())))
    lines = [f"| language model | {' | '.join(map(str, shots))} |", "|---" * (len(shots) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(curve[n].write() for n in shots)} |" for label, curve in curves.items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- all together


def record(settings: Settings) -> dict[str, Any]:
    """Say with which settings and versions a result was found."""
    versions = {name: version(name) for name in ("flamingo-blocks", "timm", "torch", "transformers")}
    return {**json.loads(json.dumps(vars(settings))), "versions": versions}


def read_results(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read what earlier runs with the same settings found.

    Raises:
        SystemExit: If there are results of other settings.
    """
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole]
    others = [line["settings"] for line in lines if line["settings"] != settings]
    if others:
        raise SystemExit(f"{path} has results of other settings, {others[0]}; give another --out, or delete it")
    size = len("".join(whole).encode())
    if size < path.stat().st_size:
        os.truncate(path, size)  # the beginning of a line that a killed run left
    return lines


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The paper's ablations in miniature.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="ROW", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps, about ten minutes on two cores")
    parser.add_argument("--steps", type=int, nargs=3, metavar="N", help="of vision encoder, language model, Flamingo")
    parser.add_argument("--prompts", type=int, help="for each number of shots")
    parser.add_argument(
        "--time", action="store_true", help="measure the rows' training steps, too, a minute at the end"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--out", type=Path, help="where everything is written; by default runs/ablations or -quick")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.seeds = min(arguments.seeds, 2)
    quick = Settings(steps=(150, 200, 60), prompts=100)
    arguments.steps = tuple(arguments.steps or (quick if arguments.quick else Settings()).steps)
    arguments.prompts = arguments.prompts or (quick if arguments.quick else Settings()).prompts
    if min(arguments.seeds, arguments.jobs, arguments.prompts, *arguments.steps) < 1:
        parser.error("--seeds, --jobs, --steps and --prompts: give at least 1")
    arguments.out = arguments.out or Path("runs/ablations-quick" if arguments.quick else "runs/ablations")
    return arguments


def main() -> None:
    """Run what is missing, then write the table and the plots."""
    arguments = parse_arguments()
    settings = Settings(steps=arguments.steps, prompts=arguments.prompts)
    out, seeds = arguments.out, range(arguments.seeds)
    # Those of other steps may be there, from a run that was stopped before it had any result.
    backbones = out / f"backbones-{settings.steps[0]}-{settings.steps[1]}"
    out.mkdir(parents=True, exist_ok=True)
    recorded = record(settings)
    results = read_results(out / "results.jsonl", recorded)
    done = {(result["name"], result["seed"]) for result in results}
    runs = [RUNS[name] for name in arguments.only]
    names = {v.vision_encoder for v in runs} | {v.language_model for v in runs} | {"medium"}
    wanted = sorted(
        ((name, seed) for name in arguments.only for seed in seeds if (name, seed) not in done),
        key=lambda run: (run[1], RUNS[run[0]].vision_encoder),  # so that the images are encoded only once
    )
    # Fresh processes: torch's threads do not survive a fork.
    with workers(arguments.jobs) as pool:
        first = {
            pool.submit(pretrain, name, seed, settings, backbones): None for seed in seeds for name in sorted(names)
        }
        for future in tqdm(as_completed(first), total=len(first), desc="backbones"):
            future.result()
        later = [pool.submit(run, name, seed, settings, backbones) for name, seed in wanted]
        with (out / "results.jsonl").open("a") as file:
            for future in tqdm(as_completed(later), total=len(later), desc="runs"):
                results.append({**future.result(), "settings": recorded})
                file.write(json.dumps(results[-1]) + "\n")
                file.flush()
    if arguments.time:
        (out / "step_times.json").write_text(
            json.dumps(time_steps(arguments.only, settings, backbones), indent=1) + "\n"
        )
    report(results, settings, out)


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Give processes that run functions. When the first one fails, or the user interrupts, nothing more is begun."""
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def report(results: list[dict[str, Any]], settings: Settings, out: Path) -> None:
    """Write tables and plots of what there is."""
    times = out / "step_times.json"
    found, step_times = by_name(results), json.loads(times.read_text()) if times.exists() else {}
    (out / "table.md").write_text(f"{table(found, step_times, settings)}\n{footer(found)}")
    print((out / "table.md").read_text())
    score = figures_of(settings)["score"]
    if "baseline" in found:
        compared = {name: difference(found[name], found["baseline"], score) for name in VARIANTS if name in found}
        rows = [
            (VARIANTS[name].label, 100 * spread.mean, 100 * spread.half_interval, paper_difference(VARIANTS[name]))
            for name, spread in compared.items()
            if spread is not None and name != "baseline"
        ]
        if rows:
            plot_rows(rows, out / "rows.png")
        runs = [result["gates"] for result in found["baseline"].values()]
        plot_gates(torch.tensor(runs).mean(0).tolist(), out / "gates.png")
        (out / "gates.md").write_text(gates_table(found["baseline"]))
    if curves := scaling_curves(found):
        plot_scaling(
            {label: {n: (s.mean, s.error) for n, s in c.items()} for label, c in curves.items()}, out / "scaling.png"
        )
        (out / "scaling.md").write_text(scaling_table(curves))
    print(f"Written to {out}: results.jsonl, table.md, gates.md, scaling.md, and pictures of each")


if __name__ == "__main__":
    main()
