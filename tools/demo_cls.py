#!/usr/bin/env python3
"""Classification on real images, from nothing, on a CPU: a mini pyramid beside one branch of as many multiply-adds.

    python tools/demo_cls.py            # about 7 minutes on 2 cores; results in work_dirs/demo-cls
    python tools/demo_cls.py --seed 1   # another run, in work_dirs/demo-cls-seed1

Both are trained by `classification/main.py` with the same options, on handwritten digits pasted on photographs. The
commands are printed before they run. A run that was interrupted continues after its last epoch; `--fresh` starts over.
"""

import argparse
import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from demo import ROOT, run
from make_mini_data import default_out, make_mini_data

from piip.budget import as_run

MODELS = {"pyramid": "mini_3branch_convnext_64-48-32", "single branch": "mini_baseline_convnext_64"}
# Muon learns in a few epochs what AdamW needs many for.
OPTIONS = shlex.split(
    "--epochs 8 --batch-size 32 --opt muon --lr 1e-2 --unscale-lr --warmup-epochs 1 --warmup-lr 3e-3 --min-lr 1e-4 "
    "--no-aug --mixup 0 --cutmix 0 --no-repeated-aug --no-model-ema --clip-grad 5 --num-workers 0 --eval-interval 2"
)


def figures(folder: Path) -> tuple[list[dict[str, float]], np.ndarray, list[str]]:
    """Return the figures of every epoch, and the last confusion matrix with the names of its classes."""
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    last = json.loads((folder / "evaluation.json").read_text())
    return log, np.array(last["model"]["confusion"]), last["classes"]


def confusion_summary(confusion: np.ndarray, names: list[str], most: int = 5) -> list[str]:
    """Return the recall of every class and the most frequent confusions, as lines."""
    recall = confusion.diagonal() / confusion.sum(1)
    lines = ["recall   " + "  ".join(f"{name} {share:.2f}" for name, share in zip(names, recall, strict=True))]
    wrong = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-wrong, axis=None)[:most]
    pairs = [(int(wrong.flat[k]), names[k // len(names)], names[k % len(names)]) for k in order if wrong.flat[k]]
    lines.append("mistaken " + (", ".join(f"{one} for {other} ({n}x)" for n, one, other in pairs) or "nothing"))
    return lines


def draw_curves(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw loss and held-out top-1 over the epochs, one line per model."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panel, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, log in logs.items():
        epochs = [line["epoch"] + 1 for line in log]
        tested = [line for line in log if "test_acc1" in line]
        at = [line["epoch"] + 1 for line in tested]
        (drawn,) = left.plot(epochs, [line["train_loss"] for line in log], label=f"{name}, training")
        left.plot(at, [line["test_loss"] for line in tested], "--", color=drawn.get_color(), label=f"{name}, held out")
        right.plot(at, [line["test_acc1"] for line in tested], color=drawn.get_color(), label=name)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="loss (training: label smoothing 0.1)")
    right.set(xlabel="epoch", ylabel="top-1, %", title="held-out digits", ylim=(0, 101))
    right.axhline(95, color="grey", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    panel.savefig(path, dpi=110)
    plt.close(panel)


def main() -> None:
    """Run the command line."""
    from piip_cls.config import load_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of everything the demo writes but the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the folder")
    args = parser.parse_args()
    name = "demo-cls" if args.seed == 0 else f"demo-cls-seed{args.seed}"
    out = (args.out or ROOT / "work_dirs" / name).resolve()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    print("==> mini data: handwritten digits on photographs", flush=True)
    data = make_mini_data(default_out().with_name("mini-cls"), ("imagefolder",), crop_size=64, crops_per_image=10)
    print(f"    {data}")
    results: dict[str, dict[str, Any]] = {}
    logs = {}
    for title, model in MODELS.items():
        folder, lap = out / model, time.monotonic()
        command: list[object] = ["classification/main.py", "--model", model, "--data-path", data / "imagefolder"]
        command += ["--output-dir", folder, "--seed", args.seed, *OPTIONS]
        checkpoint = folder / "checkpoint.pth"
        if checkpoint.is_file():
            command += ["--resume", checkpoint]
        run(f"train and evaluate: {title}", command, {"PYTHONPATH": str(ROOT)}, out / f"{model}.log")
        logs[title], confusion, classes = figures(folder)
        cost = as_run(load_config(model).model["spec"], model="classifier", num_classes=len(classes))["total"]
        results[title] = {
            "top1": logs[title][-1]["test_acc1"] / 100,
            "loss": logs[title][-1]["test_loss"],
            "params_M": cost.params / 1e6,
            "MMACs": cost.macs / 1e6,
            "minutes": (time.monotonic() - lap) / 60,
        }
        results[title]["confusion"] = confusion.tolist()
    draw_curves(logs, out / "curves.png")
    about = {"seed": args.seed, "images": int(confusion.sum()), "torch": torch.__version__}
    about["minutes"] = round((time.monotonic() - start) / 60, 2)
    (out / "metrics.json").write_text(json.dumps({**about, **results}, indent=2) + "\n")

    print(f"\nHeld-out digits ({about['images']} images), measured just now\n")
    print("                 top-1    loss   params   multiply-adds   minutes")
    for title, row in results.items():
        sizes = f"{row['params_M']:7.2f}M {row['MMACs']:14.1f}M"
        print(f"  {title:<14}{row['top1']:6.3f} {row['loss']:7.3f} {sizes} {row['minutes']:9.1f}")
    for title, row in results.items():
        print(f"\n  {title}: confusions")
        for line in confusion_summary(np.array(row["confusion"]), classes):
            print(f"    {line}")
    print(
        f"\ncurves:  {out / 'curves.png'}\nmetrics: {out / 'metrics.json'}   (all together {about['minutes']} minutes)"
    )


if __name__ == "__main__":
    main()
