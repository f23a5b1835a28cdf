"""The learning rate against the official table."""

import json

import numpy as np
import pytest

from tests.helpers import golden_case
from utils.scheduler import learning_rate

TABLE = golden_case("lr_schedule")


@pytest.mark.parametrize("name", ["cos_w2", "cos_w500", "cos_w0", "cos_w5_20", "lin_w3", "lin_w0"])
def test_equals_official(name):
    config = json.loads(str(TABLE[f"{name}/config"]))
    schedule = {"base": config["base"], "total": config["total_steps"]}
    schedule |= {"warmup": config["warmup_steps"], "decay": config["decay_type"]}
    ours = [learning_rate(int(step), **schedule) for step in TABLE[f"{name}/steps"]]
    # The official table is float32, computed from float32 cosines.
    assert np.abs(np.array(ours) - TABLE[f"{name}/lr"]).max() < 3e-8 * 4
    assert max(ours) > 0


def test_the_first_lr_is_zero_only_with_a_warmup():
    assert learning_rate(0, base=0.1, total=10, warmup=2, decay="cosine") == 0
    assert learning_rate(0, base=0.1, total=10, warmup=0, decay="cosine") == 0.1


def test_warmup_longer_than_the_run():
    assert learning_rate(9, base=1.0, total=10, warmup=100, decay="cosine") == pytest.approx(0.09)
