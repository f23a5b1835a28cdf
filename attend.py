"""A web page on this machine: drop an image, see its classes and where the model looks."""

import os
import sys
import threading
from pathlib import Path

import torch
from PIL import Image

from data_flags import model_options
from digits import digits_model
from flags import add_checkpoint_flags
from models.checkpoints import open_model
from models.cpu import use_cpu_kernels
from models.errors import UserError
from models.labels import label_names
from models.modeling import VisionTransformer
from models.zoo import resolve_checkpoint
from utils import attention
from utils.cli import Parser, positive_int, run_script
from utils.images import Decoding, read_image, seen_part, to_input

ROLLOUTS = {f"rollout, {fuse} of heads": fuse for fuse in attention.FUSIONS}
LAYER, HEAD, CLASS = "one layer, mean of heads", "one head of one layer", "for the predicted class"
VIEWS = (*ROLLOUTS, LAYER, HEAD, CLASS)
SCREEN = 900  # pixels of the longer side: a camera's image would take seconds to draw and send


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import: no data leaves
    try:
        import gradio
    except ModuleNotFoundError as error:
        install = "pip install -r requirements-page.txt, in a virtual environment of its own"
        raise UserError(f"the page needs gradio: {install}") from error
    if args.checkpoint == "digits":
        if any(model_options(args).values()):
            raise UserError("--img_size, --model_type and pixel flags need a file as --checkpoint")
        model, data = digits_model()
        classes, how = data.classes, data.train.decoding
    else:
        path = resolve_checkpoint(args.checkpoint, variant=args.model_type)
        model, metadata = open_model(path, **model_options(args))
        use_cpu_kernels(model)
        classes = metadata.classes or label_names(model.num_classes)
        how = Decoding.of(model, metadata)
    blocks = build_page(model, classes, Path(args.checkpoint).name, how)
    # The default theme would download fonts from Google.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    options = {"share": False, "quiet": True, "prevent_thread_lock": True, "theme": theme}
    address = f"{args.host}:{args.port}"
    try:
        blocks.launch(server_name=args.host, server_port=args.port, **options)
    except (OSError, OverflowError) as error:
        advice = "choose another --port or --host"
        raise UserError(f"cannot listen at {address} ({error}): {advice}") from error
    print(f"open http://{address} (Ctrl-C ends)", flush=True)
    threading.Event().wait()


def build_parser() -> Parser:
    about = "Show where a model looks, on a local web page. The model `digits` is trained first."
    parser = Parser(prog="attend.py", description=about)
    add_checkpoint_flags(parser, default="digits")
    flag = parser.add_argument
    flag("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    flag("--port", type=positive_int, default=7860, help="port to listen at")
    return parser


def patch_at(x: float, y: float, image: Image.Image, grid: tuple[int, int]) -> int:
    """The patch, counted row by row, at pixel (x, y) of an image of any size."""
    row = min(int(y / image.height * grid[0]), grid[0] - 1)
    column = min(int(x / image.width * grid[1]), grid[1] - 1)
    return row * grid[1] + column


def draw_view(model, image, view, layer, head, discard, patch, how) -> Image.Image:
    """What the model sees of `image` under the map that `view`, one of VIEWS, names.

    Layers and heads count from 1; `how` is the Decoding.
    """
    pixels = to_input(image, model, how)
    if view in ROLLOUTS:
        heat = attention.rollout(model, pixels, ROLLOUTS[view], discard, patch)[0]
    elif view == CLASS:  # there is no patch to choose
        best = model(pixels).argmax(dim=1)
        heat = attention.gradient_rollout(model, pixels, best)[0]
    else:
        heads = attention.head_maps(model, pixels, patch)[layer - 1, 0]  # (H, h, w)
        heat = heads[head - 1] if view == HEAD else heads.mean(dim=0)
    return attention.overlay(seen_part(image, model.img_size, how.pixels), heat)


def build_page(
    model: VisionTransformer, classes: tuple[str, ...] | None, title: str, how: Decoding
):
    """The page as gradio.Blocks. Classes without names are numbers; `how` decodes the images."""
    import gradio as gr

    classes = classes or tuple(map(str, range(model.num_classes)))
    h, w = model.grid

    @torch.no_grad()
    def classify(image):
        if image is None:
            return None
        probabilities = model(to_input(image, model, how))[0].softmax(dim=0)
        best = probabilities.topk(min(5, len(classes))).indices.tolist()
        # From the least probable: of two classes with the same name the more probable one is shown.
        return {classes[i]: float(probabilities[i]) for i in reversed(best)}

    def draw(image, patch, view, *choices):
        if image is None:
            return None, "Drop an image."
        query = "The query is what the classifier reads. Click a patch to make it the query."
        if patch is not None and view != CLASS:
            query = f"The query is the patch in row {patch // w + 1}, column {patch % w + 1}."
        image = read_image(image, how)
        image.thumbnail((SCREEN, SCREEN))
        return draw_view(model, image, view, *choices, patch, how), query

    def click(picture, event: gr.SelectData):
        return patch_at(*event.index, picture, model.grid)

    with gr.Blocks(title="Where a Vision Transformer looks", analytics_enabled=False) as blocks:
        colours = f"Dark: least attention. Yellow: most (top {1 - attention.CLIP:.0%} of patches)."
        gr.Markdown(f"# Where a Vision Transformer looks\n{title}, {h}x{w} patches. {colours}")
        patch = gr.State(None)
        sources = ["upload", "clipboard"]  # no webcam
        buttons = ["download", "fullscreen"]  # the default has one that uploads
        output = {"format": "png", "interactive": False, "buttons": buttons, "label": "attention"}
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", image_mode=None, sources=sources, elem_id="image")
                label = gr.Label(num_top_classes=5, label="top 5", elem_id="classes")
                if not model.head.weight.any():
                    gr.Markdown("The head of this checkpoint is all zeros: ignore the classes.")
            with gr.Column():
                shown = gr.Image(type="pil", elem_id="attention", **output)
                query = gr.Markdown("Drop an image.", elem_id="query")
                view = gr.Dropdown(VIEWS, value=VIEWS[0], label="what to show", elem_id="view")
                layers, heads = model.config.num_layers, model.config.num_heads
                layer = gr.Slider(1, layers, layers, step=1, label="layer", elem_id="layer")
                head = gr.Slider(1, heads, 1, step=1, label="head", elem_id="head")
                discard = gr.Slider(0, 0.99, 0, label="fraction that a rollout discards")
                reset = gr.Button("back to what the classifier reads", elem_id="reset")
        inputs = [image, patch, view, layer, head, discard]
        # The progress is shown at the text: on the picture it would catch clicks.
        outputs = [shown, query]
        drawing = {"fn": draw, "inputs": inputs, "outputs": outputs, "show_progress_on": query}
        image.change(lambda: None, None, patch).then(classify, image, label).then(**drawing)
        shown.select(click, shown, patch).then(**drawing)
        reset.click(lambda: None, None, patch).then(**drawing)
        for choice in (view, layer, head, discard):
            choice.input(**drawing)
    return blocks


if __name__ == "__main__":
    sys.exit(run_script("attend.py", main))
