"""The benchmark: peers do the same work as ours, and the arithmetic of the tables is right."""

import json
from argparse import Namespace

import pytest
import torch

from benchmarks import rows, throughput
from benchmarks.peers import BUILDERS, PeerError
from models import cpu
from models.configs import CONFIGS
from models.errors import UserError
from tests.helpers import random_model, run_command, tiny_config, words


def compare(name, peer) -> float:
    """The difference between the logits of a peer and of ours with the same weights."""
    ours = random_model(tiny_config(), 32, rows.CLASSES, std=0.3)
    return rows.same_work(name, peer, BUILDERS[name][1], ours, 32)


@pytest.mark.parametrize("name", BUILDERS)
def test_peers_do_the_same_work(name):
    pytest.importorskip({"port": "torch"}.get(name, name))
    peer = BUILDERS[name][0](tiny_config(), 32, rows.CLASSES, 0.5)
    assert compare(name, peer) < 1e-5
    # Dropout at as many places as ours: embeddings, and three in each of two blocks.
    seen = []
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda *_: seen.append(1))
    peer.train()(torch.zeros(1, 3, 32, 32))
    assert len(seen) == 7


def test_a_peer_with_other_work_is_refused():
    port, _ = BUILDERS["port"]
    with pytest.raises(PeerError, match="parameters where ours has"):
        compare("port", port(tiny_config(num_layers=3), 32, rows.CLASSES, 0.0))
    peer = port(tiny_config(), 32, rows.CLASSES, 0.0)
    peer.layer[0].gelu = torch.nn.ReLU()
    with pytest.raises(PeerError, match="differs from our logits"):
        compare("port", peer)


def test_speeds_ratios_and_shares():
    seconds = {"ours": [1.0, 2.0, 1.0], "timm": [2.0, 6.0, 3.0], "port": [1.5, 2.0, 1.6]}
    rest = {"first_s": 9.0, "memory_gib": 1.0}
    records = {name: {**rest, "seconds": each} for name, each in seconds.items()}
    throughput.summarize(records, batch=8, flops=10.0, peak=160.0)
    assert records["ours"]["images_per_second"] == 8.0
    assert records["timm"]["images_per_second"] == pytest.approx(8 / 3)
    assert records["timm"]["ratio"] == 3.0  # the middle one of 2, 3 and 3
    assert records["ours"]["share"] == 0.5 and records["ours"]["low"] == 4.0
    assert throughput.best_peer(records) == "port"
    table = throughput.render("step", records)
    assert "| timm | 2.67 | 1.33-4.00 | 17% | 1.0 | 9.0 | 3.00 x |" in table
    assert "| port (best peer) |" in table


@pytest.fixture
def peak(monkeypatch):
    monkeypatch.setattr(throughput, "matmul_peak", lambda options: 1e12)


@pytest.mark.usefixtures("peak")
def test_end_to_end_compares_with_the_best_peer_in_training(monkeypatch):
    speeds = {"training step": {"timm": 1.0, "port": 2.0}, "evaluation": {"timm": 2.0, "port": 1.0}}
    asked = {}

    def measure(remotes, table, options):
        asked[table] = [remote.name for remote in remotes]
        seconds = {name: 1 / speeds.get(table, {}).get(name, 1.0) for name in asked[table]}
        record = {"first_s": 1.0, "memory_gib": 1.0}
        return {name: {**record, "seconds": [each]} for name, each in seconds.items()}

    def start(names, *_):
        return [Namespace(name=name, missing=None, close=lambda: None) for name in names]

    monkeypatch.setattr(throughput, "start", start)
    monkeypatch.setattr(throughput, "measure", measure)
    options = throughput.parse(["--device", "cpu", "--rows", "ours,torchvision,timm,port"])
    throughput.run(options, tiny_config(patch_size=16))
    assert asked["end to end"] == ["ours", "timm", "port"]


def test_flops_are_those_of_the_paper():
    for name, flops in {"ViT-B_16": 35.1e9, "ViT-B_32": 8.8e9}.items():
        assert throughput.forward_flops(CONFIGS[name], 224) == pytest.approx(flops, rel=0.01)


