"""What is asked in each benchmark, and how answers are counted: LLaVA-1.5's protocols, by name.

Questions come from the folder layout of LLaVA's `playground/data/eval`. Every benchmark is brought to one form, a list
of rows `{"question_id", "image", "prompt", "answer", ...}`; images are paths, or base64 text where the file holds them.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_llava.errors import InputError

Row = dict[str, Any]
SINGLE_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in one protocol.

    Attributes:
        protocol: What the protocol is called in results.
        read: Reads rows from the benchmark's folder.
        metric: Name of the figure.
        score: Figure in percent for rows and their answers; None where a server counts.
        submit: Writes the file that the server takes; None where there is no server.
        max_new_tokens: Longest answer.
        note: What to know of the figure.
    """

    protocol: str
    read: Callable[[Path], list[Row]]
    metric: str
    score: Callable[[Sequence[Row], Sequence[str]], float] | None = None
    submit: Callable[[Sequence[Row], Sequence[str], Path, Path], Path] | None = None
    max_new_tokens: int = 128
    note: str = ""


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the benchmark's file {path} cannot be read: {error.strerror}") from None


def read_lines(path: Path) -> list[Row]:
    """Read a file of one JSON object per line.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return [json.loads(line) for line in _file(path).splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"the benchmark's file {path} is not one JSON object per line: {error}") from None


def _questions(file: Path, images: Path) -> list[Row]:
    rows = read_lines(file)
    return [
        {"question_id": row["question_id"], "image": str(images / row["image"]), "prompt": row["text"], "answer": ""}
        | ({"category": row["category"]} if "category" in row else {})
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------- answers


def percent(right: Sequence[bool | float]) -> float:
    """Return the mean in percent, 0 for nothing."""
    return 100 * sum(right) / len(right) if right else 0.0


def exact(rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Count answers that are right but for case and a full stop at the end."""
    return percent([_plain(a) == _plain(str(row["answer"])) for row, a in zip(rows, answers, strict=True)])


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def letter(answer: str, choices: int = len(LETTERS)) -> str | None:
    """Return the option that an answer names: `B`, `B. text`, or `The answer is B.`; None for another answer."""
    answer = answer.strip()
    known = LETTERS[:choices]
    if match := re.match(r"([A-Z])(?:$|\.(?:\s|$))", answer):
        return match[1] if match[1] in known else None
    match = re.search(r"The answer is ([A-Z])\.", answer)
    return match[1] if match and match[1] in known else None


