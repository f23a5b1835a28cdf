"""The benchmark: peers do the same work as ours, and the arithmetic of the tables is right."""

import json

import pytest
import torch

from benchmarks import photographs, rows, throughput
from benchmarks.peers import BUILDERS, PeerError
from models import cpu
from models.configs import CONFIGS
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


def test_flops_are_those_of_the_paper():
    for name, flops in {"ViT-B_16": 35.1e9, "ViT-B_32": 8.8e9}.items():
        assert throughput.forward_flops(CONFIGS[name], 224) == pytest.approx(flops, rel=0.01)


def test_one_command_prints_and_records_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "matmul_peak", lambda options: 1e12)
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


def test_photographs_are_measured_beside_other_libraries(tmp_path, capsys, monkeypatch):
    others = {"turned": ((90, 80), "RGB", {"exif": 6}), "CMYK": ((90, 80), "CMYK", {})}
    monkeypatch.setattr(photographs, "SIZES", {"90x80": 2})
    monkeypatch.setattr(photographs, "OTHERS", others)
    record = tmp_path / "record.json"
    flags = words("--tables photographs --img_size 32 --rounds 1 --workers 1 --device cpu")
    assert run_command(throughput, *flags, "--json", record) == 0
    found = json.loads(record.read_text())["tables"]
    rows_of = found.pop("other photographs")
    assert list(rows_of) == list(others)
    assert all(row["largest"] <= 1 and row["images_per_second"] > 0 for row in rows_of.values())
    assert list(found) == ["photographs 90x80, one core", "photographs 90x80, 1 workers"]
    for table in found.values():
        assert {"ours, training", "ours, evaluation", "torchvision v1", "torchvision v2"} < {*table}
        assert all(row["images_per_second"] > 0 for row in table.values())
        assert table[photographs.REFERENCE]["ratio"] == 1
    assert "| ours, training | " in capsys.readouterr().out
    [path] = photographs.write_photographs(tmp_path, (90, 80), 1)
    shapes = {name: tuple(way(path).shape) for name, way in photographs.ways(32).items()}
    assert set(shapes.values()) == {(3, 32, 32)}


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


def test_ours_has_the_kernels_and_a_lever_turns_one_off(monkeypatch):
    for lever in rows.LEVERS.values():  # so that the test's end puts them back
        if lever:
            monkeypatch.setattr(*lever[:2], getattr(*lever[:2]))
    used, attention = [], cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *x: used.append(1) or attention(*x))
    for name in ("ours", "ours - attention"):
        tiny_row(name).turn("evaluation", 1)
        assert len(used) == 3 * 2


# A fifth of 5 minutes: two warm-up turns, and the rounds that start within 60 seconds.
