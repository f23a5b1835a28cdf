"""The command line of train.py, and the flags that the other commands share with it."""

import argparse
from importlib.util import find_spec

from data_flags import (
    DEVICE,
    EVAL_BATCH,
    WORKERS,
    add_data_flags,
    add_pixel_flags,
    bit_depth,
    colour,
)
from models.configs import CONFIGS, DEFAULT_MODEL
from models.errors import UserError
from models.lora import LAYERS
from models.zoo import expected_variant
from utils import hardware
from utils.augment import AUGMENTATIONS
from utils.balance import BALANCES, LOSSES
from utils.cli import (
    Parser,
    cache_size,
    fraction,
    image_size,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_fraction,
    positive_int,
    rand_augment,
)
from utils.images import CHANNEL_MODES
from utils.metrics import SCORES
from utils.precision import LEVELS
from utils.scheduler import DECAYS

EPOCHS_OF = {"num_steps": "epochs", "warmup_steps": "warmup_epochs"}


# fmt: off
def build_parser() -> Parser:
    description = "Fine-tune a Vision Transformer. @FILE reads flags from a file, such as "
    description += "@recipes/google-vit-cifar10.txt; flags after it win."
    parser = Parser(prog="train.py", description=description, fromfile_prefix_chars="@")
    group = parser.add_argument_group("run")
    flag = group.add_argument
    flag("--name", required=True, help="name of the run, of its files and of its logs")
    flag("--output_dir", default="output", metavar="DIR", help="folder of checkpoints and results")
    flag("--seed", type=non_negative_int, default=42, help="seed of every random number")
    flag("--select", choices=("best", "last"), default="best",
         help="which weights are the result; Google's code takes the last")
    flag("--select_by", choices=SCORES, default="accuracy",
         help="which figure of the validation set selects the best weights")
    flag("--eval_every", type=positive_int, default=100, help="steps between evaluations")
    flag("--log_every", type=positive_int, default=10, help="steps between points of the curves")
    flag("--patience", type=non_negative_int, default=0, metavar="COUNT",
         help="stop after COUNT evaluations in a row that were not the best; 0: never")
    flag("--save_minutes", type=non_negative_float, default=10.0, metavar="MINUTES",
         help="time between saves in the background, for --resume")
    flag("--save_every", type=positive_int, metavar="STEPS",
         help="steps between saves, instead of --save_minutes")
    flag("--wandb", metavar="PROJECT", help="also send the curves to Weights & Biases")
    exclusive_flag = group.add_mutually_exclusive_group().add_argument
    exclusive_flag("--resume", nargs="?", const="", metavar="FILE",
                   help="continue from FILE, or from output/<name>_last.pt; auto: if that is "
                   "there, else start a new run")
    exclusive_flag("--overwrite", action="store_true", help="replace an earlier run's results")
    flag("--device", **DEVICE)
    flag("--deterministic", action="store_true", help="the same bits each time; slower on a GPU")
    flag("--compile", choices=hardware.COMPILE_CHOICES, default="auto",
         help="torch.compile; auto: on a CUDA GPU, if it probably saves time in all")

    flag = parser.add_argument_group("model").add_argument
    flag("--pretrained_dir", default="checkpoint/ViT-B_16.npz", metavar="FILE",
         help="weights to start from: a path, an address, BUCKET/NAME of models.zoo, hf:ORG/NAME, "
         "timm:NAME, or `none`")
    flag("--model_type", choices=list(CONFIGS), metavar="NAME",
         help=f"{', '.join(CONFIGS)} (default: the file's own, {DEFAULT_MODEL} from scratch)")
    flag("--img_size", type=image_size, default=224, metavar="PIXELS",
         help="resolution: a side, or height x width like 192x256")
    flag("--in_channels", type=int, choices=list(CHANNEL_MODES), default=3,
         help="channels of the images: 1 grey, 3 RGB, 4 RGBA")
    flag("--dropout_rate", type=fraction, help="dropout probability (default: the variant's own)")
    flag("--keep_head", action="store_true",
         help="start with the head of the weights, whose classes are the data's, in any order")
    flag("--freeze", type=freeze_depth, default="none", metavar="{none,backbone,BLOCKS}",
         help="what does not train, and has no dropout: all but the head, or the embeddings and "
         "so many blocks")
    flag("--lora", type=positive_int, metavar="RANK",
         help="train low-rank adapters and the head, nothing else; 8, say")
    flag("--lora_on", type=lora_layers, default="query,value", metavar="LAYERS",
         help=f"layers of the attention with adapters, with commas: {','.join(LAYERS)}")
    flag("--lora_from", metavar="FILE",
         help="adapters that --lora has trained on the same weights: with --lora they train on, "
         "else they are merged and all weights train; --keep_head takes their head, too")

    flag = add_data_flags(parser).add_argument
    flag("--num_workers", **WORKERS)
    flag("--cache", type=cache_size, metavar="GIB", default="auto",
         help="memory for decoded files, so that each is decoded once: auto (a quarter of what is "
         "free), off, or GiB")
    flag("--bit_depth", type=bit_depth, metavar="BITS", default="auto",
         help="of 16- and 32-bit images; auto: from the largest value of 256 training images; "
         "0: floats from 0 to 1")
    flag("--background", type=colour, metavar="COLOUR", default="white",
         help="behind transparent pixels: a name, or #rrggbb; `none` drops the alpha")
    flag = parser.add_argument_group("augmentation").add_argument
    flag("--augmentation", choices=AUGMENTATIONS, default="crop",
         help="random crop, as in the earlier port; with flip, as in Google's code; resize_crop: "
         "a random crop of the image that --resize makes; none: as in evaluation")
    flag("--flip", action="store_true", help="mirror half of the images, with any augmentation")
    flag("--crop_min_area", type=fraction, default=0.05, help="smallest fraction of the image area")
    flag("--rand_augment", type=rand_augment, metavar="N,M",
         help="N of RandAugment's 14 operations on each image, at magnitude M of 30")
    flag("--random_erasing", type=fraction, default=0.0, metavar="P",
         help="probability that a box of an image becomes grey")
    flag("--mixup", type=non_negative_float, default=0.0, help="alpha of mixup; 0 is off")
    flag("--cutmix", type=non_negative_float, default=0.0, help="alpha of CutMix; 0 is off")
    add_pixel_flags(parser)

    flag = parser.add_argument_group("optimization").add_argument
    flag("--train_batch_size", type=positive_int, default=512,
         help="images of one step, over all processes and micro-batches")
    flag("--eval_batch_size", **EVAL_BATCH)
    flag("--gradient_accumulation_steps", type=positive_int, default=1, metavar="COUNT",
         help="micro-batches of one step, to save memory; the result stays the same")
    flag("--grad_checkpointing", action="store_true",
         help="keep only the inputs of blocks and compute the rest again, to save memory")
    flag("--optimizer", choices=("sgd", "adamw"), default="sgd",
         help="SGD with momentum 0.9, or AdamW, which suits training from scratch")
    flag("--momentum_dtype", choices=("float32", "bfloat16"), default="float32",
         help="in which SGD keeps its momentum; Google's trainer keeps bfloat16")
    flag("--learning_rate", type=non_negative_float, default=3e-2, help="lr after the warm-up")
    flag("--layer_decay", type=positive_fraction, default=1.0, metavar="FACTOR",
         help="the lr of each layer is that of the one above it times FACTOR; 0.75, say")
    flag("--drop_path", type=fraction, default=0.0, metavar="RATE",
         help="stochastic depth: how often an image skips a branch of the last block; 0 at the "
         "first block and rising linearly; 0.1, say")
    flag("--ema", type=fraction, default=0.0, metavar="DECAY",
         help="also average the weights; what evaluates better is kept; 0 is off, 0.999 looks "
         "back about 1000 steps")
    flag("--loss", choices=LOSSES, default="ce",
         help="cross-entropy, or binary cross-entropy of each class")
    flag("--weight_decay", type=non_negative_float, default=0.0,
         help="of all parameters with SGD; decoupled, of matrices only, with AdamW")
    flag("--balance", choices=BALANCES, default="none",
         help="weigh small classes more in the loss, or draw all classes equally often")
    flag("--label_smoothing", type=fraction, default=0.0, help="fraction spread over all classes")
    flag("--num_steps", type=positive_int, default=10000, action=Steps, help="steps in all")
    flag("--epochs", type=positive_float, metavar="COUNT",
         help="passes over the training images, instead of --num_steps")
    flag("--decay_type", choices=DECAYS, default="cosine", help="fall of the lr after the warm-up")
    flag("--warmup_steps", type=non_negative_int, default=500, action=Steps,
         help="steps in which the lr rises")
    flag("--warmup_epochs", type=non_negative_float, metavar="COUNT", help="the same in epochs")
    flag("--max_grad_norm", type=non_negative_float, default=1.0, help="clip to it; 0 is off")

    flag = add_precision_flags(parser).add_argument
    flag("--loss_scale", type=non_negative_float, default=0.0,
         help="0: dynamic for float16, none for bfloat16; else this constant")
    flag("--apex", action="store_true", help="use the fused SGD of NVIDIA's apex, if installed")

    add_launch_flags(parser)
    return parser


