"""What a run is made of, each from its flags: weights, model, precision, optimizer."""

import os
from dataclasses import replace

import torch

from flags import DEFAULT_MODEL, check_size
from models.configs import CONFIGS
from models.cpu import cpu_has_bfloat16
from models.modeling import VisionTransformer
from models.structure import (
    WeightsError,
    check_variant,
    infer_config,
    infer_img_size,
    variant_names,
)
from models.weights import canonical
from models.zoo import locate
from utils import dist_util
from utils.checkpoint import read_pretrained
from utils.precision import Precision
from utils.run_log import RunLog
from utils.seeds import named_seed


def read_weights(args):
    """What the pre-trained file holds and the variant's config; None from scratch.

    What is not here is fetched. `--model_type` is checked against the file, or follows from it.
    """
    if args.pretrained_dir == "none":
        return None
    path = dist_util.main_first(
        lambda: locate(args.pretrained_dir, variant=args.model_type, offline=args.offline)
    )
    found = read_pretrained(path, args.model_type, args.img_size, dist_util.rank() == 0)
    try:
        arrays, _ = canonical(found.arrays)
        shapes = {key: array.shape for key, array in arrays.items()}
        inferred = infer_config(shapes)
        variant = args.model_type or next(iter(variant_names(inferred)), DEFAULT_MODEL)
        # The variant's name says token or gap no more than its size: the file does.
        config = replace(CONFIGS[variant], classifier=inferred.classifier, gelu=found.gelu,
                         norm_eps=found.norm_eps)  # fmt: skip
        check_variant(config, shapes)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    check_size(config, args.img_size)
    own = infer_img_size(shapes)
    height, width = config.grid(args.img_size)
    if own and (times := height * width / (own // config.stride) ** 2) >= 4:
        found.notes.append(f"it was made for {own}x{own} pixels, which --img_size {own} keeps: "
                           f"here an image has {times:.0f} times as many patches")  # fmt: skip
    return found, config


def build_model(args, pretrained, config, num_classes: int, log: RunLog) -> VisionTransformer:
    """The variant with a new head of zeros: to be resumed (`config`), on weights, or new."""
    new = config or CONFIGS[args.model_type or DEFAULT_MODEL]
    found, config = pretrained or (None, new)
    if args.dropout_rate is not None or args.freeze == "backbone":
        config = replace(config, dropout_rate=args.dropout_rate or 0.0)
    torch.manual_seed(named_seed(args.seed, "init"))
    model = VisionTransformer(
        config, args.img_size, num_classes, zero_head=True, in_channels=args.in_channels
    )
    model.transformer.encoder.grad_checkpointing = args.grad_checkpointing
    if found is None:
        how = " from scratch" if args.resume is None else ""
        log.say(f"model: {variant_of(model)}{how}")
    else:
        report = model.load_from(found.arrays, position_grid=found.grid)
        notes = "; ".join([str(report), *found.notes])
        log.say(f"model: {variant_of(model)} from {args.pretrained_dir}: {notes}")
    if args.freeze == "backbone":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        log.say("the backbone is frozen: only the head trains")
    return model


def variant_of(model: VisionTransformer) -> str:
    return variant_names(model.config)[0]


def build_precision(args, model, device: torch.device, log: RunLog) -> Precision:
    dtype, level = torch.bfloat16, args.fp16_opt_level
    if args.fp16 and device.type == "cuda":
        dtype = torch.float16
    elif args.fp16:
        log.say("a CPU computes float16 slowly: --fp16 runs as bfloat16 here")
    if not (args.fp16 or args.bf16):
        level = "O0"
        if device.type == "cuda":
            log.say("note: float32, as neither --fp16 nor --bf16 is given, is several times slower "
                    "on a GPU")  # fmt: skip
    elif device.type == "cpu" and level == "O1" and not cpu_has_bfloat16():
        log.say("note: this CPU has no instructions for bfloat16, which makes O1 many times slower "
                "here than O2, whose products are float32's")  # fmt: skip
    return Precision(model, level, dtype, args.loss_scale)


def build_optimizer(args, precision: Precision, device: torch.device) -> torch.optim.Optimizer:
    rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.apex:
        from apex.optimizers import FusedSGD

        return FusedSGD(precision.parameters, momentum=0.9, **rates)
    # On a CPU torch 2.11's fused step leaves half-precision parameters (O3) as they are.
    fused = device.type != "cpu" or precision.parameters[0].dtype == torch.float32
    if args.optimizer == "sgd":
        return torch.optim.SGD(precision.parameters, momentum=0.9, fused=fused, **rates)
    # Weights of layers decay; biases, norms, positions and the class token do not.
    named = list(zip(precision.names, precision.parameters, strict=True))
    matrices = [p for name, p in named if p.ndim > 1 and not name.endswith(("embeddings", "token"))]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=fused, **rates)


def make_deterministic() -> None:
    """Only algorithms that give the same bits each time; what has none raises an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
