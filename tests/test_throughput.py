"""The benchmark: peers are made to do the same work, and the tables' arithmetic is right."""

import json

import pytest
import torch

from benchmarks import rows, throughput
from benchmarks.peers import BUILDERS, PeerError
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import tiny_config


def ours(config):
    torch.manual_seed(0)
    model = VisionTransformer(config, 32, rows.CLASSES)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.transformer.embeddings.cls_token)
    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_peers_do_the_same_work(name):
    pytest.importorskip({"port": "torch"}.get(name, name))
    build, load = BUILDERS[name]
    config = tiny_config(dropout_rate=0.5)
    peer = build(config, 32, rows.CLASSES, config.dropout_rate)
    assert rows.same_work(name, peer, load, ours(config), 32) < 1e-5
    # As many places of dropout as ours: embeddings, and three in each of two blocks.
    seen = []
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda *_: seen.append(1))
    peer.train()(torch.zeros(1, 3, 32, 32))
    assert len(seen) == 7


def test_other_work_is_refused():
    build, load = BUILDERS["port"]
    peer = build(tiny_config(num_layers=3), 32, rows.CLASSES, 0.0)
    with pytest.raises(PeerError, match="parameters where ours has"):
        rows.same_work("port", peer, load, ours(tiny_config()), 32)
    peer = build(tiny_config(), 32, rows.CLASSES, 0.0)
    peer.layer[0].gelu = torch.nn.ReLU()
    with pytest.raises(PeerError, match="differs from our logits"):
        rows.same_work("port", peer, load, ours(tiny_config()), 32)


def test_rates_ratios_and_shares():
    records = {
        "ours": {"first_s": 9.0, "memory_gib": 1.5, "seconds": [1.0, 2.0, 1.0]},
        "timm": {"first_s": 9.0, "memory_gib": 1.0, "seconds": [2.0, 6.0, 3.0]},
        "port": {"first_s": 9.0, "memory_gib": 1.0, "seconds": [1.5, 2.0, 1.6]},
    }
    throughput.summarize(records, batch=8, flops=10.0, peak=160.0)
    assert records["ours"]["rate"] == 8.0 and records["timm"]["rate"] == pytest.approx(8 / 3)
    assert records["timm"]["ratio"] == 3.0  # the middle one of 2, 3 and 3
    assert records["ours"]["share"] == 0.5 and records["ours"]["low"] == 4.0
    assert throughput.best_peer(records) == "port"
    table = throughput.render("step", records)
    assert "| timm | 2.67 | 1.33-4.00 | 17% | 1.0 | 9.0 | 3.00 x |" in table
    assert "| port (best peer) |" in table


def test_end_to_end_is_held_against_the_best_in_training(monkeypatch):
    rates = {"training step": {"timm": 1.0, "port": 2.0}, "evaluation": {"timm": 2.0, "port": 1.0}}
    asked = {}

    def measured(remotes, table, options):
        asked[table] = [remote.name for remote in remotes]
        rate = {"ours": 3.0} | rates.get(table, dict.fromkeys(asked[table], 1.0))
        return {name: {"first_s": 1.0, "memory_gib": 1.0, "seconds": [1 / rate.get(name, 1.0)]}
                for name in asked[table]}  # fmt: skip

    class Row:
        missing = None

        def __init__(self, name):
            self.name = name

        def close(self):
            pass

    monkeypatch.setattr(throughput, "start", lambda names, *_: [Row(name) for name in names])
    monkeypatch.setattr(throughput, "measure", measured)
    monkeypatch.setattr(throughput, "matmul_peak", lambda options: 1e12)
    options = throughput.parse(["--device", "cpu", "--rows", "ours,torchvision,timm,port"])
    throughput.run(options, tiny_config(patch_size=16))
    assert asked["end to end"] == ["ours", "timm", "port"]


def test_operations_are_those_of_the_paper():
    assert throughput.forward_flops(CONFIGS["ViT-B_16"], 224) == pytest.approx(35.1e9, rel=0.01)
    assert throughput.forward_flops(CONFIGS["ViT-B_32"], 224) == pytest.approx(8.8e9, rel=0.01)


