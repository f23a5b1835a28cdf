"""SIGKILL a run at random moments, resume it each time, and compare its end with a quiet run's.

python3 -m tests.stress_kill --kills 50    # test_resume.py runs a short form
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from models.checkpoints import load_torch
from tests.helpers import ROOT, words
from utils.checkpoint import RunPaths

FLAGS = words(
    "--dataset digits --model_type ViT-Mini_8 --img_size 8 --pretrained_dir none --bf16 "
    "--train_batch_size 16 --warmup_steps 5 --save_every 1 --eval_every 10 --optimizer adamw "
    "--mixup 0.4 --dropout_rate 0.1"
)


def command(name: str, steps: int) -> list[str]:
    script = [sys.executable, str(ROOT / "train.py")]
    return [*script, "--name", name, "--num_steps", str(steps), *FLAGS]


def kill_and_resume(folder: Path, kills: int, seed: int, steps: int) -> int:
    """Kill a run `kills` times; returns how many kills found it alive. Raises AssertionError."""
    options = {"cwd": folder, "text": True}
    quiet = subprocess.run(command("quiet", steps), capture_output=True, **options)
    assert quiet.returncode == 0, quiet.stderr
    chance, hits = random.Random(seed), 0
    paths = RunPaths(folder / "output", "killed")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for _ in range(kills):
        resume = ["--resume"] if paths.last.exists() else []
        process = subprocess.Popen([*command("killed", steps), *resume], **pipes, **options)
        before = saved_at(paths.last)
        # Let it make some saves, so that the kills fall everywhere in the run, then strike.
        while process.poll() is None and saved_at(paths.last) == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.15))
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        step = load_torch(paths.last)["state"]["step"]  # whole, whenever the kill came
        print(f"killed after step {step} of {steps}", flush=True)
        if step == steps:
            paths.delete()  # begin again
    resume = ["--resume"] if paths.last.exists() else []
    ended = subprocess.run([*command("killed", steps), *resume], capture_output=True, **options)
    assert ended.returncode == 0, ended.stderr
    a, b = (load_torch(folder / f"output/{name}_last.pt") for name in ("quiet", "killed"))
    del a["state"]["seconds"], b["state"]["seconds"]
    assert a["state"] == b["state"], (a["state"], b["state"])
    for key, value in a["precision"]["parameters"].items():
        assert torch.equal(value, b["precision"]["parameters"][key]), key
    best = [load_torch(folder / f"output/{name}_checkpoint.bin") for name in ("quiet", "killed")]
    assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]
    return hits


def saved_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="steps of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hits = kill_and_resume(Path(folder), args.kills, 0, args.steps)
    print(f"{hits} of {args.kills} kills found the run alive; its end is the quiet run's bits")