def letters(rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Count answers that name the right option."""
    pairs = zip(rows, answers, strict=True)
    return percent([letter(a, row.get("choices", len(LETTERS))) == row["answer"] for row, a in pairs])


def yes_or_no(answer: str) -> bool:
    """Return whether an answer means yes: its first sentence has no "no" or "not"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def mean_f1(rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Return the mean over the categories of the F1 of "yes"."""
    groups: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        groups[row["category"]].append((yes_or_no(answer), row["answer"] == "yes"))
    scores = []
    for pairs in groups.values():
        hits = sum(said and true for said, true in pairs)
        total = sum(said for said, _ in pairs) + sum(true for _, true in pairs)
        scores.append(2 * hits / total if total else 0.0)
    return percent(scores)


def soft_accuracy(rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Count answers by agreement with ten people: each leaves one out, three who agree make it right."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normalise = EvalAIAnswerProcessor()
    scores = []
    for row, answer in zip(rows, answers, strict=True):
        people = [normalise(text) for text in row["answers"]]
        same = [text == normalise(answer) for text in people]
        scores.append(sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same))
    return percent(scores)


# --------------------------------------------------------------------------------------------------- benchmarks


def _textvqa(root: Path) -> list[Row]:
    rows = _questions(root / "llava_textvqa_val_v051_ocr.jsonl", root / "train_images")
    people = json.loads(_file(root / "TextVQA_0.5.1_val.json"))["data"]
    # An image may have several questions; the words of the question tell them apart.
    answers = {(entry["image_id"], entry["question"].lower()): entry["answers"] for entry in people}
    for row in rows:
        words = row["prompt"].split("\n")[0]
        key = (str(row["question_id"]), words.lower())
        if key not in answers:
            raise InputError(f"TextVQA has no answers for question {words!r} about image {key[0]}")
        row["answers"] = answers[key]
    return [{**row, "question_id": f"{row['question_id']}:{i}"} for i, row in enumerate(rows)]


def _scienceqa(root: Path) -> list[Row]:
    samples = json.loads(_file(root / "llava_test_CQM-A.json"))
    problems = json.loads(_file(root / "problems.json"))
    rows = []
    for sample in samples:
        if "image" not in sample:
            continue  # the figure is of questions with an image
        problem = problems[str(sample["id"])]
        question = sample["conversations"][0]["value"].replace("<image>", "").strip()
        rows.append(
            {
                "question_id": str(sample["id"]),
                "image": str(root / "images/test" / sample["image"]),
                "prompt": f"{question}\n{SINGLE_LETTER}",
                "answer": LETTERS[problem["answer"]],
                "choices": len(problem["choices"]),
            }
        )
    return rows


def _gqa(root: Path) -> list[Row]:
    rows = _questions(root / "llava_gqa_testdev_balanced.jsonl", root / "data/images")
    truth = json.loads(_file(root / "data/testdev_balanced_questions.json"))
    return [{**row, "answer": truth[str(row["question_id"])]["answer"]} for row in rows]


def _seed(root: Path) -> list[Row]:
    rows = _questions(root / "llava-seed-bench.jsonl", root)
    truth = {str(entry["question_id"]): entry for entry in json.loads(_file(root / "SEED-Bench.json"))["questions"]}
    entries = [(row, truth[str(row["question_id"])]) for row in rows]
    return [{**row, "answer": entry["answer"]} for row, entry in entries if entry["data_type"] == "image"]


def _pope(root: Path) -> list[Row]:
    rows = _questions(root / "llava_pope_test.jsonl", root / "val2014")
    truth: dict[str, dict[str, str]] = {}
    for file in sorted((root / "coco").glob("coco_pope_*.json")):
        category = file.stem.removeprefix("coco_pope_")
        truth[category] = {str(entry["question_id"]): entry["label"] for entry in read_lines(file)}
    if lacking := {row["category"] for row in rows} - truth.keys():
        raise InputError(f"POPE's answers are missing: {root}/coco/coco_pope_{lacking.pop()}.json")
    # Numbers of questions begin anew in each category.
    return [
        {**row, "question_id": f"{row['category']}:{row['question_id']}"}
        | {"answer": truth[row["category"]][str(row["question_id"])]}
        for row in rows
    ]


def _mmbench(root: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    path = root / "mmbench_dev_20230712.tsv"
    rows = []
    for entry in csv.DictReader(_file(path).splitlines(keepends=True), delimiter="\t"):
        options = [f"{key}. {entry[key]}" for key in "ABCD" if not _blank(entry.get(key))]
        hint = "" if _blank(entry.get("hint")) else f"{entry['hint']}\n"
        prompt = f"{hint}{entry['question']}\n" + "\n".join(options) + f"\n{SINGLE_LETTER}"
        rows.append(
            {
                "question_id": entry["index"],
                "image": f"base64:{entry['image']}",
                "prompt": prompt,
                "answer": entry.get("answer") or "",
                "choices": len(options),
            }
        )
    return rows


def _blank(value: str | None) -> bool:
    return value is None or value.strip().lower() in ("", "nan", "none")


def _mmvet(root: Path) -> list[Row]:
    return _questions(root / "llava-mm-vet.jsonl", root / "images")


def _vqav2(root: Path) -> list[Row]:
    return _questions(root / "llava_vqav2_mscoco_test-dev2015.jsonl", root / "test2015")


def _submit_mmbench(rows: Sequence[Row], answers: Sequence[str], root: Path, out: Path) -> Path:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise InputError("MMBench's file is a spreadsheet: pip install openpyxl") from None
    csv.field_size_limit(sys.maxsize)
    texts = (ILLEGAL_CHARACTERS_RE.sub("", text) for text in answers)  # a cell cannot hold control characters
    given = dict(zip((row["question_id"] for row in rows), texts, strict=True))
    lines = _file(root / "mmbench_dev_20230712.tsv").splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter="\t")
    left_out = {"hint", "category", "source", "image", "comment", "l2-category"}
    columns = [name for name in reader.fieldnames or () if name not in left_out]
    columns.insert(6, "prediction")
    book = Workbook()
    book.active.append(columns)
    for entry in reader:
        if entry["index"] in given:
            book.active.append([given[entry["index"]] if c == "prediction" else entry[c] for c in columns])
    path = out / "mmbench_dev_20230712.xlsx"
    book.save(path)
    return path


def _submit_mmvet(rows: Sequence[Row], answers: Sequence[str], root: Path, out: Path) -> Path:
    result = {f"v1_{row['question_id']}": answer for row, answer in zip(rows, answers, strict=True)}
    return _write(out / "mm-vet.json", result)


def _submit_vqav2(rows: Sequence[Row], answers: Sequence[str], root: Path, out: Path) -> Path:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normalise = EvalAIAnswerProcessor()
    given = {row["question_id"]: normalise(answer) for row, answer in zip(rows, answers, strict=True)}
    # The server wants every question of the test set, answered or not.
    every = read_lines(root / "llava_vqav2_mscoco_test2015.jsonl")
    result = [{"question_id": q["question_id"], "answer": given.get(q["question_id"], "")} for q in every]
    return _write(out / "vqav2_test2015.json", result)


def _write(path: Path, value: Any) -> Path:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(value), encoding="utf-8")
    fresh.replace(path)
    return path


BENCHMARKS: Mapping[str, Benchmark] = {
    "mmbench": Benchmark(
        "MMBench-EN dev 20230712, single letter",
        _mmbench,
        "accuracy",
        letters,
        _submit_mmbench,
        1024,
        "plain accuracy; the table has the server's circular one",
    ),
    "mm-vet": Benchmark("MM-Vet, open answers", _mmvet, "", submit=_submit_mmvet, max_new_tokens=1024),
    "textvqa": Benchmark("TextVQA val with OCR tokens", _textvqa, "accuracy", soft_accuracy),
    "scienceqa": Benchmark("ScienceQA-IMG test, single letter", _scienceqa, "accuracy", letters, None, 1024),
    "gqa": Benchmark("GQA testdev balanced", _gqa, "accuracy", exact),
    "vqav2": Benchmark("VQAv2 test-dev", _vqav2, "", submit=_submit_vqav2),
    "seed_bench": Benchmark("SEED-Bench, image part", _seed, "accuracy", letters),
    "pope": Benchmark("POPE, mean F1 of its categories", _pope, "F1", mean_f1),
}