def add_checkpoint_flags(parser: Parser, default: str | None = None, labels=False) -> None:
    """The model of every command but train.py, and the names of its classes."""
    flag = parser.add_argument_group("model").add_argument
    flag("--checkpoint", required=default is None, default=default, metavar="FILE",
         help="a .bin of train.py, a .npz or a .safetensors; BUCKET/NAME of `models.zoo`; "
         "hf:ORG/NAME[@REVISION] or timm:NAME")
    flag("--model_type", choices=list(CONFIGS), metavar="NAME",
         help="variant that the file must be; gives the heads where a .safetensors lacks them")
    flag("--img_size", type=image_size, metavar="PIXELS",
         help="another resolution than the file's: a side, or height x width like 192x256")
    if labels:
        flag("--labels", metavar="FILE",
             help="names of the model's classes in order, one a line, or a CSV of index,name")
    add_pixel_flags(parser)


def add_precision_flags(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("mixed precision")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--fp16", action="store_true", help="float16 at --fp16_opt_level; bfloat16 on a CPU")
    flag("--bf16", action="store_true", help="bfloat16 at --fp16_opt_level")
    group.add_argument("--fp16_opt_level", choices=LEVELS, default="O2",
                       help="O0 float32, O1 autocast, O2 half with float32 masters, O3 all half")
    return group


def add_launch_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("several processes").add_argument
    flag("--local_rank", "--local-rank", type=int, default=-1,
         help="number of this process on its machine; torchrun's environment wins")
    flag("--timeout", type=non_negative_float, default=30.0,
         help="minutes that processes wait for each other before the run fails")
# fmt: on


def parse_flags(argv: list[str] | None, world_size: int) -> argparse.Namespace:
    """Parse train.py's flags and check what needs neither weights nor data. Raises UserError."""
    args = build_parser().parse_args(argv)
    check_name(args.name)
    batches = world_size * args.gradient_accumulation_steps
    micro_batch, remainder = divmod(args.train_batch_size, batches)
    if remainder:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} must be a multiple of {batches} "
            f"({world_size} processes x {args.gradient_accumulation_steps} micro-batches)"
        )
    if (args.mixup or args.cutmix) and micro_batch % 2:
        raise UserError(
            f"--mixup and --cutmix mix pairs: a micro-batch of {micro_batch} is odd, make it even"
        )
    needs = {"--freeze": args.freeze != "none", "--keep_head": args.keep_head}
    needs |= {"--lora": args.lora, "--lora_from": args.lora_from}
    for flag in [flag for flag, given in needs.items() if given and args.pretrained_dir == "none"]:
        raise UserError(f"{flag} needs pre-trained weights: give --pretrained_dir a file")
    if args.freeze == "backbone" and (args.dropout_rate or args.drop_path):
        raise UserError("--freeze backbone uses neither --dropout_rate nor --drop_path")
    if args.lora and args.freeze != "none":
        raise UserError("--lora freezes all but adapters and head: leave --freeze out")
    if args.rand_augment and args.in_channels == 4:
        raise UserError("--rand_augment takes grey and RGB images: leave it or --in_channels 4 out")
    if args.wandb and not getattr(find_spec("wandb"), "origin", None):  # not its folder of runs
        raise UserError("--wandb: wandb is not installed: pip install wandb")
    if args.compile == "on" and not hardware.can_compile():
        raise UserError("--compile on needs a C++ compiler (g++) and Python's headers")
    if args.apex and not (find_spec("apex") and find_spec("amp_C")):  # PyPI's apex is not NVIDIA's
        raise UserError("--apex: NVIDIA's apex and its kernels are not installed: leave it out")
    if args.apex and (args.optimizer != "sgd" or (args.bf16 and args.fp16_opt_level == "O3")):
        raise UserError("--apex is for --optimizer sgd, and not for --bf16 at O3: leave it out")
    if args.momentum_dtype == "bfloat16" and (args.optimizer != "sgd" or args.apex):
        raise UserError("--momentum_dtype bfloat16 is for --optimizer sgd, without --apex")
    variant = args.model_type or expected_variant(args.pretrained_dir)
    if variant or args.pretrained_dir == "none":
        CONFIGS[variant or DEFAULT_MODEL].grid(args.img_size)
    return args


class Steps(argparse.Action):
    """Takes the place of epochs that are given before it."""

    def __call__(self, parser, values, value, option_string=None):
        setattr(values, self.dest, value)
        setattr(values, EPOCHS_OF[self.dest], None)


def freeze_depth(text: str) -> str | int:
    if text not in ("none", "backbone") and not (text.isdecimal() and int(text) < 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is none, backbone, nor a number of blocks")
    return int(text) if text.isdecimal() else text


def lora_layers(text: str) -> tuple[str, ...]:
    chosen = set(text.split(","))
    if not chosen <= set(LAYERS):
        raise argparse.ArgumentTypeError(f"{text!r}: give some of {','.join(LAYERS)}, with commas")
    return tuple(name for name in LAYERS if name in chosen)


def check_name(name: str) -> None:
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise UserError(f"--name {name!r} must be a plain file name, without / or \\")
