"""FlamingoTrainer: transformers' Trainer for several datasets at once, on one process or many.

Source: Alayrac et al. 2022 (Flamingo), section 2.4 and appendix B.1.2.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from flamingo_blocks.blocks import GatedCrossAttentionBlock
from flamingo_blocks.language import find_decoder_layers
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.optimization import parameter_groups

try:
    from accelerate.utils import gather_object
except ImportError as error:
    raise ImportError("training needs accelerate; install it with: pip install flamingo-blocks[training]") from error

# Beside the checkpoints, under a name that nothing takes for one of them.
UNFINISHED = "unfinished-checkpoint"


@runtime_checkable
class TrainingLoader(Protocol):
    """What a `FlamingoTrainer` reads: batches of several datasets, without an end.

    Each batch is what the model's `forward` takes, with `labels`, the name of its `"dataset"` and its `"loss_weight"`,
    the paper's lambda. Each process has a loader of its own, with documents of its own; at the same time all have
    batches of the same dataset. A loader must not draw from torch's global random numbers, else a resumed run is
    another one.

    Attributes:
        batches_per_step: How many batches make a round: one of each dataset, in the same order each time; or 1 if the
            datasets take turns.
    """

    batches_per_step: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give batches, from where the stream stands."""

    def state_dict(self) -> dict[str, Any]:
        """Tell where the stream stands after the batches given so far, in what JSON can hold."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go to where a stream stood. What was made for another number of workers is an error."""


