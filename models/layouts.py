"""The parameter names of timm, DINOv2, Hugging Face and CLIP as tables onto our state dict.

Sources: timm's models/vision_transformer.py and deit.py (DeiT, MAE and DINOv2 use the same names),
transformers' models/vit, deit, vit_mae, dinov2, dinov2_with_registers, clip and siglip, and
open_clip's transformer.py.
"""

from models.state_dict import EMBEDDINGS, LAYER, POSITIONS, PRE_NORM, REGISTERS

CLASS_TOKEN = f"{EMBEDDINGS}.cls_token"
PATCH_LAYER, NORM = f"{EMBEDDINGS}.patch_embeddings", "transformer.encoder.encoder_norm"

# What our own files say, each value as JSON.
METADATA_KEYS = ("num_heads", "gelu", "norm_eps", "classes", "img_size", "mean", "std")
METADATA_KEYS += ("bit_depth", "background", "pixels", "positions", "pool")

# Rows are (their module, ours); {} stands for a number, {+1} for one that is higher by 1 in ours.
# timm's come first: writing takes the first row that fits.
# fmt: off
FOREIGN = [
    ("cls_token", CLASS_TOKEN),         ("embeddings.cls_token", CLASS_TOKEN),
    ("class_embedding", CLASS_TOKEN),   ("embeddings.class_embedding", CLASS_TOKEN),
    ("pos_embed", POSITIONS),           ("embeddings.position_embeddings", POSITIONS),
    ("positional_embedding", POSITIONS), ("embeddings.position_embedding.weight", POSITIONS),
    ("reg_token", REGISTERS),           ("embeddings.register_tokens", REGISTERS),
    ("register_tokens", REGISTERS),     # DINOv2's own
    ("dist_token", REGISTERS),          ("embeddings.distillation_token", REGISTERS),
    ("patch_embed.proj", PATCH_LAYER),  ("embeddings.patch_embeddings.projection", PATCH_LAYER),
    ("conv1", PATCH_LAYER),             ("embeddings.patch_embedding", PATCH_LAYER),
    ("norm_pre", PRE_NORM), ("ln_pre", PRE_NORM), ("pre_layrnorm", PRE_NORM),  # their spelling
    ("norm", NORM), ("layernorm", NORM), ("ln_post", NORM), ("post_layernorm", NORM),
    ("fc_norm", "fc_norm"),
    ("head", "head"), ("classifier", "head"), ("cls_classifier", "head"),
    ("head_dist", "head_dist"), ("distillation_classifier", "head_dist"),
]
# Our model has no layers `attn.qkv`, `attn.kv`, `ffn.gate`, `ffn.up`, `scale` and `head_dist`:
# reading splits, joins or folds them.
_BLOCK = [
    ("norm1", "attention_norm"),                 ("norm2", "ffn_norm"),
    ("attn.qkv", "attn.qkv"),                    ("attn.proj", "attn.out"),
    ("mlp.fc1", "ffn.fc1"),                      ("mlp.fc2", "ffn.fc2"),
    ("ls1.gamma", "attn.out.scale"),             ("ls2.gamma", "ffn.fc2.scale"),
    ("layernorm_before", "attention_norm"),      ("layernorm_after", "ffn_norm"),
    ("attention.attention.query", "attn.query"), ("attention.q_proj", "attn.query"),
    ("attention.attention.key", "attn.key"),     ("attention.k_proj", "attn.key"),
    ("attention.attention.value", "attn.value"), ("attention.v_proj", "attn.value"),
    ("attention.output.dense", "attn.out"),      ("attention.o_proj", "attn.out"),
    ("intermediate.dense", "ffn.fc1"),           ("output.dense", "ffn.fc2"),
    ("layer_scale1.lambda1", "attn.out.scale"),  ("layer_scale2.lambda1", "ffn.fc2.scale"),
    # SwiGLU of DINOv2 and of transformers, on disk and in memory.
    ("mlp.w12", "ffn.fc1"), ("mlp.weights_in", "ffn.fc1"),  ("mlp.gate_proj", "ffn.gate"),
    ("mlp.w3", "ffn.fc2"),  ("mlp.weights_out", "ffn.fc2"), ("mlp.up_proj", "ffn.up"),
    ("mlp.down_proj", "ffn.fc2"),
]
_CLIP = [  # transformers' towers
    ("layer_norm1", "attention_norm"),           ("layer_norm2", "ffn_norm"),
    ("self_attn.q_proj", "attn.query"),          ("self_attn.k_proj", "attn.key"),
    ("self_attn.v_proj", "attn.value"),          ("self_attn.out_proj", "attn.out"),
    ("mlp.fc1", "ffn.fc1"),                      ("mlp.fc2", "ffn.fc2"),
]
_OPEN_CLIP = [
    ("ln_1", "attention_norm"),                  ("ln_2", "ffn_norm"),
    ("attn.in_proj_weight", "attn.qkv.weight"),  ("attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.out_proj", "attn.out"),
    ("mlp.c_fc", "ffn.fc1"),                     ("mlp.c_proj", "ffn.fc2"),
    ("ls_1.gamma", "attn.out.scale"),            ("ls_2.gamma", "ffn.fc2.scale"),
]
_MAP = [
    ("attn_pool.latent", "probe"),               ("head.probe", "probe"),
    ("attn_pool.q", "attn.query"),               ("attn_pool.kv", "attn.kv"),
    ("attn_pool.proj", "attn.out"),              ("head.attention.out_proj", "attn.out"),
    ("head.attention.in_proj_weight", "attn.qkv.weight"),
    ("head.attention.in_proj_bias", "attn.qkv.bias"),
    ("attn_pool.norm", "norm"),                  ("head.layernorm", "norm"),
    ("attn_pool.mlp.fc1", "ffn.fc1"),            ("head.mlp.fc1", "ffn.fc1"),
    ("attn_pool.mlp.fc2", "ffn.fc2"),            ("head.mlp.fc2", "ffn.fc2"),
]
_UNIT = [
    ("conv1", "conv1"), ("conv2", "conv2"), ("conv3", "conv3"), ("downsample.conv", "downsample"),
    ("norm1", "gn1"),   ("norm2", "gn2"),   ("norm3", "gn3"),   ("downsample.norm", "gn_proj"),
]
# Block -> its rows. "layers.{}": transformers 5 in memory.
_BLOCKS = {
    "blocks.{}": _BLOCK,                "encoder.layer.{}": _BLOCK,       "layers.{}": _BLOCK,
    "encoder.layers.{}": _CLIP,         "transformer.resblocks.{}": _OPEN_CLIP,
}
# fmt: on
for block, rows in _BLOCKS.items():
    FOREIGN += [(f"{block}.{theirs}", f"{LAYER}.{ours}") for theirs, ours in rows]
