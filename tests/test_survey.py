"""The survey of several variants: every part runs on tiny ones and leaves its numbers."""

import json
from unittest.mock import Mock

import pytest
import torch

from benchmarks import rows, survey, throughput
from tests.helpers import run_command, tiny_config, words

TINY = {"ViT-Ti_16@32": {}, "R+ViT-Ti_16@32": {"resnet_layers": (1,)}}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(survey, "CASES", dict.fromkeys(TINY, 1))
    monkeypatch.setattr(throughput, "matmul_peak", lambda options: 1e12)
    for case, changes in TINY.items():
        monkeypatch.setitem(survey.CONFIGS, case.split("@")[0], tiny_config(**changes))
    return words("--device cpu --precision fp32 --batch 2 --rounds 1 --micro_batches 1")


def test_speed_memory_attention_and_evaluation(tiny, tmp_path, capsys, monkeypatch):
    asked, record = [], tmp_path / "survey.json"
    monkeypatch.setattr(throughput, "run", lambda options, config: asked.append(options) or {})
    assert run_command(survey, *tiny, "--eval_images", 5, "--json", record) == 0
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


def test_a_micro_batch_that_does_not_fit(tiny, capsys, monkeypatch):
    full = Mock(missing="out of memory: CUDA out of memory")
    monkeypatch.setattr(survey, "start", lambda *args: [full])
    assert run_command(survey, *tiny, *words("--parts memory --cases ViT-Ti_16@32")) == 0
    assert "| ViT-Ti_16@32 | 1 | too much | too much |" in capsys.readouterr().out


def test_memory_is_that_of_a_whole_step_and_of_nothing_else(tiny, monkeypatch):
    """With momentum, and without what the parent process holds."""
    asked, turn = [], rows.Remote.turn
    monkeypatch.setattr(rows.Remote, "turn", lambda *args: asked.append(args[1:]) or turn(*args))
    ballast = torch.ones(2**28)  # 1 GiB
    (found,) = survey.memory(survey.parse([*tiny, "--cases", "ViT-Ti_16@32"])).values()
    assert asked == [("training step", 2)] * 2
    if rows.RESET_PEAK.exists():
        assert 0.1 < found["ours"] < 1 < ballast.nbytes / 2**30 + 0.1