@pytest.mark.usefixtures("peak")
def test_one_command_prints_and_records_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(throughput.CONFIGS, "ViT-Ti_16", tiny_config())
    record = tmp_path / "record.json"
    flags = words(
        "--model_type ViT-Ti_16 --img_size 32 --batch 4 --rounds 1 --rows ours,torchvision "
        "--workers 0 --threads 1 --device cpu --turn_steps 1 --compile off"
    )
    tables = ["evaluation", "data path", "end to end"]
    assert run_command(throughput, *flags, "--tables", ",".join(tables), "--json", record) == 0
    out = capsys.readouterr().out
    found = json.loads(record.read_text())["tables"]
    assert list(found) == tables
    for table in found.values():
        assert len(table) == 2 and all(row["images_per_second"] > 0 for row in table.values())
    assert "torchvision (best peer)" in out and "matmul peak 1.000 TFLOP/s" in out


def tiny_row(name):
    flags = "--img_size 32 --batch 6 --accumulate 3 --device cpu --precision fp32 --threads 1"
    return rows.Row(name, throughput.parse(words(flags)), tiny_config())


def test_an_evaluation_is_of_the_whole_batch():
    """Otherwise its images a second would be too many by the number of micro-batches."""
    row, seen = tiny_row("ours"), []
    row.model.register_forward_hook(lambda module, images, logits: seen.append(len(logits)))
    for table in ("evaluation", "training step"):
        assert row.turn(table, 1) > 0
    assert seen == [2, 2, 2] * 2
    with pytest.raises(UserError, match="--batch 8 is not a multiple of --accumulate 3"):
        throughput.parse(["--batch", "8", "--accumulate", "3"])


def test_ours_has_the_kernels_and_a_lever_turns_one_off(monkeypatch):
    for lever in rows.LEVERS.values():  # so that the test's end puts them back
        if lever:
            monkeypatch.setattr(*lever[:2], getattr(*lever[:2]))
    used, attention = [], cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *x: used.append(1) or attention(*x))
    for name in ("ours", "ours - attention"):
        tiny_row(name).turn("evaluation", 1)
        assert len(used) == 3 * 2


class Clock:
    """A row of which every turn takes ten seconds."""

    now, name, missing = 0.0, "ours", None

    def turn(self, table, steps):
        Clock.now += 10
        return 10.0, 1.0


# A fifth of 5 minutes: two warm-up turns, and the rounds that start within 60 seconds.
@pytest.mark.parametrize("minutes, rounds", [("inf", 9), ("0", 3), ("5", 5)])
def test_minutes_end_a_table_but_not_before_three_rounds(minutes, rounds, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: Clock.now)
    options = throughput.parse(["--rounds", "9", "--minutes", minutes, "--device", "cpu"])
    found = throughput.measure([Clock()], "training step", options)["ours"]["seconds"]
    assert len(found) == rounds


@pytest.mark.parametrize("name", ["timm", "transformers", "torchvision"])
def test_a_missing_peer_is_named(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PeerError, match=f"{name} is not installed"):
        BUILDERS[name][0](tiny_config(), 32, 10, 0.0)


def test_the_defaults_follow_the_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu, host = throughput.parse([]), throughput.parse(["--device", "cpu", "--cpu_time"])
    assert (gpu.device, gpu.compile, gpu.batch) == ("cuda", "on", 512)
    assert (host.device, host.compile, host.batch) == ("cpu", "off", 16)
    assert gpu.workers > 0 and host.workers == 0  # CPU time does not count that of workers


@pytest.mark.parametrize("kernels", ["ONEDNN_DTYPES", "UPCAST_DTYPES"])
def test_the_peak_is_that_of_the_fastest_product(kernels, monkeypatch):
    options = throughput.parse(words("--device cpu --precision fp32 --threads 1"))
    seconds = iter([0.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    for owner, name in ((torch, "matmul"), (cpu, "product")):
        monkeypatch.setattr(owner, name, lambda a, b: a)
    for name in ("ONEDNN_DTYPES", "UPCAST_DTYPES"):
        monkeypatch.setattr(cpu, name, {torch.float32} if name == kernels else set())
    assert throughput.matmul_peak(options) == 5 * 2 * 2048**3 / 2


@pytest.mark.parametrize("flag", ["--rows", "--tables", "--ablation"])
def test_unknown_names_are_refused(flag):
    with pytest.raises(UserError, match=f"{flag} .*timmy: choose from"):
        throughput.parse([flag, "ours,timmy"])
