#!/usr/bin/env python3
"""Pretrain the branches of a config's pyramid one by one, by classification of an image folder.

PIIP starts from pretrained branches. This is for small ones that nobody has released: each branch gets a linear
classifier on its mean token, is trained for a few epochs, and is saved without the classifier, under the file name
that the config's spec gives it.

    python tools/pretrain_branches.py CONFIG --data DATA/imagefolder --out pretrained
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from piip.branches import Branch
from piip.zoo.specs import PyramidSpec, build_branch, resolve_spec


def load_split(folder: Path, scale: float) -> tuple[Tensor, Tensor]:
    """Return the images `(N, 3, H, W)`, uint8, of an image folder, which are of one size, scaled; and labels `(N,)`."""
    samples = ImageFolder(folder)
    images = (image.resize([round(scale * side) for side in image.size]) for image, _ in samples)
    return torch.stack([pil_to_tensor(image) for image in images]), torch.tensor(samples.targets)


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, each at a random shift and a random scale of brightness."""
    for index in torch.randperm(len(labels), generator=generator).split(size):
        batch = images[index].float().sub(127.5).div(127.5)
        dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
        gain = 1 + 0.3 * (torch.rand(len(index), 3, 1, 1, generator=generator) - 0.5)
        yield batch.roll((dy, dx), (2, 3)) * gain, labels[index]


def classify(branch: Branch, head: nn.Module, images: Tensor) -> Tensor:
    """Return the logits `(B, classes)` of normalised images."""
    tokens = branch.run(branch.embed(images), 0, branch.depth)
    return head(tokens.x.mean(dim=1))


@torch.inference_mode()
def accuracy(branch: Branch, head: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose most likely class is the label."""
    branch.eval()
    normalised = images.float().sub(127.5).div(127.5)
    found = torch.cat([classify(branch, head, x).argmax(1) for x in normalised.split(256)])
    branch.train()
    return float((found == labels).float().mean())


def pretrain(branch: Branch, data: Path, scale: float, epochs: int, batch_size: int, lr: float, seed: int) -> float:
    """Train a branch in place, on images scaled by `scale`; returns its accuracy on the held-out split."""
    images, labels = load_split(data / "train", scale)
    head = nn.Sequential(nn.LayerNorm(branch.dims[-1]), nn.Linear(branch.dims[-1], int(labels.max()) + 1))
    parameters = [*branch.parameters(), *head.parameters()]
    steps = epochs * -(-len(labels) // batch_size)
    # Learns in few epochs what AdamW needs many for.
    optimizer = create_optimizer_v2(parameters, opt="muon", lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.3)
    generator = torch.Generator().manual_seed(seed)
    branch.train()
    for _ in range(epochs):
        for x, y in batches(images, labels, batch_size, generator):
            loss = F.cross_entropy(classify(branch, head, x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
    return accuracy(branch, head, *load_split(data / "val", scale))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="mmengine config whose model.backbone.spec describes the branches")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scaled", action="store_true", help="smaller images for the branches of lower resolutions")
    args = parser.parse_args()
    from piip.integrations.config import read_config  # here: the specs of other tasks need no mmengine

    spec = resolve_spec(read_config(args.config).model.backbone.spec.to_dict())
    pretrain_all(spec, args.data, args.out, args.epochs, args.batch_size, args.lr, args.seed, args.scaled)


def pretrain_all(
    spec: PyramidSpec,
    data: Path,
    out: Path,
    epochs: int = 12,
    batch_size: int = 64,
    lr: float = 1e-2,
    seed: int = 0,
    scaled: bool = False,
) -> None:
    """Pretrain every branch of a spec and save it under the file name that the spec gives it.

    Args:
        spec: The spec; branches without a file name are left out.
        data: Folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
        out: Folder for the weights.
        epochs: Passes over the data.
        batch_size: Images per step.
        lr: Highest learning rate.
        seed: Seed of weights and order.
        scaled: Whether only the branch of the highest resolution sees the images as they are, and the others see them
            smaller, as they see the same object in the pyramid: for objects of about one size. Otherwise all see them
            as they are, which serves objects of all sizes.
    """
    out.mkdir(parents=True, exist_ok=True)
    highest = max(branch.resolution for branch in spec.branches)
    for i, branch_spec in enumerate(spec.branches):
        if branch_spec.weights is None:
            continue
        start = time.monotonic()
        torch.manual_seed(seed + i)
        branch = build_branch(branch_spec)
        scale = branch_spec.resolution / highest if scaled else 1.0
        result = pretrain(branch, data, scale, epochs, batch_size, lr, seed)
        save_file(branch.state_dict(), out / branch_spec.weights)
        size = sum(p.numel() for p in branch.parameters()) / 1e6
        seconds = time.monotonic() - start
        print(
            f"branch {i + 1} ({size:.2f}M): held-out accuracy {result:.3f} in {seconds:.0f} s -> {branch_spec.weights}",
            flush=True,
        )


if __name__ == "__main__":
    main()
