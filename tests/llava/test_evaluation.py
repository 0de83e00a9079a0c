"""Benchmarks: reading LLaVA's layout, counting answers, files for the servers, and lmms-eval's interface."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from tiny import picture, tiny_model

from piip_llava import InputError
from piip_llava.evaluation.benchmarks import BENCHMARKS, exact, letter, letters, mean_f1, yes_or_no
from piip_llava.evaluation.run import main


def lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def playground(tmp_path):
    """Two questions of every benchmark, in the layout of LLaVA's playground."""
    root = tmp_path / "eval"
    folders = {"textvqa": "train_images", "gqa": "data/images", "pope": "val2014", "mm-vet": "images"}
    folders |= {"vqav2": "test2015", "seed_bench": "SEED-Bench-image", "scienceqa": "images/test/7"}
    for name, images in folders.items():
        (root / name / images).mkdir(parents=True)
        for i in range(2):
            picture(i).save(root / name / images / f"{i}.png")

    def ask(i: int, image: str | None = None, **more) -> dict:
        return {"question_id": i, "image": image or f"{i}.png", "text": f"What is it? {i}\nAnswer briefly.", **more}

    lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", [ask(i) for i in range(2)])
    data = [
        {"image_id": str(i), "question": f"what is it? {i}", "answers": ["two"] * 3 + ["red"] * 7} for i in range(2)
    ]
    (root / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", [ask(i) for i in range(2)])
    (root / "gqa/data/testdev_balanced_questions.json").write_text(
        json.dumps({str(i): {"answer": "two"} for i in range(2)})
    )
    lines(root / "pope/llava_pope_test.jsonl", [ask(i, category="random") for i in range(2)])
    lines(
        root / "pope/coco/coco_pope_random.json",
        [{"question_id": 0, "label": "yes"}, {"question_id": 1, "label": "no"}],
    )
    lines(root / "mm-vet/llava-mm-vet.jsonl", [ask(i) for i in range(2)])
    lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", [ask(i) for i in range(2)])
    lines(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [ask(i) for i in range(3)])
    lines(root / "seed_bench/llava-seed-bench.jsonl", [ask(i, f"SEED-Bench-image/{i}.png") for i in range(2)])
    seed = [{"question_id": i, "answer": "AB"[i], "data_type": ("image", "video")[i]} for i in range(2)]
    (root / "seed_bench/SEED-Bench.json").write_text(json.dumps({"questions": seed}))
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. this\nB. that"}, {"from": "gpt", "value": "B"}]
    samples = [{"id": "7", "image": "7/0.png", "conversations": turns}, {"id": "8", "conversations": turns}]
    (root / "scienceqa/llava_test_CQM-A.json").write_text(json.dumps(samples))
    problems = {key: {"answer": 1, "choices": ["this", "that"]} for key in ("7", "8")}
    (root / "scienceqa/problems.json").write_text(json.dumps(problems))
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    (root / "mmbench").mkdir()
    header = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
    ]
    row = ["3", "Which?", "nan", "this", "that", "", "nan", "B", "x", image, "s", "l", "c"]
    (root / "mmbench/mmbench_dev_20230712.tsv").write_text("\t".join(header) + "\n" + "\t".join(row) + "\n")
    return root


def test_every_benchmark_reads_the_layout(playground):
    rows = {name: benchmark.read(playground / name) for name, benchmark in BENCHMARKS.items()}
    sizes = {name: len(found) for name, found in rows.items()}
    assert sizes == {**dict.fromkeys(BENCHMARKS, 2), "mmbench": 1, "scienceqa": 1, "seed_bench": 1}
    for found in rows.values():
        for row in found:
            assert row["image"].startswith("base64:") or Path(row["image"]).is_file()
            assert "<image>" not in row["prompt"]
    assert rows["mmbench"][0]["prompt"] == (
        "Which?\nA. this\nB. that\nAnswer with the option's letter from the given choices directly."
    )
    assert rows["scienceqa"][0]["answer"] == "B"
    assert rows["pope"][0]["answer"] == "yes"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("B. that", "B"),
        ("The answer is C.", "C"),
        ("because", None),
        ("Bee", None),
        ("D", None),
    ],
)
def test_the_option_that_an_answer_names(answer, expected):
    assert letter(answer, 3) == expected


