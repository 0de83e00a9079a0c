#!/usr/bin/env python3
"""The main jobs on real images, from nothing, on a CPU: data, pretrained branches, training, evaluation, pictures.

    python tools/demo.py                      # detection: about 10 minutes on 2 cores; results in work_dirs/demo
    python tools/demo.py --task segmentation  # the same for segmentation, in work_dirs/demo-seg
    python tools/demo.py --seed 1             # another run, in work_dirs/demo-seed1

The steps are ordinary commands, printed before they run. A run that was interrupted continues where it was; a finished
one is evaluated and drawn again. `--fresh` starts over.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_mini_data import make_mini_data
from mmengine.config import Config
from PIL import Image

from piip.budget import as_run
from piip.integrations.config import read_config
from piip.integrations.visualize import Detections, Segmentation, draw, draw_segmentation, enlarge, save_picture

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 8
PROGRESS = re.compile(r"branch \d .*|(?:Epoch|Iter)\((train|test)\) .*|epoch \d+ \* .*")
ZOOM = 4  # mini images are too small to read a label in


@dataclasses.dataclass(frozen=True)
class Task:
    """What differs between the tasks.

    Attributes:
        title: What is trained, for the table.
        project: Folder of the task.
        config: Config file, in the project's folder of mini configs.
        layout: Of the mini data.
        evaluator: Option that makes the evaluator write its predictions to the evaluation's folder, and their name.
        draw: Draws held-out images: from the data's folder, the evaluation's and the folder for the pictures.
        measure: The table's figures, from what the evaluator measured, the data's folder and the evaluation's.
    """

    title: str
    project: str
    config: str
    layout: str
    evaluator: tuple[str, str]
    draw: Callable[[Path, Path, Path], list[Path]]
    measure: Callable[[dict[str, float], Path, Path], dict[str, Any]]

    @property
    def path(self) -> Path:
        """The config file."""
        return ROOT / self.project / "configs/piip/mini" / self.config


def run(title: str, arguments: list[object], environment: dict[str, str], log: Path) -> None:
    """Run one of the project's commands, its whole output in a log file and its progress shown; ends if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n==> {title}\n    {shlex.join(['python', *words])}\n    log: {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        lines = deque(maxlen=20)
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if match := PROGRESS.search(line):
                print(f"    {match[0][:110]}", flush=True)
    if process.returncode:
        sys.stderr.writelines(lines)
        sys.exit(f"demo: '{title}' failed, see above and {log}; run the same command again to continue from here")