def test_one_command_prints_and_records_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(throughput.CONFIGS, "ViT-Ti_16", tiny_config())
    monkeypatch.setattr(throughput, "matmul_peak", lambda options: 1e12)
    record = tmp_path / "record.json"
    throughput.main(["--model_type", "ViT-Ti_16", "--img_size", "32", "--batch", "4", "--rounds",
                     "1", "--rows", "ours,torchvision", "--workers", "0", "--threads", "1",
                     "--tables", "evaluation,data path", "--device", "cpu", "--turn_steps", "1",
                     "--compile", "off", "--json", str(record)])  # fmt: skip
    out = capsys.readouterr().out
    tables = json.loads(record.read_text())["tables"]
    assert set(tables) == {"evaluation", "data path"}
    for table in tables.values():
        assert len(table) == 2 and all(row["rate"] > 0 for row in table.values())
    assert "torchvision (best peer)" in out and "matmul peak 1.000 TFLOP/s" in out


def test_an_evaluation_is_of_the_whole_batch():
    """Else its images a second would be too many by the number of micro-batches."""
    flags = ["--img_size", "32", "--batch", "6", "--accumulate", "3", "--device", "cpu",
             "--precision", "fp32", "--threads", "1"]  # fmt: skip
    row, seen = rows.Row("ours", throughput.parse(flags), tiny_config()), []
    row.model.register_forward_hook(lambda module, images, logits: seen.append(len(logits)))
    for table in ("evaluation", "training step"):
        assert row.turn(table, 1) > 0
    assert seen == [2, 2, 2] * 2
    with pytest.raises(SystemExit):
        throughput.parse(["--batch", "8", "--accumulate", "3"])


class Clock:
    """A row whose every turn takes ten seconds."""

    now, name, missing = 0.0, "ours", None

    def turn(self, table, steps):
        Clock.now += 10
        return 10.0, 1.0


def test_minutes_end_a_table_but_not_before_three_rounds(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: Clock.now)
    # A fifth of 5 minutes: two warm-ups, and the rounds that start within 60 seconds.
    for minutes, rounds in (("inf", 9), ("0", 3), ("5", 5)):
        options = throughput.parse(["--rounds", "9", "--minutes", minutes, "--device", "cpu"])
        found = throughput.measure([Clock()], "training step", options)["ours"]["seconds"]
        assert len(found) == rounds


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("timm", "transformers", "torchvision"):
        with pytest.raises(PeerError, match=f"{name} is not installed"):
            BUILDERS[name][0](tiny_config(), 32, 10, 0.0)


def test_the_defaults_follow_the_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu, cpu = throughput.parse([]), throughput.parse(["--device", "cpu"])
    assert (gpu.device, gpu.compile, gpu.batch) == ("cuda", "on", 512)
    assert (cpu.device, cpu.compile, cpu.batch) == ("cpu", "off", 16)


def test_cpu_time_has_no_workers_that_it_would_not_count():
    assert throughput.parse(["--device", "cpu", "--cpu_time", "--workers", "4"]).workers == 0


@pytest.mark.parametrize("ways", ["ONEDNN_DTYPES", "WIDENED"])
def test_the_peak_is_the_best_product_that_anybody_has(ways, monkeypatch):
    options = throughput.parse(["--device", "cpu", "--precision", "fp32", "--threads", "1"])
    seconds = iter([0.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    monkeypatch.setattr(torch, "matmul", lambda a, b: a)
    monkeypatch.setattr(throughput, "product", lambda a, b: a)
    monkeypatch.setattr(throughput, "ONEDNN_DTYPES", set())
    monkeypatch.setattr(throughput, "WIDENED", set())
    monkeypatch.setattr(throughput, ways, {torch.float32})
    assert throughput.matmul_peak(options) == 5 * 2 * 2048**3 / 2


@pytest.mark.parametrize("flag", ["--rows", "--tables", "--ablation"])
def test_unknown_names_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        throughput.main([flag, "ours,timmy"])
    assert "timmy: choose from" in capsys.readouterr().err
