"""A page on this machine: drop an image, see its classes and where the model looks.

The notebook takes its models from here, too: any checkpoint, or a small one trained on digits.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from data_utils import Data, load_data
from models.configs import ViTConfig
from models.download import DownloadError
from models.modeling import VisionTransformer
from models.structure import WeightsError
from models.zoo import locate
from utils import attention, classifier, figures
from utils.checkpoint import CheckpointError
from utils.cli import FlagError, Parser, image_size, positive
from utils.scheduler import learning_rate
from utils.shell import status_of
from utils.stream import Augmentation, EvalStream, Slice, TrainStream

USER_ERRORS = (FlagError, DownloadError, WeightsError, CheckpointError)
ROLLOUTS = {f"rollout, {fuse} of heads": fuse for fuse in attention.FUSIONS}
LAYER, HEAD, CLASS = "one layer, mean of heads", "one head of one layer", "for the predicted class"
VIEWS = (*ROLLOUTS, LAYER, HEAD, CLASS)

SHOWN = 900  # pixels of the longer side of a picture on the page

CPU = torch.device("cpu")
DIGITS_CONFIG = ViTConfig(patch_size=4, hidden_size=64, mlp_dim=128, num_heads=4, num_layers=3)


def open_model(
    path: str | Path, img_size: int | tuple[int, int] | None = None
) -> tuple[VisionTransformer, tuple[str, ...]]:
    """(model in evaluation mode, class names) of a `.bin`, `.npz` or `.safetensors`.

    Unlike a classifier it may have a head of zeros: there is still attention to look at. Numbers
    stand for names that nobody knows. Raises WeightsError or CheckpointError with one sentence.
    """
    model, record = classifier.open_model(path, img_size=img_size)
    names = record["classes"] or classifier.known_labels(model.num_classes)
    return model, tuple(names or map(str, range(model.num_classes)))


def digits_model(
    updates: int = 200, say: Callable[[str], None] = print
) -> tuple[VisionTransformer, Data]:
    """(a small ViT trained on scikit-learn's digits, its data): seconds, and no download."""
    data = load_data("digits", ".", val_fraction=0, seed=0, channels=1)
    torch.manual_seed(0)
    model = VisionTransformer(DIGITS_CONFIG, 32, len(data.classes), in_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    stream = TrainStream(data.train, Augmentation("crop", model.img_size, 0.7), seed=0, batch=64,
                         part=Slice(), device=CPU)  # fmt: skip
    for step, (micro,) in enumerate(stream.updates(0, updates)):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, base=3e-3, total=updates, warmup=20, decay="cosine"
        )
        images, labels = stream.prepare(micro)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(images).argmax(dim=1) == labels).sum().item()
                    for images, labels in EvalStream(data.held_out, model.img_size, batch=360,
                                                     part=Slice(), device=CPU))  # fmt: skip
    say(f"trained on {data.source}: {right} of {len(data.held_out)} held-out digits are right")
    return model, data


# -------------------------------------------------------------------------------------- the page


def for_screen(image: Image.Image) -> Image.Image:
    """No larger than a screen shows: a camera's picture would take seconds to draw and send."""
    image = image.copy()
    image.thumbnail((SHOWN, SHOWN))
    return image


def patch_at(x: float, y: float, image: Image.Image, grid: tuple[int, int]) -> int:
    """The patch, counted row by row, under the pixel (x, y) of an image of any size."""
    row = min(int(y / image.height * grid[0]), grid[0] - 1)
    column = min(int(x / image.width * grid[1]), grid[1] - 1)
    return row * grid[1] + column


def view(
    model: VisionTransformer,
    image: Image.Image,
    kind: str,
    layer: int,
    head: int,
    discard: float,
    patch: int | None,
) -> Image.Image:
    """`image` under the map `kind` of VIEWS; layers and heads count from 1, as readers do."""
    pixels = figures.to_pixels(image, model)
    if kind in ROLLOUTS:
        heat = attention.rollout(model, pixels, ROLLOUTS[kind], discard, patch)[0]
    elif kind == CLASS:  # a class has no patch that asks
        with torch.no_grad():
            best = model(pixels).argmax(dim=1)
        heat = attention.gradient_rollout(model, pixels, best)[0]
    else:
        heads = attention.head_maps(model, pixels, patch)[layer - 1, 0]  # (H, h, w)
        heat = heads[head - 1] if kind == HEAD else heads.mean(dim=0)
    return attention.overlay(image, heat)


