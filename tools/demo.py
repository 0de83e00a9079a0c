#!/usr/bin/env python3
"""The main job on real images, from nothing, on a CPU: data, pretrained branches, training, evaluation, pictures.

    python tools/demo.py                # about 10 minutes on 2 cores; results in work_dirs/demo
    python tools/demo.py --seed 1       # another run, in work_dirs/demo-seed1

The steps are ordinary commands, printed before they run. A run that was interrupted continues where it was; a finished
one is evaluated and drawn again. `--fresh` starts over.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_mini_data import make_mini_data
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from piip.budget import as_run
from piip.integrations.visualize import Detections, draw, enlarge, save_picture

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "mmdetection/configs/piip/mini/mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py"
PICTURES = 8
PROGRESS = re.compile(r"branch \d .*|Epoch\((train|test)\) .*|epoch \d+ \* .*")
ZOOM = 4  # mini images are too small to read a label in


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


def draw_held_out(data: Path, predictions: Path, out: Path, threshold: float) -> list[Path]:
    """Draw the predictions for the first held-out images beside the images, and return the pictures' paths.

    Args:
        data: Folder of the COCO layout.
        predictions: Path prefix of the evaluator's json files.
        out: Folder for the pictures.
        threshold: Lowest score that is drawn.
    """
    truth = COCO(str(data / "annotations/instances_val.json"))
    masks = json.loads(Path(f"{predictions}.segm.json").read_text())
    boxes = json.loads(Path(f"{predictions}.bbox.json").read_text())
    names = {number: category["name"] for number, category in truth.cats.items()}
    out.mkdir(parents=True, exist_ok=True)
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


def read_metrics(work_dir: Path) -> dict[str, float]:
    """Return what the last evaluation in a work dir measured."""
    latest = max(work_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(latest.read_text())


def summarise(metrics: dict[str, float], minutes: dict[str, float], seed: int) -> dict[str, Any]:
    """Gather the figures of the table."""
    backbone = Config.fromfile(CONFIG).model.backbone.to_dict()
    cost = as_run(backbone["spec"], taps=backbone["taps"])["total"]
    return {
        "box_AP": metrics["coco/bbox_mAP"],
        "box_AP50": metrics["coco/bbox_mAP_50"],
        "mask_AP": metrics["coco/segm_mAP"],
        "mask_AP50": metrics["coco/segm_mAP_50"],
        "box_AP_small": metrics["coco/bbox_mAP_s"],
        "backbone_params_M": round(cost.params / 1e6, 3),
        "backbone_GMACs": round(cost.macs / 1e9, 3),
        "minutes": {name: round(value, 2) for name, value in minutes.items()},
        "seed": seed,
        "config": str(CONFIG.relative_to(ROOT)),
        "torch": torch.__version__,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of everything the demo writes but the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the folder")
    args = parser.parse_args()
    out = (args.out or ROOT / "work_dirs" / ("demo" if args.seed == 0 else f"demo-seed{args.seed}")).resolve()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    pretrained, work_dir, evaluation = out / "pretrained", out / "train", out / "test"
    minutes: dict[str, float] = {}
    start = time.monotonic()

    def lap(name: str) -> None:
        nonlocal start
        minutes[name], start = (time.monotonic() - start) / 60, time.monotonic()

    print("==> mini data: handwritten digits on photographs", flush=True)
    data = make_mini_data(layouts=("coco", "imagefolder"), crop_size=32, crops_per_image=10)
    print(f"    {data}")
    lap("data")
    environment = {"PIIP_DATA": str(data.parent), "PIIP_PRETRAINED": str(pretrained), "PYTHONPATH": str(ROOT)}
    weights = [b["weights"] for b in Config.fromfile(CONFIG).model.backbone.spec.branches]
    if not all((pretrained / name).is_file() for name in weights):
        command = ["tools/pretrain_branches.py", CONFIG, "--data", data / "imagefolder", "--out", pretrained]
        command += ["--seed", args.seed]
        run("pretrain the branches by classification", command, environment, out / "pretrain.log")
    lap("pretraining")
    epochs = Config.fromfile(CONFIG).train_cfg.max_epochs
    checkpoint = work_dir / f"epoch_{epochs}.pth"
    if not checkpoint.is_file():
        # On a fresh folder there is nothing to resume, and the run starts from the pretrained branches.
        resume = ["--resume"] if (work_dir / "last_checkpoint").is_file() else []
        command = ["mmdetection/tools/train.py", CONFIG, "--work-dir", work_dir, "--seed", args.seed]
        run("train the detector", [*command, "--no-validate", *resume], environment, out / "train.log")
    lap("training")
    command = ["mmdetection/tools/test.py", CONFIG, checkpoint, "--work-dir", evaluation]
    override = ["--cfg-options", f"test_evaluator.outfile_prefix={evaluation / 'predictions'}"]
    run("evaluate on the held-out images", [*command, *override], environment, out / "test.log")
    pictures = draw_held_out(data / "coco", evaluation / "predictions", out / "pictures", threshold=0.5)
    lap("evaluation")

    result = summarise(read_metrics(evaluation), minutes, args.seed)
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\nMask R-CNN on a three-branch pyramid, held-out images (120), measured just now\n")
    for name, value in result.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        print(f"  {name:<18} {value}")
    print(f"\npictures (image, prediction): {pictures[0]} and {len(pictures) - 1} more beside it")
    print(f"metrics:                      {out / 'metrics.json'}")


if __name__ == "__main__":
    main()