FOREIGN += [(theirs, f"map_head.{ours}") for theirs, ours in _MAP]
_HYBRID, _STAGE = f"{EMBEDDINGS}.hybrid_model", "patch_embed.backbone.stages.{}.blocks.{}"
_OUR_STAGE = f"{_HYBRID}.body.block{{+1}}.unit{{+1}}"
FOREIGN += [(f"{_STAGE}.{theirs}", f"{_OUR_STAGE}.{ours}") for theirs, ours in _UNIT]
_STEM = {"conv": f"{_HYBRID}.root.conv", "norm": f"{_HYBRID}.root.gn"}
TIMM_STEM = [(f"patch_embed.backbone.{theirs}", ours) for theirs, ours in _STEM.items()]
FOREIGN += [(f"patch_embed.backbone.stem.{theirs}", ours) for theirs, ours in _STEM.items()]
FOREIGN += TIMM_STEM  # of a ResNet without stages

# Where a file has one of these before its names, all else is not of the tower that sees images.
TOWERS = ("visual.trunk.", "visual.", "vision_model.")
# What a name begins with -> why it is left out. The first that fits counts.
LEFT_OUT = {
    r"decoder": "the decoder, which only pre-training uses",
    r"pooler\.|(\w+\.)?mask_token$|embeddings\.position_ids$": "not used in classification",
    "n_averaged$": "a counter",
    r"(dino_|ibot_)?head\.(mlp\.\d|last_layer)": "a head of self-supervised training",
    r"proj$|visual_projection\.": "the projection to the texts' space",
}
# Part of a key that no table has -> what it belongs to, where the key itself does not say it.
ROTARY = "rotary positions (RoPE), as of DINOv3 and EVA-02"
UNSUPPORTED = {r"relative_position|rel_pos": "relative positions", r"lambda_[12]$": "BEiT"}
UNSUPPORTED |= {r"rope|storage_tokens|inner_attn_ln|blocks\.\d+\.attn\.q_proj": ROTARY}
UNSUPPORTED |= {r"\.q_bias": f"{ROTARY}, or EVA's biases of queries and values"}
UNSUPPORTED |= {"fc1_g": "SwiGLU of two layers"}
# Part of our name -> number of dimensions; the first that is found counts.
RANKS = {"cls_token|_tokens|probe|position_embeddings": 3}
RANKS |= {r"bias$|scale$|norm\.weight$|\.gn\w*\.weight$": 1, "embeddings": 4, "": 2}
GELUS = {"erf": "erf", "gelu": "erf", "gelu_erf": "erf", "tanh": "tanh", "gelu_tanh": "tanh"}
GELUS |= {"gelu_new": "tanh", "gelutanh": "tanh", "gelu_pytorch_tanh": "tanh"}
GELUS |= {"quick": "quick", "quick_gelu": "quick", "quickgelu": "quick"}
# timm's word for a pooling, or ours -> ours. "" is that of a model without a head.
POOLS = {"": None, "token": "token", "avg": "mean", "mean": "mean", "map": "map"}