def page(model: VisionTransformer, classes: tuple[str, ...], title: str):
    """The gradio.Blocks of the page."""
    import gradio as gr

    def classify(image):
        if image is None:
            return None
        with torch.no_grad():
            logits = model(figures.to_pixels(image, model))[0]
        # Two classes of ImageNet may share a name: the more probable one stays.
        return dict(reversed(figures.top_classes(logits, classes)))

    def draw(image, patch, *choices):
        if image is None:
            return None, "drop an image"
        if patch is None or choices[0] == CLASS:
            asked = "asked by what the classifier reads: click a patch to ask it instead"
        else:
            row, column = divmod(patch, model.grid[1])
            asked = f"asked by the patch in row {row + 1}, column {column + 1}"
        return view(model, for_screen(image), *choices, patch), asked

    def click(image, event: gr.SelectData):
        return None if image is None else patch_at(*event.index, for_screen(image), model.grid)

    h, w = model.grid
    layers, heads = model.config.num_layers, model.config.num_heads
    with gr.Blocks(title="Where a Vision Transformer looks", analytics_enabled=False) as blocks:
        gr.Markdown(f"# Where a Vision Transformer looks\n{title}; {h}x{w} patches. "
                    "Click the right picture to see what a patch attends to.")  # fmt: skip
        patch = gr.State(None)
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", image_mode="RGB", sources=["upload", "clipboard"],
                                 label="image", elem_id="image")  # fmt: skip
                label = gr.Label(num_top_classes=5, label="top 5", elem_id="classes")
                if not model.head.weight.any():
                    gr.Markdown("The head of this checkpoint is all zeros: the classes mean "
                                "nothing.")  # fmt: skip
            with gr.Column():
                seen = gr.Image(type="pil", format="png", interactive=False, label="attention",
                                buttons=["download", "fullscreen"],  # no sharing with a stranger
                                elem_id="attention")  # fmt: skip
                asked = gr.Markdown("drop an image", elem_id="asked")
                kind = gr.Dropdown(VIEWS, value=VIEWS[0], label="what to show", elem_id="kind")
                layer = gr.Slider(1, layers, layers, step=1, label="layer", elem_id="layer")
                head = gr.Slider(1, heads, 1, step=1, label="head", elem_id="head")
                discard = gr.Slider(0, 0.99, 0, label="weakest part that a rollout leaves out")
                reset = gr.Button("ask what the classifier reads", elem_id="reset")
        # Progress is shown beside the picture: over it, it would swallow clicks.
        drawing = {"fn": draw, "inputs": [image, patch, kind, layer, head, discard],
                   "outputs": [seen, asked], "show_progress_on": asked}  # fmt: skip
        image.change(lambda: None, None, patch).then(classify, image, label).then(**drawing)
        seen.select(click, image, patch).then(**drawing)
        reset.click(lambda: None, None, patch).then(**drawing)
        for choice in (kind, layer, head, discard):
            choice.input(**drawing)
    return blocks


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="attend.py", description="Show on a local page where a model looks.")
    parser.add_argument(
        "--checkpoint",
        default="digits",
        metavar="FILE",
        help="a .bin, .npz or .safetensors; `digits` trains a small model in seconds",
    )
    parser.add_argument(
        "--img_size",
        type=image_size,
        help="pixels, a side or height x width; the checkpoint's own if not given",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in",
    )
    parser.add_argument("--port", type=positive, default=7860, help="port to listen at")
    args = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing leaves
    try:
        import gradio
    except ModuleNotFoundError:
        raise FlagError("the page needs gradio: pip install -r requirements-page.txt, in a "
                        "virtual environment of its own") from None  # fmt: skip
    if args.checkpoint == "digits":
        if args.img_size is not None:
            raise FlagError("--img_size is for a --checkpoint: the digits model has 32 pixels")
        model, data = digits_model()
        classes = data.classes
    else:
        model, classes = open_model(locate(args.checkpoint), args.img_size)
    # The default theme would fetch its fonts from Google's site.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    try:
        page(model, classes, Path(args.checkpoint).name).launch(
            server_name=args.host, server_port=args.port, share=False, quiet=True,
            prevent_thread_lock=True, theme=theme)  # fmt: skip
    except (OSError, OverflowError) as error:
        raise FlagError(f"cannot listen at {args.host}:{args.port} ({error}): name another --port "
                        "or --host") from None  # fmt: skip
    print(f"open http://{args.host}:{args.port} (Ctrl-C ends)", flush=True)
    threading.Event().wait()


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell."""
    return status_of("attend.py", main, argv, USER_ERRORS)


if __name__ == "__main__":
    sys.exit(run())
