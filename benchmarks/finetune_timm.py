"""Fine-tune timm's own model on CIFAR-10 in a plain loop, to compare accuracies with train.py's.

    python3 benchmarks/finetune_timm.py weights.safetensors --seed 1 --name timm_1
    python3 curves.py timm=logs/timm_1 "this program=logs/ours_1"

timm's model and its reader of weights, torchvision's transforms, autocast to bfloat16: nothing of
this project but the reader of the images.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.cifar import read_cifar


def main() -> None:
    args = build_parser().parse_args()
    torch.manual_seed(args.seed)
    cifar = read_cifar("cifar10", args.data_dir, print, False)
    train, test = (tensors(*split) for split in (cifar.train, cifar.test))
    model = build_model(args.weights, args.img_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    size, normalize = args.img_size, v2.Normalize([127.5] * 3, [127.5] * 3)
    crop = v2.RandomResizedCrop(size, scale=(0.05, 1), antialias=True)
    flip = v2.RandomHorizontalFlip(0.5 if args.flip else 0)
    resize = v2.Resize((size, size), antialias=True)
    log, start = SummaryWriter(f"logs/{args.name}"), time.monotonic()
    order, losses, pause = [], [], 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps, args.warmup)
        while len(order) < args.batch:
            order += torch.randperm(len(train[1])).tolist()
        batch, order = order[: args.batch], order[args.batch :]
        images = torch.stack([flip(crop(train[0][i])) for i in batch])
        loss = F.cross_entropy(forward(model, normalize(images.float())), train[1][batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % args.eval_every == 0:
            begin = time.monotonic()
            accuracy = evaluate(model, test, lambda x: normalize(resize(x).float()))
            pause += time.monotonic() - begin
            seconds = time.monotonic() - start
            log.add_scalar("test/accuracy", accuracy, step + 1)
            speed = (step + 1) * args.batch / (seconds - pause)
            mean, losses = sum(losses) / len(losses), []
            line = f"loss {mean:.4f}, test accuracy {accuracy:.4f}, {speed:.1f} images/s"
            print(f"step {step + 1}: {line}, {seconds:.0f} s", flush=True)
    log.close()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune timm's model in a plain loop.")
    parser.add_argument("weights", type=Path, help="a ViT-S_14 in timm's names")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--name", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--img_size", type=int, default=112)
    parser.add_argument("--eval_every", type=int, default=50)
    parser.add_argument("--flip", action="store_true")
    return parser


def tensors(images, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a split, uint8 (n, 3, h, w), and their labels (n,)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.as_tensor(labels)


def build_model(weights: Path, img_size: int) -> VisionTransformer:
    sizes = {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6}
    model = VisionTransformer(img_size, num_classes=10, **sizes)
    state = checkpoint_filter_fn(timm.models.load_state_dict(str(weights)), model)
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["head.weight", "head.bias"], missing
    torch.nn.init.zeros_(model.head.weight)
    return model


def schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def forward(model, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(images).float()


@torch.inference_mode()
def evaluate(model, data, prepare) -> float:
    model.eval()
    correct = 0
    for i in range(0, len(data[1]), 64):
        images = prepare(data[0][i : i + 64])
        correct += (forward(model, images).argmax(1) == data[1][i : i + 64]).sum().item()
    model.train()
    return correct / len(data[1])


if __name__ == "__main__":
    main()
