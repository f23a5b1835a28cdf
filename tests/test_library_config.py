"""What config files say of the weights beside them."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import open_model
from tests.test_interop import gap, timm_model, write_files

NAMES = {  # of timm's models, with what they stand for
    "vit_giant_patch14_224": {"num_heads": 16, "embed_dim": 32},
    "vit_base_patch32_siglip_256": {"class_token": False, "global_pool": "map"}
    | {"act_layer": "gelu_tanh", "num_heads": 12, "embed_dim": 48},
    "vit_base_patch16_clip_quickgelu_224": {"act_layer": "quick_gelu", "pre_norm": True}
    | {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-5), "num_heads": 12, "embed_dim": 48},
    "vit_base_patch32_siglip_gap_256": {"class_token": False, "global_pool": "avg"}
    | {"fc_norm": False, "act_layer": "gelu_tanh", "num_heads": 12, "embed_dim": 48},
}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_hub_name_timms_model_only(name, tmp_path):
    """Where the config says more, that holds."""
    theirs = timm_model(**NAMES[name])
    path = write_files(tmp_path, theirs, config={"architecture": name})
    assert gap(open_model(path)[0], theirs) < 1e-5
    (tmp_path / "config.json").unlink()
    save_file({f"visual.trunk.{key}": x for key, x in theirs.state_dict().items()}, path)
    given = {"model_cfg": {"vision_cfg": {"timm_model_name": name}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(given))
    assert gap(open_model(path)[0], theirs) < 1e-5
    (tmp_path / "open_clip_config.json").unlink()
    path = write_files(
        tmp_path,
        other := timm_model(**NAMES[name] | {"num_heads": 4}),
        config={"architecture": name, "model_args": {"num_heads": 4}},
    )
    assert gap(open_model(path)[0], other) < 1e-5
