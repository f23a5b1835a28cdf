"""SIGKILL a run at random moments, resume it each time, and compare its end with a quiet run's.

    python3 -m tests.stress_kill --kills 50

A short form runs with the tests.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from utils.checkpoint import load

ROOT = Path(__file__).parent.parent


def command(name: str, steps: int) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--name", name, "--dataset", "digits",
            "--model_type", "ViT-Mini_8", "--img_size", "8", "--pretrained_dir", "none", "--bf16",
            "--train_batch_size", "16", "--warmup_steps", "5", "--num_steps", str(steps),
            "--save_every", "1", "--eval_every", "10", "--optimizer", "adamw", "--mixup", "0.4",
            "--dropout_rate", "0.1"]  # fmt: skip


def kill_and_resume(folder: Path, kills: int, seed: int, steps: int) -> int:
    """Kill a run `kills` times; returns how many kills met it alive. Raises AssertionError."""
    quiet = subprocess.run(command("quiet", steps), cwd=folder, capture_output=True, text=True)
    assert quiet.returncode == 0, quiet.stderr
    chance, hits = random.Random(seed), 0
    last = folder / "output/killed_last.pt"
    for _ in range(kills):
        resume = ["--resume"] if last.exists() else []
        process = subprocess.Popen([*command("killed", steps), *resume], cwd=folder, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        before = last.stat().st_mtime_ns if last.exists() else 0
        # Let it make some saves, so that the kills fall everywhere in the run, then strike.
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.15))
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hits += alive
        step = load(last)["state"]["step"]  # whole, whenever the kill came
        print(f"killed after update {step} of {steps}", flush=True)
        if step == steps:  # begin again, with the files of the end in place
            os.remove(last)
            for end in ("checkpoint.bin", "results.json"):
                (folder / f"output/killed_{end}").unlink(missing_ok=True)
    resume = ["--resume"] if last.exists() else []
    ended = subprocess.run([*command("killed", steps), *resume], cwd=folder, capture_output=True,
                           text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    a, b = (load(folder / f"output/{name}_last.pt") for name in ("quiet", "killed"))
    del a["state"]["seconds"], b["state"]["seconds"]
    assert a["state"] == b["state"], (a["state"], b["state"])
    for key, value in a["precision"]["parameters"].items():
        assert torch.equal(value, b["precision"]["parameters"][key]), key
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="updates of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hits = kill_and_resume(Path(folder), args.kills, args.seed, args.steps)
    print(
        f"{hits} of {args.kills} kills met the run alive; its end is the quiet run's, bit for bit"
    )