class FlamingoTrainer(Trainer):
    """Train a Flamingo on several datasets, as the paper does.

    The loss of a step is the sum over the datasets of lambda * the mean negative log-likelihood of the dataset's
    tokens, those of all processes together. With `gradient_accumulation_steps` of k rounds of the loader, it is the
    mean of the rounds' losses. Everything else is the Trainer's: optimizers, schedules, precision, DDP and FSDP2,
    evaluation, logging, progress bars.

    Weight decay is that of `parameter_groups`. Beside the loss, each dataset's own loss is logged (`loss/<dataset>`,
    without its lambda), the mean number of tokens with a loss of a step (`tokens_per_step`), and what the gates let
    through, |tanh(alpha)| (`gate/<layer>_attention`, `gate/<layer>_feed_forward`).

    A checkpoint holds where the stream of data stands, so that a resumed run goes on with the same bits as one that
    was not interrupted, with as many processes and workers as before. It is written beside the others and gets its name
    only when it is whole: what `resume_from_checkpoint=True` finds is never a half one. Processes on several machines
    need an `output_dir` that they share.

    Under FSDP2, decoder layers, blocks, the resampler and the vision encoder are units of their own; they may be of
    different dtypes.

    Args:
        model: A Flamingo, PEFT's wrapper around one included.
        args: As for any Trainer. `max_steps` must be given, since a loader has no end. `ignore_data_skip` is set: the
            loader finds its place by itself.
        loader: What gives the batches, see `TrainingLoader`. None: to evaluate only.
        **options: As for any Trainer, e.g. `eval_dataset` and `data_collator` for evaluation.

    Attributes:
        loader: The loader.

    Raises:
        ValueError: If `max_steps` is missing, `gradient_accumulation_steps` does not fit the loader, or an option
            would not do what it says.

    Source: Alayrac et al. 2022, section 2.4 (the weighted sum of the datasets' losses, accumulated over one batch of
    each). Differs from the paper: no.
    """

    # Nothing else than compute_loss may scale the loss. (transformers before 5.24 knows by the model's arguments.)
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        loader: TrainingLoader | None = None,
        **options: Any,
    ) -> None:
        _check_options(args, options)
        if loader is not None:
            _check_steps(args, loader)
        args.ignore_data_skip = True
        self.loader = loader
        self._unfinished: Path | None = None
        self._forget_losses()
        super().__init__(model, args, **options)
        if args.n_gpu > 1:
            raise ValueError(
                f"one process cannot train on {args.n_gpu} devices here; start one process a device, with torchrun "
                "or accelerate launch"
            )
        _flamingo(model).always_encodes = self.accelerator.num_processes > 1
        if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            self._prepare_for_fsdp()

    # ------------------------------------------------------------ data

    def get_train_dataloader(self) -> Any:
        """Get the loader as it is: each process has its own part of the data already."""
        if self.loader is None:
            raise ValueError("training needs a loader; pass loader=, e.g. a Mixture's")
        return self.loader

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As the Trainer's; but a run without an end is one epoch, else one that is resumed at its end goes on."""
        values = super().set_initial_training_values(args, dataloader)
        return (1, *values[1:])

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: Any) -> Any:
        """Read the batches of a step, and count the tokens of each over all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        for batch in batches:
            _check_batch(batch)
        counts = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).to(device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        self._num_tokens += counts.sum()
        # An integer, which mixed precision leaves alone; and no 0, by which the loss is divided.
        totals = counts.clamp(min=1).unbind()
        return [
            batch | {"num_items_in_batch": total} for batch, total in zip(batches, totals, strict=True)
        ], counts.sum()

    # ------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """Give this batch's share of the step's loss: lambda * its sum over the number of all processes' tokens.

        It is multiplied by the number of processes, by which DDP and FSDP2 divide gradients, and divided by the number
        of rounds. In evaluation it is the model's own loss.
        """
        inputs = dict(inputs)
        dataset, weight = inputs.pop("dataset", None), inputs.pop("loss_weight", None)
        if not model.training or self.loader is None:
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(**inputs)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        before = self._loss_sums.get(dataset, 0.0)
        self._loss_sums[dataset] = before + loss.detach()
        self._loss_counts[dataset] += 1
        rounds = self.args.gradient_accumulation_steps // self.loader.batches_per_step
        loss = loss * (weight * self.accelerator.num_processes / rounds)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name what decays, by `parameter_groups`."""
        decayed = {id(parameter) for parameter in parameter_groups(model)[0]["params"]}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    # ------------------------------------------------------------ logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the datasets' losses and the gates beside the loss of training."""
        if "loss" in logs:
            logs = logs | self._dataset_logs() | gates(_flamingo(self.model))
        if self.state.max_steps > 0:
            # What the Trainer has counts from the last resumption.
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    def _dataset_logs(self) -> dict[str, float]:
        steps = sum(self._loss_counts.values()) / self.args.gradient_accumulation_steps
        logs = {"tokens_per_step": float(self._num_tokens) / steps} if steps else {}
        means = {name: float(total) / self._loss_counts[name] for name, total in self._loss_sums.items()}
        everyone = gather_object([means])  # each has its own share of each loss
        logs |= {f"loss/{name}": sum(shares[name] for shares in everyone) for name in means}
        self._forget_losses()
        return logs

    def _forget_losses(self) -> None:
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_counts: dict[str, int] = defaultdict(int)
        self._num_tokens: Tensor | int = 0

    # ------------------------------------------------------------ checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Train, or go on where a checkpoint was written.

        Args:
            resume_from_checkpoint: A checkpoint's path, or True for the last one in `output_dir`.
            *args: As for any Trainer.
            **options: As for any Trainer.

        Raises:
            ValueError: If the checkpoint does not tell where this process' stream of data stood.
        """
        self._forget_losses()  # those after the last log of an earlier run
        unfinished = Path(self._get_output_dir(None)) / UNFINISHED
        if self.args.should_save and unfinished.exists():  # of a process that was killed
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(unfinished.parent)) or True
        if isinstance(resume_from_checkpoint, str | Path) and self.loader is not None:
            resume_from_checkpoint = str(resume_from_checkpoint)
            self._load_stream(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **options)

    def _load_stream(self, checkpoint: Path) -> None:
        assert self.loader is not None
        if not checkpoint.is_dir():
            raise ValueError(f"resume_from_checkpoint must be a checkpoint's folder, but there is no {checkpoint}")
        path = checkpoint / f"stream_{self.args.process_index}.json"
        try:
            saved = json.loads(path.read_text())
        except FileNotFoundError:
            saved = {"num_processes": len(list(checkpoint.glob("stream_*.json")))}
        if saved["num_processes"] != self.args.world_size:
            raise ValueError(
                f"{checkpoint} was written by {saved['num_processes'] or 'no'} processes with a stream of data, but "
                f"now there are {self.args.world_size}; resume with as many as before, or load the model alone and "
                "begin a new run"
            )
        self.loader.load_state_dict(saved["stream"])

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and give it its name when all of it is on the disk."""
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._unfinished = run / UNFINISHED
        written = self._unfinished / name
        best = self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            if self.loader is not None and not self.args.save_only_model:
                stream = {"num_processes": self.args.world_size, "stream": self.loader.state_dict()}
                (written / f"stream_{self.args.process_index}.json").write_text(json.dumps(stream))
            if self.state.best_model_checkpoint != best:
                self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _publish(written, run / name)
        except (Exception, CheckpointException) as error:
            last = get_last_checkpoint(str(run))
            raise OSError(
                f"{name} could not be written to {run}: {error}. "
                + (f"The last one, {last}, is whole; resume from it" if last else "There is no earlier one")
                + " when there is room on the disk"
            ) from error
        finally:
            self._unfinished = None
            if self.args.should_save:
                shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        if self.args.should_save:
            self._rotate(run)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _rotate(self, run: Path) -> None:
        """Delete the oldest checkpoints; first their names, so that none is there by half."""
        best = self.state.best_model_checkpoint
        checkpoints = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)
        limit = self.args.save_total_limit or 0
        kept = max(limit if limit > 0 else len(checkpoints), 1 + (best in checkpoints[:-1]))
        for old in checkpoints[:-kept]:
            trash = Path(old).rename(run / UNFINISHED)
            shutil.rmtree(trash, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else it is pushed when it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, that of FSDP2's sharded checkpoints too."""
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    # ------------------------------------------------------------ FSDP2

    def _prepare_for_fsdp(self) -> None:
        if not self.accelerator.is_fsdp2:
            raise ValueError(
                f"FSDP was asked for, but accelerate would run {self.accelerator.distributed_type.value} on "
                f"{self.accelerator.device.type} instead of its version 2; start several processes with a GPU each, "
                "with fsdp_version 2, or leave FSDP out"
            )
        plugin: Any = self.accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing of FSDP would lose the media in recomputation; pass "
                "gradient_checkpointing=True to TrainingArguments instead"
            )
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = units(_flamingo(self.model))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        prepared = parent._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            prepare_for_generation(_flamingo(self.model))
        return prepared


