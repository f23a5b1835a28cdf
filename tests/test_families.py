"""Every family of ViTs gives the numbers of timm's or transformers' own class, and comes back."""

import json
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled

import export
import train
from models import cpu
from models.checkpoints import load_torch, open_model, read, write
from models.errors import UserError
from models.interop import read_foreign, write_timm
from models.modeling import VisionTransformer
from models.pixels import PLAIN, Pixels
from models.state_dict import load
from models.weights import write_google
from probe import embed
from tests.helpers import checkpoint_of, random_model, run_command, save_bin, tiny_config
from tests.test_interop import HALF, HUGGING_FACE, gap, randomized, timm_model, write_files
from utils.attention import attention_maps, gradient_rollout, head_maps, rollout
from utils.onnx_graph import write_onnx
from utils.optimizer import build_optimizer
from utils.precision import Precision

OBLONG, EPS = {"img_size": (40, 24), "embed_dim": 48, "num_heads": 3}, 1e-5
clip_norm = partial(torch.nn.LayerNorm, eps=EPS)
# Family -> arguments of timm's class; and what its config.json says, where the file does not.
TIMM = {
    "AugReg": {},
    "DeiT III": {"init_values": 0.7, "no_embed_class": True},
    "registers": {"reg_tokens": 4, "init_values": 0.7, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 3},
    "registers and mean": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "MAE fine-tuned": {"global_pool": "avg"},
    "mean of normed patches": {"global_pool": "avg", "fc_norm": False},
    "fc_norm of the token": {"fc_norm": True, "global_pool": "token"},
    "CLIP": {"pre_norm": True, "norm_layer": clip_norm},
    "OpenAI's CLIP": {"pre_norm": True, "norm_layer": clip_norm, "act_layer": "quick_gelu"},
    "DINOv2 giant": {"mlp_layer": timm.layers.SwiGLUPacked, "init_values": 0.7, "mlp_ratio": 3}
    | {"act_layer": "silu"},
    "SigLIP": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "map and token": {"global_pool": "map", "reg_tokens": 1},
}
GIVEN = ("num_heads", "act_layer", "global_pool")


def features_gap(ours, theirs, size):
    with torch.no_grad():
        return gap(
            ours.features, lambda x: theirs.forward_head(theirs.forward_features(x), True), size
        )


