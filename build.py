"""Build the model of a training from its flags: pre-trained weights, their head, what trains."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from models import checkpoints, lora
from models.configs import (
    CONFIGS,
    DEFAULT_MODEL,
    ViTConfig,
    config_name,
    describe,
    for_new_head,
)
from models.errors import UserError
from models.modeling import Attention, VisionTransformer
from models.state_dict import Checkpoint, load
from models.zoo import resolve_checkpoint
from utils.run_log import RunLog
from utils.seeds import named_seed

Start = tuple[Checkpoint, lora.Adapters | None]  # what a training begins with


def read_start(args: Namespace, log: RunLog) -> Start | tuple[None, None]:
    """The pre-trained weights of --pretrained_dir, and the adapters of --lora_from, if any."""
    if args.pretrained_dir == "none":
        return None, None
    file = resolve_checkpoint(args.pretrained_dir, args.model_type, offline=args.offline)
    weights = checkpoints.read(file, args.model_type, args.img_size, progress=log.main)
    if not args.lora_from:
        return weights, None
    with checkpoints.naming(args.lora_from):
        adapters = lora.read_adapters(args.lora_from, weights.state)
    return weights, adapters


def build_model(
    args: Namespace, config: ViTConfig | None, start: Start, classes: Sequence[str], log: RunLog
) -> VisionTransformer:
    """A model of a resumed run's `config`, on pre-trained weights, or new.

    Its head is zeros, or that of the weights. What does not train is frozen.
    """
    weights, adapters = start
    origin = "resumed" if config else "from scratch"
    if weights:
        if adapters:
            weights = add_to(weights, adapters, args)
        config = pretrained_config(args, weights)
    config = config or CONFIGS[args.model_type or DEFAULT_MODEL]
    if args.dropout_rate is not None:
        config = replace(config, dropout_rate=args.dropout_rate)
    torch.manual_seed(named_seed(args.seed, "init"))
    options = {"zero_head": not args.keep_head, "in_channels": args.in_channels}
    model = VisionTransformer(config, args.img_size, len(classes), **options)
    model.transformer.encoder.grad_checkpointing = args.grad_checkpointing
    if weights:
        with checkpoints.naming(args.pretrained_dir):
            if args.keep_head:
                weights = with_head_of(weights, classes, args.lora_from or args.pretrained_dir)
            report = load(model, weights)
        origin = f"from {args.pretrained_dir}: {report}"
    log.print(f"model: {describe(config)} {origin}")
    if args.freeze != "none":
        freeze(model, args.freeze)
    if args.lora:
        lora.add_adapters(model, args.lora, args.lora_on)
        if adapters:
            with checkpoints.naming(args.lora_from):
                lora.load_adapters(model, adapters)
    trained, total = count(model, trained=True), count(model)
    if trained < total:
        log.print(f"trained: {trained:,} of {total:,} parameters")
    return model


def pretrained_config(args: Namespace, weights: Checkpoint) -> ViTConfig:
    """The config of the weights, with the dropout of its variant, which no file holds."""
    name = config_name(weights.config)
    dropout = CONFIGS[name].dropout_rate if name else 0.0
    head, width = weights.state.get("head.weight"), weights.config.hidden_size
    # The head of adapters may be a new one, which reads the plain features.
    plain = head is None or ("pre_logits.weight" not in weights.state and head.shape[1] == width)
    keeps = args.keep_head and not (args.lora_from and plain)
    config = weights.config if keeps else for_new_head(weights.config)
    return replace(config, dropout_rate=dropout)


def add_to(weights: Checkpoint, adapters: lora.Adapters, args: Namespace) -> Checkpoint:
    """The weights with the head of the adapters; without --lora, also with them merged."""
    state = dict(weights.state)
    if adapters.state["head.weight"].shape[1] != weights.config.representation_size:
        state = {k: v for k, v in state.items() if not k.startswith("pre_logits.")}
    if args.lora:  # they train on, beside the weights
        state |= {name: adapters.state[name] for name in ("head.weight", "head.bias")}
    else:
        state = lora.merged(state | adapters.state)
    metadata = replace(weights.metadata, classes=adapters.classes)
    return replace(weights, state=state, metadata=metadata)


def with_head_of(weights: Checkpoint, classes: Sequence[str], file: str) -> Checkpoint:
    """The weights with the rows of the head in the order of `classes`. Raises UserError."""
    own, bias = weights.metadata.classes, weights.state.get("head.bias")
    if own is None or bias is None or len(own) != len(bias) or len(set(own)) < len(own):
        raise UserError("--keep_head needs a head with named classes, such as that of a .bin")
    if set(own) != set(classes):
        other = sorted(set(own) ^ set(classes))
        raise UserError(
            f"--keep_head needs the classes of the data, {len(classes)}, and {file} has "
            f"{len(own)}; one of them alone has {', '.join(other[:4])}"
        )
    rows = [own.index(name) for name in classes]
    head = {name: weights.state[name][rows] for name in ("head.weight", "head.bias")}
    return replace(weights, state=weights.state | head)


def freeze(model: VisionTransformer, what: str | int) -> None:
    """Freeze the `backbone`, or the embeddings and the first blocks; they use no dropout then.

    Raises UserError if the model has fewer blocks.
    """
    blocks = model.transformer.encoder.layer
    frozen = [module for name, module in model.named_children() if name != "head"]
    if what != "backbone":
        if what > len(blocks):
            raise UserError(f"--freeze {what}: the model has {len(blocks)} blocks")
        frozen = [model.transformer.embeddings, *blocks[:what]]
    for module in frozen:
        module.requires_grad_(False)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if isinstance(part, Attention):
                part.attention_dropout_rate = 0.0


def count(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
