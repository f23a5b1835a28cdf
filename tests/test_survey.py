"""The survey of all variants: every part runs, here on tiny ones, and its record has figures."""

import json

import pytest
import torch

from benchmarks import rows, survey, throughput
from tests.helpers import tiny_config

TINY = {"ViT-Ti_16@32": {}, "R+ViT-Ti_16@32": {"resnet_layers": (1,)}}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(survey, "CASES", dict.fromkeys(TINY, 1))
    monkeypatch.setattr(throughput, "matmul_peak", lambda options: 1e12)
    for case, changes in TINY.items():
        monkeypatch.setitem(survey.CONFIGS, case.split("@")[0], tiny_config(**changes))
    return ["--device", "cpu", "--precision", "fp32", "--batch", "2", "--rounds", "1"]


def test_speed_memory_attention_and_evaluation(tiny, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(throughput, "run", lambda options, config: asked.append(options) or {})
    record = tmp_path / "survey.json"
    survey.main([*tiny, "--micro_batches", "1", "--eval_images", "5", "--json", str(record)])
    plain, hybrid = asked
    assert plain.tables == list(throughput.TABLES) and "end to end" not in hybrid.tables
    assert "ours + channels_last" in hybrid.rows and plain.rows[0] == "ours"
    found = json.loads(record.read_text())
    for case in TINY:
        assert found["evaluation"][case] > 0 and found["attention"][case]["ms"]["MATH"] > 0
        assert set(found["memory"][f"{case}, 1"]) == {"ours", "ours + checkpointing"}
    out = capsys.readouterr().out
    assert "| 2 x 2 x 17 x 16 |" in out and "| ViT-Ti_16@32 | 1 | " in out
    assert "evaluation of 5 images, ViT-Ti_16@32" in out


def test_what_does_not_fit_is_said(tiny, capsys, monkeypatch):
    class Full:
        missing = None

        def turn(self, table, steps):
            self.missing = "out of memory: CUDA out of memory"

        def close(self):
            pass

    monkeypatch.setattr(survey, "start", lambda *args: [Full()])
    survey.main([*tiny, "--parts", "memory", "--cases", "ViT-Ti_16@32", "--micro_batches", "64"])
    assert "| ViT-Ti_16@32 | 64 | too much | too much |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--parts", "speeds"], "--parts speeds: choose from speed, "),
        (["--cases", "ViT-B_16@224,ViT-X_1@32"], "--cases ViT-X_1@32: a variant of"),
        (["--cases", "ViT-B_16"], "--cases ViT-B_16: a variant of"),
    ],
)
def test_unknown_names_are_refused(flags, line, capsys):
    with pytest.raises(SystemExit):
        survey.main(flags)
    assert line in capsys.readouterr().err


def test_memory_is_that_of_a_whole_update_and_of_nothing_else(tiny, monkeypatch):
    """Momentum included, and without what the parent holds."""
    asked = []
    turn = rows.Remote.turn

    def watched(self, *args):
        asked.append(args)
        return turn(self, *args)

    monkeypatch.setattr(rows.Remote, "turn", watched)
    args = survey.parse([*tiny, "--cases", "ViT-Ti_16@32", "--micro_batches", "1"])
    ballast = torch.ones(2**28)  # 1 GiB
    (found,) = survey.memory(args).values()
    assert asked == [("training step", 2)] * 2
    if rows.RESET_PEAK.exists():
        assert 0.1 < found["ours"] < 1 < ballast.nbytes / 2**30 + 0.1
