"""Few-shot evaluation: ask a model all queries of a benchmark, for several numbers of shots and seeds, and score it.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import Tensor, nn

from flamingo_blocks.data.feature_cache import hash_tensors
from flamingo_blocks.evaluation.answers import Answer, AnswerLog
from flamingo_blocks.evaluation.benchmarks import Benchmark
from flamingo_blocks.evaluation.cider import cider
from flamingo_blocks.evaluation.classification import roc_auc, top_1
from flamingo_blocks.evaluation.generation import generate_answers
from flamingo_blocks.evaluation.prompts import Example, Prompt, write_prompt
from flamingo_blocks.evaluation.ranking import LengthNormalization, score_candidates
from flamingo_blocks.evaluation.support import SupportSelector, permutations
from flamingo_blocks.evaluation.vqa import vqa_accuracy

PAPERS_SHOTS = (0, 4, 8, 16, 32)
# Two examples without their media stand in for none, so that the model sees what an answer looks like.
TEXT_ONLY_SHOTS = 2
# Answers of each set of shots and seed whose support is chosen again when a run goes on: each may take milliseconds.
_CHECKED = 4


@dataclass(frozen=True)
class Options:
    """How answers are found. Each of these changes answers.

    Args:
        num_beams: Of the beam search, where the model writes its answers.
        max_new_tokens: Of an answer at most. None: 32 for captions, 16 else.
        ensemble: Orders of the support whose log-likelihoods are averaged, where candidates are ranked.
        length_normalization: See `score_candidates`.

    Source: Alayrac et al. 2022, appendix A.2: three beams; six orders for Hateful Memes, one else.
    """

    num_beams: int = 3
    max_new_tokens: int | None = None
    ensemble: int = 1
    length_normalization: LengthNormalization = "none"


@dataclass(frozen=True)
class Scores:
    """What came out.

    Attributes:
        metric: The benchmark's.
        by_shots: For each number of shots, by seed, the score; of sets of answers that are complete.
    """

    metric: str
    by_shots: Mapping[int, Mapping[int, float]]

    def table(self) -> str:
        """Write mean and standard error over seeds, in percent, as a table of Markdown."""
        lines = [f"| shots | {self.metric} | standard error | seeds |", "|---|---|---|---|"]
        for shots, mean, error, seeds in self.spread():
            lines.append(f"| {shots} | {100 * mean:.2f} | {'' if error is None else f'{100 * error:.2f}'} | {seeds} |")
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Draw the score by shots, with standard errors.

        Args:
            path: Where the picture goes.
            title: Above the picture.

        Raises:
            ImportError: If matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install flamingo-blocks[evaluation]") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        found = self.spread()
        axis.errorbar(
            range(len(found)),
            [100 * mean for _, mean, _, _ in found],
            yerr=[100 * (error or 0.0) for _, _, error, _ in found],
            marker="o",
            capsize=3,
        )
        axis.set_xticks(range(len(found)), [str(shots) for shots, *_ in found])
        axis.set(xlabel="examples in the prompt", ylabel=self.metric, title=title)
        axis.grid(alpha=0.3)
        figure.savefig(path, dpi=120)

    def spread(self) -> list[tuple[int, float, float | None, int]]:
        """Give shots, mean, standard error (None: of a single seed there is none) and number of seeds."""
        found = []
        for shots, by_seed in sorted(self.by_shots.items()):
            values = list(by_seed.values())
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            found.append((shots, fmean(values), error, len(values)))
        return found


def evaluate(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    select: SupportSelector,
    *,
    out: str | Path,
    shots: Sequence[int] = PAPERS_SHOTS,
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    options: Options | None = None,
    limit: int | None = None,
    about: Mapping[str, Any] | None = None,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Ask a model all queries of a benchmark.

    Answers are written down as they come. A run that was stopped goes on where it was; more shots or seeds can be asked
    for later. No answer depends on the batch size or on the number of processes, but for rounding.

    Args:
        model: In eval mode. A Flamingo, or any model of transformers that the benchmark's media can be given to.
        processor: Its processor.
        benchmark: What is asked.
        select: Chooses the support.
        out: Folder for the answers.
        shots: Numbers of support examples. 0: two examples without their media, as in the paper.
        seeds: Of the choice of support, each for an evaluation of its own.
        batch_size: How many prompts, or candidates, are run at once.
        options: How answers are found.
        limit: Ask so many of the queries, always the same ones. None: all.
        about: What else answers depend on, such as the model's name, as JSON has it. It is recorded, as is what some of
            the model's weights are: answers of another model are not mixed in.
        process: Number of this process, of `processes`.
        processes: How many share the work. Each asks its part of the queries; scores are of what all have written, so
            let each wait for all others and call `read_scores` then.
        progress: Called with how many queries are done, and of how many, for this process.

    Returns:
        The scores so far.

    Raises:
        ValueError: If `out` holds answers of other settings or of other support, there are too few support examples,
            or something is not as it must be.
    """
    options = Options() if options is None else options
    _check(shots, seeds, batch_size, process, processes)
    _check_options(benchmark, options)
    queries = choose_queries(benchmark, limit)
    settings = settings_of(benchmark, queries, select, options, about or {})
    log = AnswerLog(out, {"weights": _sample_weights(model), **settings}, process=process)
    _check_support(select, queries, log)
    asked = [
        [(number, seed, query) for query in queries[process::processes] if (number, seed, query.key) not in log.answers]
        for seed in seeds
        for number in shots
    ]
    total, done = sum(map(len, asked)), 0
    for part in asked:
        for start in range(0, len(part), batch_size):
            batch = part[start : start + batch_size]
            log.append(_answer(model, processor, benchmark, select, batch, options, batch_size))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return _score(benchmark, queries, log)