def draw_detections(data: Path, evaluation: Path, out: Path) -> list[Path]:
    """Draw the predictions for the first held-out images beside the images, and return the pictures' paths.

    Args:
        data: Folder of the COCO layout.
        evaluation: Folder with the evaluator's json files.
        out: Folder for the pictures.
    """
    from pycocotools import mask as rle
    from pycocotools.coco import COCO

    threshold = 0.5
    predictions = evaluation / "predictions"
    truth = COCO(str(data / "annotations/instances_val.json"))
    masks = json.loads(Path(f"{predictions}.segm.json").read_text())
    boxes = json.loads(Path(f"{predictions}.bbox.json").read_text())
    names = {number: category["name"] for number, category in truth.cats.items()}
    pictures = []
    for image_id in truth.getImgIds()[:PICTURES]:
        info = truth.imgs[image_id]
        image = np.asarray(Image.open(data / "val" / info["file_name"]).convert("RGB"))
        chosen = [i for i, box in enumerate(boxes) if box["image_id"] == image_id and box["score"] >= threshold]
        corners = np.array([boxes[i]["bbox"] for i in chosen]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        found = Detections(
            image=image,
            boxes=corners,
            scores=np.array([boxes[i]["score"] for i in chosen]),
            classes=np.array([boxes[i]["category_id"] for i in chosen]),
            names=names,
            masks=np.array([rle.decode(masks[i]["segmentation"]) for i in chosen], dtype=bool),
        )
        path = out / f"{Path(info['file_name']).stem}.png"
        save_picture(np.hstack([enlarge(image, ZOOM), draw(found, ZOOM)]), path)
        pictures.append(path)
    return pictures


def measure_detections(metrics: dict[str, float], data: Path, evaluation: Path) -> dict[str, float]:
    """Return the average precisions of the table."""
    names = {"box_AP": "bbox_mAP", "box_AP50": "bbox_mAP_50", "mask_AP": "segm_mAP", "mask_AP50": "segm_mAP_50"}
    return {name: metrics[f"coco/{key}"] for name, key in {**names, "box_AP_small": "bbox_mAP_s"}.items()}


def held_out_maps(data: Path, evaluation: Path) -> list[tuple[Path, np.ndarray, np.ndarray]]:
    """Return, for each held-out image, its path and the classes of its pixels: labelled and predicted, (H, W)."""
    found = []
    for path in sorted((data / "images/validation").glob("*.jpg")):
        maps = (data / "annotations/validation", evaluation / "maps")
        # Files count from 1, as ADE20K's.
        labelled, predicted = (np.asarray(Image.open(folder / f"{path.stem}.png")) - 1 for folder in maps)
        found.append((path, labelled, predicted))
    return found


def draw_segmentations(data: Path, evaluation: Path, out: Path) -> list[Path]:
    """Draw the predictions for the first held-out images beside the images, and return the pictures' paths."""
    meta = read_config(TASKS["segmentation"].path).test_dataloader.dataset.metainfo
    pictures = []
    for path, _, predicted in held_out_maps(data, evaluation)[:PICTURES]:
        image = np.asarray(Image.open(path).convert("RGB"))
        found = Segmentation(image, predicted, meta.classes, meta.palette)
        picture = out / f"{path.stem}.png"
        save_picture(np.hstack([enlarge(image, ZOOM), draw_segmentation(found, ZOOM)]), picture)
        pictures.append(picture)
    return pictures


def measure_segmentations(metrics: dict[str, float], data: Path, evaluation: Path) -> dict[str, Any]:
    """Return mean and per-class intersection over union, and the share of pixels whose class is right."""
    names = read_config(TASKS["segmentation"].path).test_dataloader.dataset.metainfo.classes
    count = len(names)
    confusion = np.zeros((count, count))
    for _, labelled, predicted in held_out_maps(data, evaluation):
        pairs = labelled.astype(int) * count + predicted
        confusion += np.bincount(pairs.ravel(), minlength=count * count).reshape(count, count)
    hits = confusion.diagonal()
    overlap = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    figures = {"mIoU": round(metrics["mIoU"] / 100, 4), "pixel_accuracy": round(metrics["aAcc"] / 100, 4)}
    return {**figures, "IoU": dict(zip(names, overlap.round(3).tolist(), strict=True))}


TASKS = {
    "detection": Task(
        title="Mask R-CNN",
        project="mmdetection",
        config="mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py",
        layout="coco",
        evaluator=("outfile_prefix", "predictions"),
        draw=draw_detections,
        measure=measure_detections,
    ),
    "segmentation": Task(
        title="UperNet",
        project="mmsegmentation",
        config="upernet_mini_convnext-tsb_192_144_96.py",
        layout="ade",
        evaluator=("output_dir", "maps"),
        draw=draw_segmentations,
        measure=measure_segmentations,
    ),
}
DEFAULT_OUT = {"detection": "demo", "segmentation": "demo-seg"}


def read_metrics(work_dir: Path) -> dict[str, float]:
    """Return what the last evaluation in a work dir measured."""
    latest = max(work_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(latest.read_text())


def last_checkpoint(cfg: Config) -> str:
    """Return the name of the checkpoint that a whole training ends with."""
    return (
        f"iter_{cfg.train_cfg.max_iters}.pth"
        if "max_iters" in cfg.train_cfg
        else f"epoch_{cfg.train_cfg.max_epochs}.pth"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="detection")
    parser.add_argument("--out", type=Path, help="folder of everything the demo writes but the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the folder")
    args = parser.parse_args()
    task, name = TASKS[args.task], DEFAULT_OUT[args.task]
    out = (args.out or ROOT / "work_dirs" / (name if args.seed == 0 else f"{name}-seed{args.seed}")).resolve()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    pretrained, work_dir, evaluation = out / "pretrained", out / "train", out / "test"
    minutes: dict[str, float] = {}
    start = time.monotonic()

    def lap(name: str) -> None:
        nonlocal start
        minutes[name], start = (time.monotonic() - start) / 60, time.monotonic()

    print("==> mini data: handwritten digits on photographs", flush=True)
    data = make_mini_data(layouts=(task.layout, "imagefolder"), crop_size=32, crops_per_image=10)
    print(f"    {data}")
    lap("data")
    environment = {"PIIP_DATA": str(data.parent), "PIIP_PRETRAINED": str(pretrained), "PYTHONPATH": str(ROOT)}
    cfg = read_config(task.path)
    if not all((pretrained / branch["weights"]).is_file() for branch in cfg.model.backbone.spec.branches):
        command = ["tools/pretrain_branches.py", task.path, "--data", data / "imagefolder", "--out", pretrained]
        command += ["--seed", args.seed]
        run("pretrain the branches by classification", command, environment, out / "pretrain.log")
    lap("pretraining")
    checkpoint = work_dir / last_checkpoint(cfg)
    tools = Path(task.project, "tools")
    if not checkpoint.is_file():
        # On a fresh folder there is nothing to resume, and the run starts from the pretrained branches.
        resume = ["--resume"] if (work_dir / "last_checkpoint").is_file() else []
        command = [tools / "train.py", task.path, "--work-dir", work_dir, "--seed", args.seed]
        run("train", [*command, "--no-validate", *resume], environment, out / "train.log")
    lap("training")
    command = [tools / "test.py", task.path, checkpoint, "--work-dir", evaluation]
    option, file = task.evaluator
    override = ["--cfg-options", f"test_evaluator.{option}={evaluation / file}"]
    run("evaluate on the held-out images", [*command, *override], environment, out / "test.log")
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = task.draw(data / task.layout, evaluation, out / "pictures")
    lap("evaluation")

    backbone = cfg.model.backbone.to_dict()
    cost = as_run(backbone["spec"], taps=backbone["taps"])["total"]
    result = {
        **task.measure(read_metrics(evaluation), data / task.layout, evaluation),
        "backbone_params_M": round(cost.params / 1e6, 3),
        "backbone_GMACs": round(cost.macs / 1e9, 3),
        "minutes": {name: round(value, 2) for name, value in minutes.items()},
        "seed": args.seed,
        "config": str(task.path.relative_to(ROOT)),
        "torch": torch.__version__,
    }
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{task.title} on a three-branch pyramid, held-out images (120), measured just now\n")
    for name, value in result.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        print(f"  {name:<18} {value}")
    print(f"\npictures (image, prediction): {pictures[0]} and {len(pictures) - 1} more beside it")
    print(f"metrics:                      {out / 'metrics.json'}")


if __name__ == "__main__":
    main()
