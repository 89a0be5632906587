"""Evaluate a model: `python -m flamingo_blocks.evaluation MODEL vqav2 --data DIRECTORY --out DIRECTORY`.

With several GPUs: `torchrun --nproc-per-node 8 -m flamingo_blocks.evaluation ...`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tqdm import tqdm

from flamingo_blocks.evaluation.benchmarks import BENCHMARKS, Benchmark, read_benchmark, read_own_benchmark
from flamingo_blocks.evaluation.few_shot import PAPERS_SHOTS, Options, choose_queries, evaluate, read_scores
from flamingo_blocks.evaluation.rices import RicesSupport, media_vectors
from flamingo_blocks.evaluation.support import FixedSupport, RandomSupport, SupportSelector


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask a model a benchmark's queries, and write answers, scores and a plot.

    Args:
        arguments: Of the command line. None: those of this process.

    Raises:
        SystemExit: With what was wrong, if it could not be evaluated.
    """
    options = _parser().parse_args(arguments)
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not torch.distributed.is_initialized():
        # They meet at the end alone, and one may have far more to do than another.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        _run(options, process, processes)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_blocks.evaluation",
        description="Evaluate a model by few-shot prompts, as in the paper.",
    )
    parser.add_argument("model", help="directory or id of a model, or of what save_adapter wrote")
    parser.add_argument("benchmark", choices=(*BENCHMARKS, "own"), help="own: see read_own_benchmark")
    parser.add_argument(
        "--data", type=Path, required=True, help="directory of the benchmark's files, by official names"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for answers, scores and plot; a run goes on")
    parser.add_argument("--shots", type=int, nargs="+", default=list(PAPERS_SHOTS), metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of the choice of support")
    parser.add_argument(
        "--support", choices=("random", "fixed", "rices"), default="random", help="how the prompts' examples are chosen"
    )
    parser.add_argument("--balanced", action="store_true", help="each answer equally often; not with rices")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts, or candidates, at once")
    parser.add_argument("--limit", type=int, metavar="N", help="ask so many of the queries, always the same ones")
    parser.add_argument("--beams", type=int, default=3, help="of the search for open answers")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an open answer; 32 for captions, 16 else")
    parser.add_argument("--ensemble", type=int, default=1, metavar="N", help="orders of the support to average over")
    parser.add_argument("--length-normalization", choices=("none", "tokens"), default="none")
    parser.add_argument("--skip-missing", action="store_true", help="leave out examples whose image is not there")
    parser.add_argument("--device", help="by default cuda, if there is one")
    parser.add_argument("--dtype", default="auto", help="of the model, such as bfloat16; auto: as it was saved")
    return parser


def _run(options: argparse.Namespace, process: int, processes: int) -> None:
    read = read_own_benchmark if options.benchmark == "own" else partial(read_benchmark, options.benchmark)
    benchmark = read(options.data, skip_missing=options.skip_missing)
    model, processor = load_model(options.model, dtype=options.dtype)
    model.to(options.device or _own_device()).eval()
    select = _selector(options, benchmark, model, processor, process)
    with tqdm(desc=benchmark.name, disable=process > 0, unit=" queries") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        evaluate(
            model,
            processor,
            benchmark,
            select,
            out=options.out,
            shots=options.shots,
            seeds=options.seeds,
            batch_size=options.batch_size,
            options=Options(
                num_beams=options.beams,
                max_new_tokens=options.max_new_tokens,
                ensemble=options.ensemble,
                length_normalization=options.length_normalization,
            ),
            limit=options.limit,
            about={"model": options.model, "dtype": str(model.dtype), "balanced": options.balanced},
            process=process,
            processes=processes,
            progress=show,
        )
    if processes > 1:
        torch.distributed.barrier()
    if process:
        return
    scores = read_scores(benchmark, options.out, limit=options.limit)
    (options.out / "scores.json").write_text(
        json.dumps({"benchmark": benchmark.name, "metric": scores.metric, "by_shots": scores.by_shots}, indent=1) + "\n"
    )
    (options.out / "scores.md").write_text(scores.table())
    scores.plot(options.out / "scores.png", title=f"{options.model}: {benchmark.name}")
    sys.stdout.write(
        f"{scores.table()}\nWritten to {options.out}: scores.json, scores.md, scores.png, answers-*.jsonl\n"
    )


def load_model(name_or_path: str, *, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its processor: a Flamingo, an adapter of one, or another model of images and text.

    Args:
        name_or_path: Directory or id.
        dtype: Of the model.

    Raises:
        OSError: If there is no such model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import flamingo_blocks.processing_flamingo  # noqa: F401 # which tells the Auto classes of itself
    from flamingo_blocks.adapter import RECORD
    from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration

    if (Path(name_or_path) / RECORD).exists():
        model: Any = FlamingoForConditionalGeneration.from_adapter(
            name_or_path, dtype=None if dtype == "auto" else dtype
        )
    else:
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
    return model, AutoProcessor.from_pretrained(name_or_path)


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _selector(
    options: argparse.Namespace, benchmark: Benchmark, model: Any, processor: Any, process: int
) -> SupportSelector:
    if options.support != "rices":
        kind = RandomSupport if options.support == "random" else FixedSupport
        return kind(benchmark.support, balanced=options.balanced)
    if len(options.seeds) > 1 or options.balanced:
        raise ValueError("with --support rices nothing is drawn: give one seed, and leave out --balanced")
    queries = choose_queries(benchmark, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    asked = "queries" if options.limit is None else f"{options.limit}-queries"
    files = {"support": options.out / "support.safetensors", "queries": options.out / f"{asked}.safetensors"}
    examples = {"support": benchmark.support, "queries": queries}
    if process and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process makes the vectors, the others read them
    vectors = [media_vectors(model, processor, examples[name], path=path) for name, path in files.items()]
    if not process and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return RicesSupport(benchmark.support, *vectors)


if __name__ == "__main__":
    main()
