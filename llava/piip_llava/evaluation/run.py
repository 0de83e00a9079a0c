"""Run benchmarks on a model: figures, answers, and files for the servers."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piip.errors import unknown
from piip_llava.cli import Parser, add_model_options, run
from piip_llava.errors import InputError
from piip_llava.evaluation.benchmarks import BENCHMARKS, Row


def collect(items: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return answers by question: lmms-eval hands on one item per question."""
    return dict(items)


def task(name: str, rows: Path, max_new_tokens: int) -> dict[str, Any]:
    """Return lmms-eval's description of a benchmark whose rows are in a file, one JSON object per line."""
    from piip_llava.evaluation.lmms import row_image

    return {
        "task": f"piip_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": row_image,
        "doc_to_text": lambda row: row["prompt"],
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "temperature": 0, "do_sample": False},
        "process_results": lambda row, results: {"answer": (str(row["question_id"]), results[0])},
        "metric_list": [{"metric": "answer", "aggregation": collect, "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def ask(model: Any, name: str, rows: Sequence[Row], out: Path, max_new_tokens: int) -> list[str]:
    """Let lmms-eval ask a model the questions of a benchmark; returns its answers, in the rows' order.

    Args:
        model: A model behind lmms-eval's interface.
        name: The benchmark.
        rows: Its questions.
        out: Folder for what is asked.
        max_new_tokens: Longest answer.
    """
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.evaluator import simple_evaluate

    file = out / f"{name}_questions.jsonl"
    # Columns of one type throughout, which the data library insists on.
    file.write_text("".join(json.dumps({**row, "question_id": str(row["question_id"])}) + "\n" for row in rows))
    results = simple_evaluate(
        model=model,
        tasks=[ConfigurableTask(config=task(name, file, max_new_tokens))],
        bootstrap_iters=0,
        log_samples=False,
        verbosity="WARNING",
    )
    found = next(value for key, value in results["results"][f"piip_{name}"].items() if key.startswith("answer,"))
    return [found[str(row["question_id"])] for row in rows]


def evaluate(model: Any, name: str, data: Path, out: Path, limit: int | None = None) -> dict[str, Any]:
    """Run one benchmark, write answers and the server's file, and return the figure.

    Args:
        model: A model behind lmms-eval's interface.
        name: A key of `BENCHMARKS`.
        data: Folder in the layout of LLaVA's `playground/data/eval`.
        out: Folder for the results.
        limit: Only that many questions; the figure then is no benchmark's.

    Raises:
        InputError: There is no such benchmark, or its files are not there.
    """
    if name not in BENCHMARKS:
        raise InputError(unknown("benchmark", name, BENCHMARKS))
    benchmark = BENCHMARKS[name]
    out.mkdir(parents=True, exist_ok=True)
    rows = benchmark.read(data / name)[:limit]
    answers = ask(model, name, rows, out, benchmark.max_new_tokens)
    lines = [
        {"question_id": r["question_id"], "prompt": r["prompt"], "text": a} for r, a in zip(rows, answers, strict=True)
    ]
    (out / f"{name}_answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result: dict[str, Any] = {"protocol": benchmark.protocol, "questions": len(rows)}
    if benchmark.score is not None:
        result[benchmark.metric] = round(benchmark.score(rows, answers), 2)
    if benchmark.submit is not None:
        result["submission"] = str(benchmark.submit(rows, answers, data / name, out))
    if benchmark.note:
        result["note"] = benchmark.note
    if limit:
        result["limit"] = limit
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(description="Run LLaVA-1.5's benchmarks on a model, with lmms-eval (the `eval` extra).")
    add_model_options(parser)
    known = ",".join(BENCHMARKS)
    parser.add_argument("--data", type=Path, default=Path("playground/data/eval"), help="folder of the benchmarks")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/NAME)")
    parser.add_argument("--benchmarks", default=known, help=f"by commas, of {known} (default: all)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only so many questions of each, to try the commands")
    args = parser.parse_args(arguments)
    out = args.out or Path("results") / Path(args.model_path).name

    def work() -> None:
        names = [name.strip() for name in args.benchmarks.split(",") if name.strip()]
        for name in names:  # before the model is loaded
            if name not in BENCHMARKS:
                raise InputError(unknown("benchmark", name, BENCHMARKS))
            BENCHMARKS[name].read(args.data / name)
        try:
            from piip_llava.evaluation.lmms import PiipLlavaLmms
        except ImportError as error:
            raise InputError(f"{error.name} is not installed: pip install -e '.[eval]'") from None
        model = PiipLlavaLmms(
            args.model_path,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            vision_weights=args.vision_weights,
        )
        results = {}
        for name in names:
            results[name] = evaluate(model, name, args.data, out, args.limit)
            (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            sys.stdout.write(f"{name}: {json.dumps(results[name])}\n")

    return run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