def test_counting():
    rows = [{"answer": "B"}, {"answer": "A"}]
    assert letters(rows, ["B. that", "B"]) == 50
    assert exact([{"answer": "two"}, {"answer": "red"}], ["Two.", "blue"]) == 50
    assert [yes_or_no(a) for a in ("Yes", "No", "no, it is. Yes", "It is not.", "Nothing")] == [
        True,
        False,
        False,
        False,
        True,
    ]
    pope = [{"category": c, "answer": a} for c in ("x", "y") for a in ("yes", "no")]
    assert mean_f1(pope, ["yes", "no", "yes", "yes"]) == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_files_that_are_not_there(playground, capsys):
    (playground / "gqa/llava_gqa_testdev_balanced.jsonl").unlink()
    with pytest.raises(InputError, match=r"llava_gqa_testdev_balanced.jsonl cannot be read: No such file"):
        BENCHMARKS["gqa"].read(playground / "gqa")
    common = ["--model_path", "nowhere", "--data", str(playground)]
    assert main([*common, "--benchmarks", "gqa"]) == 2
    assert main([*common, "--benchmarks", "gqq"]) == 2
    assert "unknown benchmark 'gqq' (did you mean gqa?)" in capsys.readouterr().err


@pytest.mark.slow
def test_lmms_eval_asks_and_the_files_are_written(playground, tmp_path):
    pytest.importorskip("lmms_eval", reason="needs the eval extra")
    pytest.importorskip("openpyxl", reason="needs the eval extra")
    from piip_llava.evaluation.lmms import PiipLlavaLmms
    from piip_llava.evaluation.run import evaluate

    torch.manual_seed(0)
    model, processor = tiny_model()
    model.generation_config.max_new_tokens = 3
    lm = PiipLlavaLmms(model=model, processor=processor, batch_size=2)
    for name, benchmark in BENCHMARKS.items():
        result = evaluate(lm, name, playground, tmp_path / "out")
        answers = [json.loads(line) for line in (tmp_path / f"out/{name}_answers.jsonl").read_text().splitlines()]
        rows = benchmark.read(playground / name)
        assert [a["prompt"] for a in answers] == [r["prompt"] for r in rows]
        assert result["questions"] == len(rows)
        assert ("submission" in result) is (name in ("mmbench", "mm-vet", "vqav2"))
    # The answer is the model's own to the training template's prompt.
    prompt = processor.apply_chat_template([{"role": "user", "content": "<image>\n" + answers[0]["prompt"]}])
    given = processor(images=picture(0), text=prompt)
    out = model.generate(**given, max_new_tokens=128, do_sample=False)
    assert processor.decode(out[0, given["input_ids"].shape[1] :]).strip() == answers[0]["text"]
    assert json.loads((tmp_path / "out/mm-vet.json").read_text()).keys() == {"v1_0", "v1_1"}
    assert [q["question_id"] for q in json.loads((tmp_path / "out/vqav2_test2015.json").read_text())] == [0, 1, 2]
    from openpyxl import load_workbook

    table = list(load_workbook(tmp_path / "out/mmbench_dev_20230712.xlsx").active.values)
    assert table[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer")
    assert table[1][0] == "3"


def test_text_vqa_counts_agreement():
    pytest.importorskip("lmms_eval", reason="needs the eval extra")
    from piip_llava.evaluation.benchmarks import soft_accuracy

    rows = [{"answers": ["two"] * 2 + ["red"] * 8}] * 3
    assert soft_accuracy(rows[:1], ["Red."]) == pytest.approx(100)
    assert soft_accuracy(rows[:1], ["2"]) == pytest.approx(100 * (8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert soft_accuracy(rows[:1], ["blue"]) == 0
