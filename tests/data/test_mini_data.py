"""tools/make_mini_data.py: exact annotations, disjoint splits, same bytes for the same options, whole or not at all."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[2] / "tools" / "make_mini_data.py"
SMALL = {"image_size": 96, "train": 6, "val": 4}
LAYOUTS = ("coco", "imagefolder", "ade", "llava")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_mini_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def material(tool):
    return tool.load_material()


@pytest.fixture(scope="module")
def made(tool, tmp_path_factory):
    return tool.make_mini_data(tmp_path_factory.mktemp("mini"), LAYOUTS, crops_per_image=5, **SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path):
    return json.loads(path.read_text())


# --- scenes


def test_masks_are_the_visible_ink_and_boxes_are_tight(tool, material):
    recipe = tool.Recipe(128, 1, 1, 3, (6, 9), 10, 80)
    touching = 0
    for index in range(12):
        scene = tool.make_scene(material, recipe, "train", index)
        assert scene.image.shape == (128, 128, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.labels), 128, 128)
        assert scene.masks.sum(axis=0).max() == 1, "a pixel belongs to two digits"
        for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes, strict=True):
            assert 0 <= x0 < x1 <= 128
            assert 0 <= y0 < y1 <= 128
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum() > 0, "ink outside the box"
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        np.testing.assert_array_equal(material.labels[scene.digits], scene.labels)
        touching += sum(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            for a, b in itertools.combinations(scene.boxes, 2)
        )
    assert touching, "crowded scenes without one overlap of boxes test no occlusion"


def test_the_mask_covers_the_pixels_that_were_painted(tool, material):
    recipe = tool.Recipe(64, 1, 1, 0, (1, 1), 24, 40)
    for seed in range(8):
        canvas = np.full((64, 64, 3), 90, dtype=np.float32)
        mask = tool.place_digit(np.random.default_rng(seed), canvas, [], [], material.glyphs[seed], recipe)
        change = np.abs(canvas - 90).max(axis=2)
        # Ink is at least half opaque inside the mask, at most half outside it.
        assert change[mask].min() > 0.45 * change.max()
        assert change[~mask].max() < 0.55 * change.max()
        assert abs(max(np.ptp(np.nonzero(mask), axis=1) + 1) - 32) <= 9, "the ink is not 24 to 40 px"


def test_digits_hide_little_of_each_other(tool, material):
    recipe = tool.Recipe(96, 1, 1, 0, (2, 10), 20, 60)
    covered = 0
    for index in range(12):
        masks, full_ink = [], []
        rng = np.random.default_rng(index)
        canvas = np.full((96, 96, 3), 120, dtype=np.float32)
        for _ in range(8):
            placed = tool.place_digit(rng, canvas, masks, full_ink, material.glyphs[index], recipe)
            if placed is not None:
                masks = [mask & ~placed for mask in masks] + [placed]
                full_ink.append(placed.sum())
        shown = np.array([mask.sum() for mask in masks]) / np.array(full_ink)
        assert shown.min() >= 1 - tool.MAX_HIDDEN
        covered += (shown < 1).sum()
    assert covered


def test_ink_stands_out_from_what_it_is_painted_on(tool, material):
    rng = np.random.default_rng(0)
    inks = np.array([tool.choose_ink(rng) for _ in range(200)])
    assert inks.min() >= 160 and inks.max() <= 255
    for _ in range(50):
        _, background = tool.draw_background(rng, material.photos["train"], 64)
        assert background.max() <= 153.1  # 0.6 of white


def test_digits_keep_their_asked_sizes_and_many_are_small(tool, material):
    recipe = tool.Recipe(192, 1, 1, 0, (3, 8), 10, 96)
    sides = []
    for index in range(40):
        scene = tool.make_scene(material, recipe, "train", index)
        sides += (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1).tolist()
    sides = np.array(sides)
    # Less than the smallest size only where another digit covers an end of the stroke.
    assert np.mean((sides < 9) | (sides > 98)) < 0.02
    assert np.mean(sides <= 20) > 0.2
    assert np.mean(sides >= 48) > 0.15


def test_an_image_does_not_depend_on_how_many_there_are(tool, made, tmp_path):
    tool.make_mini_data(tmp_path, ("coco",), **{**SMALL, "train": 3, "val": 5})
    for name in ("train/000002.jpg", "val/000003.jpg"):
        assert (tmp_path / "coco" / name).read_bytes() == (made / "coco" / name).read_bytes()


# --- splits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_digit_and_no_photograph_is_in_both_splits(made, layout):
    origin = read_json(made / layout / "manifest.json")["origin"]
    photos = {split: {scene["photo"] for scene in scenes} for split, scenes in origin.items()}
    digits = {split: {digit for scene in scenes for digit in scene["digits"]} for split, scenes in origin.items()}
    assert photos["train"] and photos["val"] and digits["train"] and digits["val"]
    assert not photos["train"] & photos["val"]
    assert not digits["train"] & digits["val"]


def test_the_coco_files_prove_the_split(made):
    train, val = (read_json(made / "coco" / "annotations" / f"instances_{split}.json") for split in ("train", "val"))
    for document, key in (("images", "photo"), ("annotations", "digit_index")):
        values = [{entry[key] for entry in split[document]} for split in (train, val)]
        assert values[0] and values[1]
        assert not values[0] & values[1]


def test_every_digit_and_every_photograph_has_one_split(tool, material):
    members = np.concatenate([indexes for split in tool.SPLITS for indexes in material.members[split]])
    assert sorted(members) == list(range(1797))
    for split in tool.SPLITS:
        for label, indexes in enumerate(material.members[split]):
            assert (material.labels[indexes] == label).all()
    names = [name for split in tool.SPLITS for name, _ in material.photos[split]]
    assert len(names) == len(set(names))


# --- determinism


def test_same_options_same_bytes_and_another_seed_other_images(tool, made, tmp_path):
    for layout in LAYOUTS:
        tool.make_mini_data(tmp_path / "again", (layout,), crops_per_image=5, **SMALL)
    assert contents(tmp_path / "again") == contents(made)
    tool.make_mini_data(tmp_path / "other", ("coco",), seed=1, **SMALL)
    ours, theirs = contents(made / "coco"), contents(tmp_path / "other" / "coco")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours if name.endswith(".jpg"))


# --- layouts


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_loads_with_exact_areas_boxes_and_categories(made, split, capsys):
    coco = COCO(str(made / "coco" / "annotations" / f"instances_{split}.json"))
    capsys.readouterr()
    assert [category["name"] for category in coco.loadCats(range(1, 11))][::9] == ["zero", "nine"]
    assert len(coco.imgs) == SMALL[split]
    for info in coco.imgs.values():
        with Image.open(made / "coco" / split / info["file_name"]) as image:
            assert image.size == (info["width"], info["height"]) == (96, 96)
        assert len(coco.getAnnIds(info["id"])) >= 3
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == mask.sum()
        assert annotation["iscrowd"] == 0
        assert annotation["category_id"] in coco.cats
    assert {annotation["category_id"] for annotation in coco.anns.values()} > {1, 2, 3, 4}


def test_coco_categories_are_the_digits_drawn(made, material):
    for split in ("train", "val"):
        for annotation in read_json(made / "coco" / "annotations" / f"instances_{split}.json")["annotations"]:
            assert material.labels[annotation["digit_index"]] + 1 == annotation["category_id"]


def test_imagefolder_has_every_class_in_both_splits(made, material):
    origin = read_json(made / "imagefolder" / "manifest.json")["origin"]
    for split in ("train", "val"):
        folders = sorted(path.name for path in (made / "imagefolder" / split).iterdir())
        assert folders == list("0123456789")
        images = sorted((made / "imagefolder" / split).rglob("*.jpg"), key=lambda path: path.name)
        assert len(images) == 5 * SMALL[split]
        for path, scene in zip(images, origin[split], strict=True):
            assert [material.labels[digit] for digit in scene["digits"]] == [int(path.parent.name)]
            with Image.open(path) as image:
                assert image.size == (64, 64)


def test_ade_maps_agree_with_the_coco_masks(made, capsys):
    for split, name in (("train", "training"), ("val", "validation")):
        coco = COCO(str(made / "coco" / "annotations" / f"instances_{split}.json"))
        capsys.readouterr()
        for info in coco.imgs.values():
            image = made / "ade" / "images" / name / info["file_name"]
            assert image.read_bytes() == (made / "coco" / split / info["file_name"]).read_bytes()
            with Image.open(made / "ade" / "annotations" / name / f"{image.stem}.png") as opened:
                assert opened.mode == "L"
                classes = np.asarray(opened)
            expected = np.ones_like(classes)
            for annotation in coco.loadAnns(coco.getAnnIds(info["id"])):
                expected[coco.annToMask(annotation) == 1] = annotation["category_id"] + 1
            np.testing.assert_array_equal(classes, expected)


def test_llava_conversations_and_held_out_questions(made):
    root = made / "llava"
    for name in ("train.json", "pretrain.json"):
        samples = read_json(root / name)
        assert len(samples) == SMALL["train"]
        for sample in samples:
            assert (root / "images" / sample["image"]).is_file()
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert ["<image>" in turn["value"] for turn in turns] == [True] + [False] * (len(turns) - 1)
    first = {sample["conversations"][0]["value"] for sample in read_json(root / "train.json")}
    assert len(first) > 1  # as the held-out questions, each of which is a conversation of its own
    questions = [json.loads(line) for line in (root / "val.jsonl").read_text().splitlines()]
    assert [question["question_id"] for question in questions] == list(range(len(questions)))
    annotations = read_json(made / "coco" / "annotations" / "instances_val.json")["annotations"]
    for question in questions:
        assert (root / "images" / question["image"]).is_file()
        if question["category"] == "count":
            image_id = int(Path(question["image"]).stem) + 1
            assert int(question["answer"]) == sum(entry["image_id"] == image_id for entry in annotations)


def scene_of(tool, boxes, labels):
    """A scene of 100 px whose digits fill their boxes."""
    masks = np.zeros((len(labels), 100, 100), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return tool.Scene(
        index=0,
        image=np.zeros((100, 100, 3), dtype=np.uint8),
        masks=masks,
        boxes=np.array(boxes),
        labels=np.array(labels),
        digits=np.array(labels),
        photo="",
    )


def test_pictures_in_words_show_each_digit_at_its_place(tool, made):
    # Three fills the first cell and 8 of 25 px of the next, of which seven covers more; and 2 of 25 px of the last row.
    scene = scene_of(tool, [[0, 0, 33, 25], [35, 5, 50, 77]], [3, 7])
    rows = ["three seven none none", "none seven none none", "none seven none none", "none none none none"]
    assert tool.draw_in_words(scene) == " ".join(rows)
    pictures = read_json(made / "llava" / "in_words.json")
    samples = read_json(made / "llava" / "pretrain.json")
    assert [*pictures] == [sample["id"] for sample in samples]
    for sample in samples:
        words = pictures[sample["id"]].split()
        assert len(words) == 16
        assert all(word == "none" or word in sample["conversations"][1]["value"] for word in words)


def test_questions_have_one_answer(tool):
    def ask(boxes, labels):
        return {question: answer for _, question, answer in tool.ask(scene_of(tool, boxes, labels))}

    assert ask([[50, 0, 90, 40], [10, 0, 30, 20]], [7, 3]) == {
        "How many digits are in the image?": "2",
        "Which digit is the largest?": "seven",
        "Which digit is the leftmost?": "three",
        "Which digit is directly left of the seven?": "three",
    }
    # Alike in size, and one above the other: only the count is sure.
    assert ask([[50, 0, 70, 20], [51, 50, 71, 70]], [7, 3]) == {"How many digits are in the image?": "2"}
    # Two sevens: "the seven" would be ambiguous.
    twins = ask([[50, 0, 70, 20], [5, 0, 30, 20], [80, 0, 99, 20]], [7, 3, 7])
    assert not any("left of" in question for question in twins)


# --- reuse, overwriting, atomicity


def test_complete_data_is_reused_and_other_options_are_refused(tool, tmp_path):
    tool.make_mini_data(tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tool.make_mini_data(tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"seed 0 instead of 5.*--overwrite"):
        tool.make_mini_data(tmp_path, seed=5, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    tool.make_mini_data(tmp_path, seed=5, overwrite=True, **SMALL)
    assert read_json(tmp_path / "coco" / "manifest.json")["options"]["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["coco"], "something was left behind"


def test_damage_is_noticed_and_repaired_by_overwriting(tool, tmp_path):
    tool.make_mini_data(tmp_path, **SMALL)
    lost = tmp_path / "coco" / "val" / "000001.jpg"
    lost.unlink()
    with pytest.raises(ValueError, match=r"val/000001\.jpg.*--overwrite"):
        tool.make_mini_data(tmp_path, **SMALL)
    tool.make_mini_data(tmp_path, overwrite=True, **SMALL)
    assert lost.is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_never_touched(tool, tmp_path, overwrite):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another --out"):
        tool.make_mini_data(tmp_path, overwrite=overwrite, **SMALL)
    assert contents(tmp_path) == {"coco/thesis.txt": b"mine"}


def test_a_failure_half_way_leaves_no_trace_and_keeps_the_old_data(tool, tmp_path, monkeypatch):
    tool.make_mini_data(tmp_path, **SMALL)
    before = contents(tmp_path)
    make_scene = tool.make_scene

    def fail_late(material, recipe, split, index):
        if (split, index) == ("val", 2):
            raise OSError("disk full")
        return make_scene(material, recipe, split, index)

    monkeypatch.setattr(tool, "make_scene", fail_late)
    with pytest.raises(OSError, match="disk full"):
        tool.make_mini_data(tmp_path, seed=1, overwrite=True, **SMALL)
    with pytest.raises(OSError, match="disk full"):
        tool.make_mini_data(tmp_path, ("ade",), **SMALL)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


def test_a_faster_process_with_the_same_data_is_no_error(tool, material, tmp_path, monkeypatch):
    make_scene = tool.make_scene

    def overtaken(material, recipe, split, index):
        if (split, index) == ("val", 0):
            monkeypatch.setattr(tool, "make_scene", make_scene)
            tool.make_mini_data(tmp_path, **SMALL)
        return make_scene(material, recipe, split, index)

    monkeypatch.setattr(tool, "make_scene", overtaken)
    tool.make_mini_data(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


def test_photographs_are_never_downloaded(tool, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chelsea\.png.*reinstall"):
        tool.read_photo("chelsea.png", [tmp_path])
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        tool.package_folder("no_such_package")


def test_default_place_follows_the_environment(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("PIIP_DATA", str(tmp_path))
    assert tool.default_out() == tmp_path / "mini"
    monkeypatch.delenv("PIIP_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tool.default_out() == tmp_path / "cache" / "piip" / "mini"


# --- command line


BAD = [
    ("--min-size 40 --max-size 20", "--min-size 40 is larger than --max-size 20"),
    ("--max-size 96 --image-size 96", "--max-size 96 does not fit an image of 96 px"),
    ("--min-size 3", "--min-size is 3"),
    ("--image-size 4", "--image-size is 4"),
    ("--train 0", "--train is 0"),
    ("--val -1", "--val is -1"),
    ("--seed -1", "--seed is -1"),
    ("--digits-per-image 5 2", "--digits-per-image is 5 2"),
    ("--digits-per-image 0 2", "--digits-per-image is 0 2"),
    ("--layout coco,yolo", "unknown layout 'yolo': known are coco, imagefolder, ade, llava"),
    ("--layout ,", "known are coco"),
    ("--layout imagefolder --crops-per-image 0", "--crops-per-image is 0"),
    ("--layout imagefolder --crop-size 9", "--crop-size is 9"),
    ("--layout imagefolder --val 1", "--val x --crops-per-image is 5"),
    ("--train many", "argument --train: invalid int value: 'many'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[options for options, _ in BAD])
def test_bad_options_give_one_line_and_write_nothing(tool, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    try:
        status = tool.main(["--out", str(out), *options.split()])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_too_many_digits_for_the_image(tool, tmp_path, capsys):
    arguments = "--image-size 32 --train 1 --val 1 --digits-per-image 30 30 --min-size 8 --max-size 20"
    assert tool.main(["--out", str(tmp_path), *arguments.split()]) == 2
    assert "30 digits of at least 8 px find no room in an image of 32 px" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_line_makes_what_the_function_makes(made, tmp_path):
    arguments = "--layout coco,llava --layout ade --image-size 96 --train 6 --val 4"
    command = [sys.executable, str(TOOL), "--out", str(tmp_path), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6 + 4 images" in result.stderr
    for layout in ("coco", "llava", "ade"):
        assert contents(tmp_path / layout) == contents(made / layout)