def prepare_for_generation(model: nn.Module) -> None:
    """Let a model that FSDP2 has sharded generate: its parts gather their weights in all calls, not `forward` alone.

    All processes must generate at the same time; one that has finished its texts waits for the others.
    `FlamingoTrainer.train` does this by itself.

    Args:
        model: A Flamingo after `fully_shard`, or accelerate's `prepare`.
    """
    flamingo = _flamingo(model)
    flamingo.always_encodes = True
    module: Any
    for module in (flamingo, *flamingo.injector.blocks.values()):
        for method in ("generate", "encode_media", "project_media"):
            if isinstance(module, FSDPModule) and hasattr(module, method):
                register_fsdp_forward_method(module, method)  # type: ignore[arg-type]
    flamingo._is_fsdp_managed_module = True  # by which transformers keeps the processes in step


def units(model: FlamingoForConditionalGeneration) -> list[str]:
    """Name the classes of modules that FSDP2 shards one by one: each of them is called as a whole.

    Args:
        model: A Flamingo.
    """
    _, layers = find_decoder_layers(model.language_model, model.config.decoder_layers)
    modules = [*layers, *model.injector.blocks.values(), model.resampler, model.vision_encoder]
    return sorted({type(module).__name__ for module in modules})


def gates(model: nn.Module) -> dict[str, float]:
    """Tell how much each gate lets through: |tanh(alpha)|, the mean over channels where each has its own.

    Args:
        model: A Flamingo. If it is sharded, all processes must ask.

    Returns:
        By `"gate/<layer>_attention"` and `"gate/<layer>_feed_forward"`; none where blocks have no gates.
    """
    values = {}
    for layer, block in _flamingo(model).injector.blocks.items():
        # PEFT has a copy that it trains behind the block itself.
        *_, block = (module for module in block.modules() if isinstance(module, GatedCrossAttentionBlock))
        for name, gate in (("attention", block.gate), ("feed_forward", block.gate_feed_forward)):
            for alpha in gate.parameters():
                whole: Any = alpha.full_tensor() if hasattr(alpha, "full_tensor") else alpha
                values[f"gate/{layer}_{name}"] = float(whole.detach().float().tanh().abs().mean())
    return values


def _flamingo(model: Any) -> Any:
    """Find the Flamingo inside of what wraps it."""
    found = next((module for module in model.modules() if isinstance(module, FlamingoForConditionalGeneration)), None)
    if found is None:
        raise ValueError(f"model must be a Flamingo or hold one, got {type(model).__name__}")
    return found


def _check_options(args: TrainingArguments, options: dict[str, Any]) -> None:
    if args.label_smoothing_factor or options.get("compute_loss_func") is not None:
        raise ValueError(
            "label_smoothing_factor and compute_loss_func have no effect here: the loss is the datasets' weighted mean "
            "negative log-likelihood; leave them out"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size < started:
        raise ValueError(
            f"{started} processes were started, but {args.device.type} is used as if there were {args.world_size}, so "
            "that each would train alone; on CPUs pass use_cpu=True (--use_cpu)"
        )
    if options.get("train_dataset") is not None:
        raise ValueError("train_dataset is not read here; pass loader=, e.g. a Mixture's")


def _check_steps(args: TrainingArguments, loader: TrainingLoader) -> None:
    if args.max_steps <= 0:
        raise ValueError(f"max_steps must be given, since the data have no end, got {args.max_steps}")
    accumulated, batches = args.gradient_accumulation_steps, loader.batches_per_step
    if accumulated % batches:
        raise ValueError(
            f"gradient_accumulation_steps must be a multiple of {batches}, so that each step has a batch of each "
            f"dataset, got {accumulated}"
        )


def _check_batch(batch: dict[str, Any]) -> None:
    for name in ("dataset", "loss_weight", "labels"):
        if name not in batch:
            raise ValueError(f"a batch must have {name!r}, got {sorted(batch)}")


def _publish(written: Path, final: Path) -> None:
    """Give a checkpoint its name, in place of one that has it, once all of its files are on the disk."""
    _flush(*written.rglob("*"), written)
    if final.exists():
        final.rename(written.parent / "replaced")
    written.rename(final)
    _flush(final.parent)


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