@pytest.mark.parametrize("size", [{}, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("family", TIMM)
def test_timm(family, size, tmp_path):
    options = TIMM[family] | size
    theirs = timm_model(**options)
    pixels = theirs.patch_embed.img_size
    given = {name: x for name, x in ({"num_heads": 2} | options).items() if name in GIVEN}
    path = write_files(tmp_path, theirs, config={"model_args": given, "input_size": [3, *pixels]})
    ours, metadata = open_model(path)
    assert metadata.img_size == pixels and metadata.left_out == {}
    assert gap(ours, theirs, pixels) < 1e-5 and features_gap(ours, theirs, pixels) < 1e-5

    for name in ("m.bin", "again.safetensors"):  # our own files hold it, too
        write(tmp_path / name, checkpoint_of(ours, tuple("abcde")))
        again, metadata = open_model(tmp_path / name)
        assert again.config == ours.config
        assert metadata.img_size == pixels and gap(again, theirs, pixels) < 1e-5


@pytest.mark.parametrize("family", TIMM)
def test_the_command_that_export_prints_loads_the_file(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = timm_model(**TIMM[family])
    given = {name: x for name, x in ({"num_heads": 2} | TIMM[family]).items() if name in GIVEN}
    ours, _ = open_model(write_files(tmp_path, theirs, config={"model_args": given}))
    save_bin("m.bin", ours, "abcde")
    export.main(["--checkpoint", "m.bin", "out.safetensors"])
    lines = capsys.readouterr().out.partition("load it with:\n")[2]
    namespace = {}
    exec("\n".join(map(str.strip, lines.splitlines())), namespace)
    assert gap(namespace["model"].eval(), theirs) < 1e-5


def transformers_case(name):
    """(model, its features of images) of a random tiny model."""
    library, base = pytest.importorskip("transformers"), dict(HUGGING_FACE)
    name, _, swiglu = name.partition(" ")
    if swiglu:
        base["use_swiglu_ffn"] = True
    if not name.startswith("Dinov2"):
        base["intermediate_size"] = 64
    config = getattr(library, name.removesuffix("Model") + "Config")(**base)
    model = randomized(getattr(library, name)(config))

    def features(images):
        out = model(images)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if name == "ViTMAEModel" else pooled

    return model, features


CASES = ["Dinov2WithRegistersModel", "Dinov2WithRegistersModel swiglu", "Dinov2Model swiglu"]
CASES += ["CLIPVisionModel", "SiglipVisionModel"]


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "in memory"])
@pytest.mark.parametrize("name", CASES)
def test_transformers(name, saved, tmp_path):
    theirs, features = transformers_case(name)
    theirs.save_pretrained(tmp_path)
    if saved:
        ours, metadata = open_model(path := tmp_path / "model.safetensors", head=False)
        assert {*metadata.keys, *metadata.left_out} == set(load_file(path))
    else:  # no config: the defaults of the family
        checkpoint = read_foreign(theirs.state_dict(), {}, 2)
        ours = VisionTransformer(checkpoint.config, 32, 1, zero_head=True).eval()
        load(ours, checkpoint)
    assert gap(ours.features, features) < 1e-5


def with_two_heads(library):
    """A distilled DeiT of that library; its class, and its two heads."""
    if library == "timm":
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return randomized(VisionTransformerDistilled(**options, mlp_ratio=2, num_classes=5))
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(**HUGGING_FACE, intermediate_size=64)
    return randomized(transformers.DeiTForImageClassificationWithTeacher(config))


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_distilled_deit_averages_both_heads_and_a_new_head_reads_the_class_token(library, tmp_path):
    theirs = with_two_heads(library)
    if library == "timm":
        path = write_files(tmp_path, theirs, config={"num_heads": 2})
    else:
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    ours, metadata = open_model(path)
    assert gap(ours, theirs) < 1e-5 and ours.config.pool == "pair"
    assert "a new head reads the class token alone" in metadata.notes[0]
    assert {*metadata.keys, *metadata.left_out} == set(load_file(path))
    save_bin(tmp_path / "m.bin", ours, "abcde")
    assert gap(open_model(tmp_path / "m.bin")[0], theirs) < 1e-5

    def class_token(images):
        if library == "timm":
            return theirs.forward_features(images)[:, 0]
        return theirs.deit(images).last_hidden_state[:, 0]

    ours, _ = open_model(path, head=False)
    assert ours.config.pool is None and gap(ours.features, class_token) < 1e-5
    with pytest.raises(UserError, match="no head of two tokens"):
        write_timm(ours.state_dict(), replace(ours.config, pool="pair"))
    heads = {"head.weight", "head.bias", "cls_classifier.weight", "cls_classifier.bias"}
    rest = {key: x for key, x in theirs.state_dict().items() if key not in heads}
    with pytest.raises(UserError, match="do not fit together"):
        read_foreign(rest, HALF, 2)


@torch.no_grad()
@pytest.mark.parametrize("token", [0, 1])
def test_deit_with_one_head_ignores_its_second_tokens_output(token):
    """transformers' DeiTForImageClassification: the second token is there, its head is not."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(**HUGGING_FACE, intermediate_size=64)
    theirs = randomized(transformers.DeiTForImageClassification(config))
    checkpoint = read_foreign(theirs.state_dict(), HALF, 2)
    checkpoint.config = replace(checkpoint.config, norm_eps=config.layer_norm_eps)
    ours = VisionTransformer(checkpoint.config, 32, 5).eval()
    load(ours, checkpoint)
    if token:  # it takes part in attention
        ours.transformer.embeddings.register_tokens.mul_(2)
    assert (gap(ours, theirs) < 1e-5) == (token == 0)


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "in memory"])
def test_mae_is_its_encoder(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    options = HUGGING_FACE | {"intermediate_size": 64, "decoder_hidden_size": 16, "mask_ratio": 0.0}
    options |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    theirs = randomized(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**options)))
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict() if not saved else load_file(tmp_path / "model.safetensors")
    checkpoint = read_foreign(state, HALF, 2)
    ours = VisionTransformer(checkpoint.config, 32, 1, zero_head=True).eval()
    report = load(ours, checkpoint)
    assert checkpoint.config.norm_eps == 1e-12 and checkpoint.metadata.positions == "bicubic"
    # With nothing masked, their encoder only shuffles the patches.
    assert gap(ours.features, lambda x: theirs.vit(x).last_hidden_state[:, 0]) < 1e-5
    left = {key for key in state if key.startswith("decoder")}
    assert set(report.left_out) == left and set(report.loaded) == state.keys() - left
    assert set(report.left_out.values()) == {"the decoder, which only pre-training uses"}


def test_pre_training_parts_of_the_original_codes_are_left_out():
    parts = ["decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "mask_token"]  # MAE
    parts += ["head.mlp.0.weight", "head.last_layer.weight_g"]  # DINO
    parts += ["dino_head.mlp.2.bias", "ibot_head.last_layer.weight_v"]  # DINOv2
    encoder = timm_model(num_classes=0).state_dict()
    for prefix in ("", "module.backbone.", "teacher.backbone."):
        state = {f"{prefix}{key}": tensor for key, tensor in encoder.items()}
        state |= {f"{prefix.replace('backbone.', '')}{key}": torch.ones(1) for key in parts}
        checkpoint = read_foreign(state, HALF, 2)
        assert len(checkpoint.metadata.left_out) == len(parts)
        assert len(checkpoint.metadata.keys) == len(encoder)


def dinov2_names(state):
    """timm's names of a model with registers, as those of DINOv2's own code."""
    positions = torch.cat([state["cls_token"] * 0, state["pos_embed"]], dim=1)
    names = {"reg_token": "register_tokens", "mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    for old, new in names.items():
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    return state | {"pos_embed": positions, "mask_token": torch.zeros(1, 32)}


@torch.no_grad()
def test_dinov2_by_its_own_names():
    theirs = timm_model(**TIMM["registers"] | TIMM["DINOv2 giant"])
    checkpoint = read_foreign(dinov2_names(theirs.state_dict()), HALF, 2)
    assert checkpoint.config.num_registers == 4 and checkpoint.config.mlp_dim == 48
    ours = VisionTransformer(checkpoint.config, 32, 5).eval()
    load(ours, checkpoint)
    assert gap(ours, theirs) < 1e-5


def clip_model():
    transformers = pytest.importorskip("transformers")
    vision = HUGGING_FACE | {"intermediate_size": 64}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    text |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return randomized(transformers.CLIPModel(config))


def open_clip_names(state):
    """transformers' names of a CLIP tower as those of OpenAI's and open_clip's."""
    names = {"embeddings.class_embedding": "class_embedding", "pre_layrnorm": "ln_pre"}
    names |= {"embeddings.position_embedding.weight": "positional_embedding"}
    names |= {"embeddings.patch_embedding": "conv1", "post_layernorm": "ln_post"}
    names |= {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1"}
    names |= {"layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj", "visual_projection.weight": "proj"}
    renamed = {}
    for key, tensor in state.items():
        key = key.removeprefix("vision_model.")
        for old, new in names.items():
            key = key.replace(old, new)
        if "self_attn.q_proj" in key:
            parts = [key.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
            old = [part.replace("transformer.resblocks", "encoder.layers") for part in parts]
            tensor = torch.cat([state[f"vision_model.{part}"] for part in old])
        elif "self_attn" in key:
            continue
        renamed[f"visual.{key}"] = tensor
    return renamed | {name: torch.ones(3) for name in ("ln_final.bias", "positional_embedding")}


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "open_clip.pt"])
def test_whole_clip_models(file, tmp_path):
    theirs = clip_model()
    state = theirs.state_dict()
    if file == "open_clip.pt":  # its blocks of both towers have the same names
        texts = {"transformer.resblocks.0.ln_1.bias": torch.ones(3)}
        texts |= {"token_embedding.weight": torch.ones(3, 3), "logit_scale": torch.ones(())}
        vision = {k: x for k, x in state.items() if k.startswith(("vision_model.", "visual_proj"))}
        state = {f"module.{key}": x for key, x in (open_clip_names(vision) | texts).items()}
    save = save_file if file.endswith("tensors") else torch.save
    save(state, tmp_path / file)
    values = {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": values}))
    ours, metadata = open_model(tmp_path / file, head=False)
    assert gap(ours.features, lambda x: theirs.vision_model(x).pooler_output) < 1e-5
    assert {*metadata.keys, *metadata.left_out} == {*state}
    assert all(("vision_model." in key or "visual." in key) for key in metadata.keys)


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["CLIP", "Siglip", "IJepa"])
def test_transformers_classifiers(name, file, tmp_path):
    """SigLIP's reads the mean of the patches, and CLIP's too, without the last norm."""
    transformers = pytest.importorskip("transformers")
    vision = HUGGING_FACE | {"intermediate_size": 64}
    if name == "IJepa":
        config = transformers.IJepaConfig(**vision)
    else:
        config = getattr(transformers, f"{name}Config")(vision_config=vision)
        config.num_labels = 5
    theirs = randomized(getattr(transformers, f"{name}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    if name == "CLIP":
        with pytest.raises(UserError, match=r"the head reads patches without a norm"):
            open_model(tmp_path / file)
    ours, metadata = open_model(tmp_path / file, head=name != "CLIP")
    assert {*metadata.keys, *metadata.left_out} == {*state}
    if name == "CLIP":
        assert gap(ours.features, lambda x: theirs.vision_model(x).pooler_output) < 1e-5
    else:
        assert gap(ours, lambda images: theirs(images).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("names", ["transformers", "open_clip"])
def test_clip_is_its_vision_tower(names, tmp_path):
    theirs = clip_model()
    state = theirs.state_dict()
    if names == "open_clip":  # its names do not tell QuickGELU
        state = {k: x for k, x in state.items() if k.startswith(("vision_model.", "visual_proj"))}
        state = open_clip_names(state)
        given = {
            "quick_gelu": True,
            "vision_cfg": {"width": 32, "head_width": 16, "image_size": 32},
        }
        given = {"model_cfg": given, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(given))
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = (
        read(tmp_path / "m.safetensors") if names == "open_clip" else read_foreign(state, {}, 2)
    )
    assert checkpoint.config.norm_eps == 1e-5 and checkpoint.config.gelu == "quick"
    pixels = Pixels("bicubic", "smaller_side") if names == "open_clip" else PLAIN
    assert checkpoint.metadata.pixels == pixels
    ours = VisionTransformer(checkpoint.config, 32, 1, zero_head=True).eval()
    report = load(ours, checkpoint)
    assert gap(ours.features, lambda x: theirs.vision_model(x).pooler_output) < 1e-5
    tower = {"open_clip": "visual.", "transformers": "vision_model."}[names]
    assert set(report.loaded) == {k for k in state if k.startswith(tower)} - {"visual.proj"}


ROTARY = ["eva02_tiny_patch14_224", "eva02_base_patch14_224", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("name", [*ROTARY, "vit_small_patch16_rope_224", "hf", "own"])
def test_rotary_positions_are_refused_by_name(name):
    if name == "hf":
        transformers = pytest.importorskip("transformers")
        options = HUGGING_FACE | {"intermediate_size": 64, "num_register_tokens": 4}
        state = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options)).state_dict()
    elif name == "own":
        state = timm_model().state_dict() | {"rope_embed.periods": torch.ones(4)}
    else:
        with torch.device("meta"):
            shapes = timm.create_model(name, num_classes=3).state_dict()
        state = {key: torch.empty(tensor.shape) for key, tensor in shapes.items()}
    with pytest.raises(UserError, match=r"^rotary positions \(RoPE\), as of DINOv3 and EVA-02"):
        read_foreign(state, HALF, 2)


EVERYTHING = {"num_registers": 3, "pre_norm": True, "gelu": "quick"}
MODELS = {
    "registers, pre-norm, QuickGELU": EVERYTHING,
    "SwiGLU, fc_norm, mean": {"mlp": "swiglu", "fc_norm": True, "pool": "mean"},
    "map": {"classifier": "gap", "pool": "map", "num_registers": 2},
    "pair": {"num_registers": 1, "pool": "pair"},
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_cpu_kernels_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", {torch.float32})
    monkeypatch.setattr(cpu, "UPCAST_DTYPES", {torch.bfloat16})
    model = random_model(tiny_config(**MODELS[name]), std=0.3)
    images = torch.randn(3, 3, 32, 32)
    wanted = model(images)
    cpu.use_cpu_kernels(model)
    assert (model(images) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    half = model.bfloat16()(images.bfloat16()).float()
    assert (half - wanted).abs().max() < 0.1 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_export_of_any_such_model_is_the_model(name, tmp_path):
    """Trained weights are no library's: the patch layer has a bias before the norm, too."""
    model = random_model(tiny_config(**MODELS[name]), (16, 32), std=0.3)
    checkpoint = checkpoint_of(model, tuple("abcde"))
    if name == "pair":
        with pytest.raises(UserError, match=r"no head of two tokens: export to \.onnx"):
            write(tmp_path / "m.safetensors", checkpoint)
        return
    write(tmp_path / "m.safetensors", checkpoint)
    again, metadata = open_model(tmp_path / "m.safetensors")
    assert again.config == model.config and metadata.img_size == (16, 32)
    assert gap(again, model, (16, 32)) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_of_any_such_model_takes_any_batch(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = random_model(tiny_config(**MODELS[name]), std=0.3)
    write_onnx(tmp_path / "m.onnx", model, checkpoint_of(model, tuple("abcde")))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        found = session.run(None, {"images": images.numpy()})[0]
        wanted = model(images)
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_maps_are_of_patches_and_features_of_the_head(name):
    model = random_model(tiny_config(**MODELS[name]), (16, 32), std=0.5).double()
    images, config = torch.randn(2, 3, 16, 32).double(), model.config
    prefix, pool = config.num_prefix, config.pool
    maps = attention_maps(model, images)
    assert all(a.shape == (2, 2, prefix + 8, prefix + 8) for a in maps)
    count = {"pair": 2, None: 1}.get(pool)
    rows = slice(count) if count else slice(prefix, None)
    last = maps[-1][:, :, rows].mean(dim=2)[..., prefix:].unflatten(-1, (2, 4))
    assert (head_maps(model, images)[-1] - last).abs().max() < 1e-12
    patch = maps[-1][:, :, prefix + 5, prefix:].unflatten(-1, (2, 4))
    assert (head_maps(model, images, patch=5)[-1] - patch).abs().max() < 1e-12

    # The rollout's product by hand: over all tokens, and of the patches at the end.
    joint = torch.eye(prefix + 8).double()
    for a in maps:
        a = a.mean(dim=1) + torch.eye(prefix + 8)
        joint = a / a.sum(dim=-1, keepdim=True) @ joint
    heat = joint[:, rows].mean(dim=1)[:, prefix:].unflatten(-1, (2, 4))
    assert (rollout(model, images) - heat / heat.amax((1, 2), keepdim=True)).abs().max() < 1e-12

    tokens = model.transformer(images)
    wanted = {"token": tokens[:, 0], "mean": tokens[:, prefix:].mean(dim=1)}
    wanted["token+mean"] = torch.cat([*wanted.values()], dim=1)
    wanted |= {config.pooling: model.features(images)}
    for kind in ("mean", config.pooling) if config.classifier == "gap" else wanted:
        assert (embed(model, images, kind) - wanted[kind]).abs().max() < 1e-10


def test_registers_take_part_in_gradient_rollouts():
    model = random_model(tiny_config(**EVERYTHING), std=0.3)
    heat = gradient_rollout(model, torch.randn(2, 3, 32, 32), [0, 1])
    assert heat.shape == (2, 4, 4) and heat.amax() == 1


LACKING = {"register tokens": {"num_registers": 2}, "norm before the blocks": {"pre_norm": True}}
LACKING |= {"norm after the pooling": {"fc_norm": True}, "SwiGLU": {"mlp": "swiglu"}}
LACKING |= {"pooling by 'mean'": {"pool": "mean"}}


@pytest.mark.parametrize("what", LACKING)
def test_googles_layout_refuses_what_it_lacks(what):
    config = tiny_config(**LACKING[what])
    with pytest.raises(
        UserError, match=f"^Google's layout has no {what}.*: export to .safetensors"
    ):
        write_google(random_model(config).state_dict(), config)


def test_registers_have_no_weight_decay():
    model = random_model(tiny_config(num_registers=2))
    _, spared = build_optimizer(Precision(model), "adamw", 1e-3, 0.1).param_groups
    registers = model.transformer.embeddings.register_tokens
    assert spared["weight_decay"] == 0 and id(registers) in map(id, spared["params"])


def test_an_old_bin_has_none_of_it(tmp_path):
    model = random_model(tiny_config(classifier="gap"))
    save_bin(tmp_path / "m.bin", model, "abcde")
    content = load_torch(tmp_path / "m.bin")
    new = ("num_registers", "pre_norm", "pool", "fc_norm", "mlp")
    content["config"] = {key: x for key, x in content["config"].items() if key not in new}
    torch.save(content, tmp_path / "m.bin")
    again, _ = open_model(tmp_path / "m.bin")
    assert again.config == model.config and again.config.pooling == "mean"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))


def test_training_starts_from_dinov2_with_registers_and_from_a_distilled_deit(workdir, capsys):
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    dinov2 = timm.models.VisionTransformer(**size, reg_tokens=4, no_embed_class=True)
    flags = "--dataset digits --model_type ViT-Ti_4 --img_size 8 --train_batch_size 8 --num_steps 2"
    flags += " --eval_batch_size 360 --warmup_steps 0 --pretrained_dir m.safetensors --name"
    for name, theirs in (("reg", dinov2), ("deit", VisionTransformerDistilled(**size))):
        write_files(workdir, theirs, config={"num_heads": 3})
        assert run_command(train, *flags.split(), name) == 0
        model, _ = open_model(f"output/{name}_checkpoint.bin")
        assert model.config.num_registers == {"reg": 4, "deit": 1}[name]
        assert model.config.pool is None and model.head.weight.shape == (10, 192)
    assert "a new head reads the class token alone" in capsys.readouterr().out