def read_scores(benchmark: Benchmark, out: str | Path, *, limit: int | None = None) -> Scores:
    """Score the answers in a folder, of all processes.

    Args:
        benchmark: What was asked.
        out: The folder.
        limit: As it was for `evaluate`.

    Raises:
        ValueError: If a file is damaged.
    """
    return _score(benchmark, choose_queries(benchmark, limit), AnswerLog(out))


def choose_queries(benchmark: Benchmark, limit: int | None) -> list[Example]:
    """Choose some of the queries, by their keys alone; more of them include those of fewer.

    Args:
        benchmark: Has them.
        limit: How many. None: all.
    """
    if limit is None:
        return benchmark.queries
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return sorted(benchmark.queries, key=lambda query: _digest(query.key))[:limit]


def settings_of(
    benchmark: Benchmark,
    queries: Sequence[Example],
    select: SupportSelector,
    options: Options,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Say what answers depend on, but for shots and seeds.

    Args:
        benchmark: What is asked.
        queries: Those that are asked.
        select: Chooses the support.
        options: How answers are found.
        about: What else there is to say.
    """
    return {
        "benchmark": benchmark.name,
        "template": benchmark.template.text,
        "candidates": None if benchmark.candidates is None else list(benchmark.candidates),
        "number_of_queries": len(queries),
        "queries": _digest(sorted(map(_describe, queries))),
        # In order: what is drawn depends on it.
        "support": _digest([[*_describe(example), example.shown_answer] for example in benchmark.support]),
        "selection": type(select).__name__,
        **vars(options),
        **about,
    }


def _describe(example: Example) -> list[Any]:
    """Say all that a prompt shows of an example, but for its answer. Of media, which may be moved, names of files."""
    sources = [getattr(medium, "source", medium) for medium in example.media]  # of a VideoFile
    names = [Path(source).name if isinstance(source, str | Path) else "" for source in sources]
    return [example.key, sorted(example.fields.items()), names]


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _sample_weights(model: Any) -> str | None:
    """Tell a model from others by the first numbers of each parameter: to read all takes long.

    Tensors of other kinds, as quantized ones, and those that are not loaded are left out.
    """
    if not isinstance(model, nn.Module):
        return None
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    plain = {name: tensor for name, tensor in found.items() if type(tensor) is Tensor and not tensor.is_meta}
    return hash_tensors({name: tensor.flatten()[:16] for name, tensor in plain.items()})[:16]


def _check_options(benchmark: Benchmark, options: Options) -> None:
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if benchmark.candidates is None and (options.ensemble != 1 or options.length_normalization != "none"):
        raise ValueError(
            f"ensemble and length_normalization are for candidates, but {benchmark.name} has none: the model writes "
            f"its answers; leave them out, got {options.ensemble} and {options.length_normalization!r}"
        )


def _check_support(select: SupportSelector, queries: Sequence[Example], log: AnswerLog) -> None:
    """Check that the first answers of each set were of the support that would be chosen now."""
    by_key = {query.key: query for query in queries}
    checked: Counter[tuple[int, int]] = Counter()
    for (shots, seed, key), answer in log.answers.items():
        checked[shots, seed] += 1
        if checked[shots, seed] > _CHECKED or key not in by_key:
            continue
        number = shots or TEXT_ONLY_SHOTS
        support = tuple(example.key for example in select(by_key[key], shots=number, seed=seed))
        if support != answer.support:
            raise ValueError(
                f"{log.folder} holds answers with other support: for query {key!r} {answer.support}, not {support}; "
                "choose it in the same way, write to another folder, or delete this one"
            )


def _check(shots: Sequence[int], seeds: Sequence[int], batch_size: int, process: int, processes: int) -> None:
    if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
        raise ValueError(f"shots must be different numbers from 0 on, got {list(shots)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= process < processes:
        raise ValueError(f"process must be in 0..{processes - 1}, the number of processes less one, got {process}")


def _answer(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    select: SupportSelector,
    batch: Sequence[tuple[int, int, Example]],
    options: Options,
    batch_size: int,
) -> list[Answer]:
    chosen = [select(query, shots=shots or TEXT_ONLY_SHOTS, seed=seed) for shots, seed, query in batch]

    def write(support: Sequence[Example], query: Example, shots: int) -> Prompt:
        tokens = {
            name: getattr(processor, name) for name in ("image_token", "end_of_chunk_token") if hasattr(processor, name)
        }
        return write_prompt(benchmark.template, support, query, show_support_media=shots > 0, **tokens)

    texts: list[str]
    scores: list[tuple[float, ...] | None]
    if benchmark.candidates is None:
        prompts = [write(support, query, shots) for support, (shots, _, query) in zip(chosen, batch, strict=True)]
        texts = generate_answers(
            model,
            processor,
            prompts,
            max_new_tokens=options.max_new_tokens or (32 if benchmark.metric == "cider" else 16),
            num_beams=options.num_beams,
            batch_size=batch_size,
        )
        scores = [None] * len(texts)
    else:
        texts, scores = [], []
        for support, (shots, seed, query) in zip(chosen, batch, strict=True):
            orders = permutations(support, count=options.ensemble, seed=seed)
            of_candidates = score_candidates(
                model,
                processor,
                [write(order, query, shots) for order in orders],
                benchmark.candidates,
                batch_size=batch_size,
                length_normalization=options.length_normalization,
            ).tolist()
            scores.append(tuple(of_candidates))
            texts.append(benchmark.candidates[of_candidates.index(max(of_candidates))])
    return [
        Answer(shots, seed, query.key, text, of_query, tuple(example.key for example in support))
        for (shots, seed, query), text, of_query, support in zip(batch, texts, scores, chosen, strict=True)
    ]


def _score(benchmark: Benchmark, queries: Sequence[Example], log: AnswerLog) -> Scores:
    by_shots: dict[int, dict[int, float]] = {}
    for shots, seed in sorted({(answer.shots, answer.seed) for answer in log.answers.values()}):
        found = [log.answers.get((shots, seed, query.key)) for query in queries]
        answers = [answer for answer in found if answer is not None]
        if len(answers) == len(queries):
            by_shots.setdefault(shots, {})[seed] = score_answers(benchmark, queries, answers)
    return Scores(benchmark.metric, by_shots)


def score_answers(benchmark: Benchmark, queries: Iterable[Example], answers: Iterable[Answer]) -> float:
    """Compute the benchmark's metric.

    Args:
        benchmark: Has the metric.
        queries: What was asked.
        answers: An answer each, in the same order.

    Returns:
        In 0..1, or for CIDEr from 0 to 10; published figures are a hundred times that.
    """
    pairs = list(zip(queries, answers, strict=True))
    match benchmark.metric:
        case "vqa_accuracy":
            return fmean(vqa_accuracy(answer.text, query.answers) for query, answer in pairs)
        case "cider":
            return cider([answer.text for _, answer in pairs], [query.answers for query, _ in pairs])[0]
        case "top_1":
            return top_1([answer.text for _, answer in pairs], [query.answers for query, _ in pairs])
        case "roc_auc":
            assert benchmark.candidates is not None
            margins = [answer.scores[1] - answer.scores[0] for _, answer in pairs if answer.scores is not None]
            return roc_auc(margins, [benchmark.candidates[1] in query.answers for query, _ in pairs])
    raise ValueError(f"metric must be vqa_accuracy, cider, top_1 or roc_auc, got {benchmark.metric!r}")
