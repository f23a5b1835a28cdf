"""Fine-tune a Vision Transformer. The file is one run, read from top to bottom.

flags -> checkpoint -> data -> VisionTransformer -> train loop <-> evaluation -> results
"""

import sys
import time
from argparse import Namespace
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from build import build_model, read_start
from data_flags import train_data_options
from data_utils import Data, check_source, load_data
from evaluate import evaluate_model, results_header
from flags import parse_flags
from models import checkpoints
from models.cpu import use_cpu_kernels
from models.errors import RunError, UserError
from models.modeling import VisionTransformer
from models.state_dict import Metadata
from resume import begin_files, check_no_results, count_steps, find_run, finished_line, lock_run
from utils import dist_util, figures, hardware, metrics
from utils.augment import Augmentation
from utils.balance import binary_cross_entropy, cross_entropy
from utils.checkpoint import RunPaths, RunState, SavedRun, Saver, adopt_best, restore_run
from utils.cli import run_script
from utils.drop_path import DropPath
from utils.image_cache import new_cache
from utils.optimizer import build_optimizer
from utils.precision import Precision, build_precision
from utils.run_log import RunLog
from utils.scheduler import set_lr
from utils.seeds import named_seed
from utils.signals import SAVE, Interrupted, StopRequest
from utils.stream import EvalStream, Shard, TrainStream


@dataclass
class Run:
    """What the functions of this file share."""

    args: Namespace
    paths: RunPaths
    state: RunState
    data: Data
    model: VisionTransformer
    precision: Precision
    optimizer: torch.optim.Optimizer
    device: torch.device
    log: RunLog
    saver: Saver
    preview: figures.AttentionPreview | None  # on rank 0
    eval_batch_size: int
    drop_path: DropPath | None
    evaluating: float = 0.0  # seconds


def main(argv: list[str] | None = None) -> None:
    rank, _, world_size = dist_util.launcher_env()
    args = parse_flags(argv, world_size)
    check_no_results(args)
    paths, log = RunPaths(args.output_dir, args.name), RunLog(rank == 0)
    hardware.choose_kernels(args.deterministic)
    with lock_run(args) if rank == 0 else nullcontext():
        device = dist_util.init(args.local_rank, args.timeout, args.device)
        saved = find_run(args, log.print)  # rank 0 has the lock: no other process saves now
        if line := finished_line(args, saved):
            return log.print(line)
        run = build_run(args, paths, saved, device, log)
        saved = None  # the memory of its tensors is free again
        # No file of a run is changed before this: a refused command leaves all as it was.
        dist_util.from_main(lambda: begin_files(args, paths, run.state.step, log))
        if run.state.step:
            adopt_best(paths.resumed(args.resume), paths, run.state, log.print)
        with closing(log), closing(run.saver), closing(StopRequest()) as stop_request:
            try:
                train(run, stop_request)
                finish(run)
            except (UserError, RunError) as error:
                # With several processes the others are still inside the step: no save then.
                if isinstance(error, UserError) and world_size == 1 and run.state.step:
                    run.saver.save()
                run.saver.close()
                hint = f"; --resume continues from {paths.last}" if paths.last.exists() else ""
                skip = " (--skip_unreadable leaves it out)" if isinstance(error, UserError) else ""
                kind = type(error) if world_size == 1 else RunError  # which every rank prints
                raise kind(f"{error}{skip}; after step {run.state.step}{hint}") from error


def build_run(args: Namespace, paths: RunPaths, saved: SavedRun | None, device, log) -> Run:
    """Build a run from its flags: resumed, on pre-trained weights, or from scratch."""
    check_source(args.dataset, Path(args.data_dir), args.val_fraction)  # before a download
    state = saved.state if saved else RunState(select=args.select, select_by=args.select_by)
    content, config = saved and saved.content, saved and saved.config
    hardware.keep_freed_memory(device)
    log.print(f"device: {dist_util.describe_device(device)}")
    start = (None, None) if saved else read_start(args, log)
    options = train_data_options(args, log, content, start[0])
    data = dist_util.from_main(lambda: load_data(args.dataset, **options))
    log.print(f"data: {data}")
    count_steps(args, len(data.train))
    model = use_cpu_kernels(build_model(args, config, start, data.classes, log).to(device))
    levels = (args.fp16, args.bf16, args.fp16_opt_level, args.loss_scale, args.ema)
    precision = build_precision(model, device, *levels, log=log.print)
    hyper = (args.optimizer, args.learning_rate, args.weight_decay)
    kind = (args.apex, args.momentum_dtype, args.layer_decay)
    optimizer = build_optimizer(precision, *hyper, *kind)
    if saved is not None:
        restore_run(saved, precision, optimizer, data.fingerprint)
        log.print(saved.describe(args.num_steps))
    elif args.warmup_steps >= args.num_steps:
        log.print(f"note: --warmup_steps {args.warmup_steps} >= --num_steps {args.num_steps}")
    precision.take_from_main()
    preview = figures.AttentionPreview(data.val, model.img_size, device) if log.main else None
    about = {"flags": vars(args), "config": asdict(model.config)} | data.about
    options = {"every": args.save_every, "minutes": args.save_minutes}
    saver = Saver(paths, state, precision, optimizer, about, log, **options)
    eval_batch_size = args.eval_batch_size or hardware.EVAL_BATCH_SIZE[device.type]
    frozen = args.freeze if isinstance(args.freeze, int) else 0
    drawn = (args.seed, args.train_batch_size, device, precision.model_dtype)
    drop_path = DropPath(args.drop_path, model.config.num_layers, frozen, *drawn)
    tools = (device, log, saver, preview, eval_batch_size, drop_path if args.drop_path else None)
    return Run(args, paths, state, data, model, precision, optimizer, *tools)


def train(run: Run, stop_request: StopRequest) -> None:
    """Make the steps that are left; log, save and evaluate on the way."""
    args, state, log, size = run.args, run.state, run.log, run.model.img_size
    shard = Shard(dist_util.rank(), dist_util.world_size(), args.gradient_accumulation_steps)
    loading = {"shard": shard, "device": run.device, "num_workers": args.num_workers}
    loading["cache"] = new_cache(args.cache)
    crops = (args.augmentation, size, args.crop_min_area)
    policy = (args.rand_augment, args.random_erasing)
    augment = Augmentation(*crops, args.mixup, args.cutmix, args.flip, *policy)
    drawing = {"seed": args.seed, "batch_size": args.train_batch_size, "balance": args.balance}
    drawing["dtype"] = run.precision.model_dtype
    stream = TrainStream(run.data.train, augment, **drawing, **loading)
    val_stream = EvalStream(run.data.val, size, batch_size=run.eval_batch_size, **loading)
    schedule = (args.learning_rate, args.num_steps, args.warmup_steps, args.decay_type)
    own_images = args.train_batch_size // shard.world_size
    if hardware.should_compile(args.compile, run.model, own_images, args.num_steps):
        log.print("compiling: the first step takes some ten seconds longer")
        hardware.compile_blocks(run.model)
    model = run.model
    if shard.world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == args.num_steps

    def save_or_stop_if_asked(wait: bool) -> None:
        request = stop_request.agreed(wait)
        if request:
            run.saver.save()
        if request > SAVE:  # a request to stop
            bar.close()
            run.saver.join()
            advice = f"saved in {run.paths.last}: the same command with --resume continues"
            raise Interrupted(request, advice)

    if args.keep_head and state.step == 0:
        evaluate(run, val_stream)  # what the head that is kept knows already
    if state.last_evaluation < state.step and due(args.eval_every):
        evaluate_and_keep_best(run, val_stream)  # the save was made before it
        run.saver.join()  # so that no data worker inherits the file
    end = state.step if state.finished(args.num_steps, args.patience) else args.num_steps
    losses, window_start = [], time.monotonic()
    bar = log.bar(total=args.num_steps, initial=state.step, desc="train", unit="step")
    for micro_batches in stream.steps(state.step, end):
        if state.step == 0 and log.main:
            images, _ = stream.prepare(micro_batches[0])
            log.image("train/augmented", figures.augmented_batch(images), 0)
        lr = set_lr(run.optimizer, state.step, *schedule)
        loss, grad_norm, stepped = update(run, model, stream, micro_batches)
        while not stepped:  # it overflowed in float16: retry at half the loss scale
            state.retried += 1
            loss, grad_norm, stepped = update(run, model, stream, micro_batches)
        losses.append(loss)  # it stays on the device: reading it would wait for the step
        state.step += 1
        bar.update()

        if due(args.log_every) or due(args.eval_every):
            log_training(run, stream, bar, losses, lr, grad_norm, time.monotonic() - window_start)
            losses, window_start = [], time.monotonic()  # the speed shown includes all pauses
        if run.saver.due() or state.step == args.num_steps:
            run.saver.save()
        save_or_stop_if_asked(wait=False)
        if due(args.eval_every):
            evaluate_and_keep_best(run, val_stream)
            save_or_stop_if_asked(wait=True)
        if state.finished(args.num_steps, args.patience):
            break
    bar.close()
    if state.step < args.num_steps:
        log.print(f"stopped after step {state.step}: evaluations without a better: {state.stale}")
        run.saver.save()


def update(run: Run, model, stream: TrainStream, micro_batches) -> tuple[Tensor, Tensor, bool]:
    """Make one optimizer step: (mean loss of this process, gradient norm, whether it was made)."""
    args, precision, loss_sum = run.args, run.precision, 0.0
    several, count = dist_util.world_size() > 1, len(micro_batches)
    parts = dist_util.world_size() * count
    # Processes average gradients once: at O2 the masters' float32 sums of several micro-batches.
    by_masters = several and count > 1 and precision.has_masters
    loss_of = {"ce": cross_entropy, "bce": binary_cross_entropy}[args.loss]
    for i, micro_batch in enumerate(micro_batches):
        images, labels = stream.prepare(micro_batch)
        number = dist_util.rank() * count + i  # of the micro-batch in the step
        torch.manual_seed(named_seed(args.seed, "dropout", run.state.step, number))
        with model.no_sync() if several and (by_masters or i + 1 < count) else nullcontext():
            drop = run.drop_path
            factors = [drop.paths(run.state.step, number, parts)] if drop else []
            with precision.autocast():
                logits = model(images.to(precision.model_dtype), *factors)
            logits = metrics.at_least_float32(logits)
            loss = loss_of(logits, labels, stream.class_weights, args.label_smoothing) / count
            precision.backward(loss)
        loss_sum = loss_sum + loss.detach()
    if by_masters:
        precision.average_gradients()
    grad_norm, stepped = precision.step(run.optimizer, args.max_grad_norm)
    return loss_sum, grad_norm, stepped


def log_training(run: Run, stream, bar, losses: list[Tensor], lr: float, norm: Tensor, seconds):
    args, step, world_size = run.args, run.state.step, dist_util.world_size()
    values = (torch.stack(losses).mean(), norm, run.precision.norm())
    total = dist_util.all_reduce_sum(torch.stack([value.float() for value in values]))
    loss, norm, weights = (total / world_size).tolist()  # here the CPU waits for a GPU
    if not weights < float("inf"):  # NaN, too; any such loss leads to it
        raise RunError("loss or weights are not finite: try a lower lr or another precision")
    speed = len(losses) * args.train_batch_size / seconds
    scalars = {"loss": loss, "lr": lr, "grad_norm": norm, "images_per_second": speed}
    scalars |= {"loss_scale": run.precision.scale, "retried_steps": run.state.retried}
    scalars["epoch"] = step * args.train_batch_size / len(stream.images)
    run.log.training(scalars, step, args.num_steps, bar)
    stream.waiting.report(seconds, speed, run.log.print)


def evaluate(run: Run, stream: EvalStream, suffix: str = ""):
    """The predictions and the scores of the model on the validation set; they are logged, too."""
    log, step, split = run.log, run.state.step, run.data.val_split + suffix
    predictions = metrics.predict_dataset(run.model, stream, run.precision, log.evaluation_bar)
    scores = metrics.summary(predictions, len(run.data.classes))
    log.scalars({f"{split}/{name}": score for name, score in scores.items()}, step)
    names = dict.fromkeys(("accuracy", "loss", run.state.select_by))
    log.print(f"step {step}: {split} {', '.join(f'{name} {scores[name]:.4f}' for name in names)}")
    return predictions, scores


def evaluate_and_keep_best(run: Run, stream: EvalStream) -> None:
    """Evaluate on the validation set, and save the weights if they are those that count.

    With --ema these are the weights or their averages, whatever is better.
    """
    start = time.monotonic()
    state, log, split, classes = run.state, run.log, run.data.val_split, run.data.classes
    (predictions, scores), averaged = evaluate(run, stream), False
    if run.precision.average:
        with run.precision.averaged():
            _, others = evaluate(run, stream, "_averaged")
        averaged = state.rank(others[state.select_by]) > state.rank(scores[state.select_by])
        scores = others if averaged else scores
    if state.add_evaluation(scores, averaged):
        figures_of = scores | {"averaged": True} if averaged else scores
        metadata = Metadata(step=state.step, metrics=figures_of, **run.data.train.decoding.stored)
        metadata.img_size, metadata.classes = run.model.img_size, classes
        run.saver.save_best(run.model.config, metadata)
    # Drawing takes about a second, so it is done about ten times in a run.
    total, previous = run.args.num_steps, state.step - run.args.eval_every
    if run.preview and 10 * state.step // total > 10 * previous // total:
        log.image(f"{split}/attention", run.preview.draw(run.model), state.step)
        if len(classes) <= figures.MAX_CLASSES:
            counts = metrics.confusion_counts(predictions, len(classes))
            log.image(f"{split}/confusion", figures.confusion_matrix(counts, classes), state.step)
    run.evaluating += time.monotonic() - start


def finish(run: Run) -> None:
    """Evaluate the weights that count on the test images, else the validation set."""
    args, paths, state, data, log = run.args, run.paths, run.state, run.data, run.log
    by, best, last, split = state.select_by, state.best_score, state.last_score, data.val_split
    line = f"best {split} {by} {best:.4f} at step {state.best_step}, last {last:.4f}"
    log.print(line + "; these are the averaged weights" * state.averaged)
    if state.retried:
        log.print(f"{state.retried} steps overflowed and were retried")
    log.hyperparameters(vars(args), {f"final/best_{by}": best, f"final/last_{by}": last})
    run.saver.join()
    model, metadata = checkpoints.open_model(paths.best)
    model = use_cpu_kernels(model.to(run.device, run.precision.model_dtype))
    final, loading = data.final(), (run.eval_batch_size, args.num_workers)
    _, scores = evaluate_model(model, final, run.precision, log, *loading)
    if data.test is not None:
        log.scalars({f"test/{name}": scores[name] for name in metrics.SCORES}, metadata.step)
        log.print(f"test {by} of the {args.select} weights {scores[by]:.4f}")
    seconds = round(time.monotonic() - run.saver.start_time, 1)
    training = {"select": args.select, "select_by": by, f"best_{by}": best}
    training |= {f"last_{by}": last, "retried": state.retried, "seconds": seconds}
    training |= {"best_step": state.best_step, "steps": state.step, "averaged": state.averaged}
    training["device"] = dist_util.describe_device(run.device)
    results = results_header(args.name, paths.best, model, final) | {"training": training} | scores
    dist_util.from_main(lambda: metrics.write_results(paths.results, results))
    log.print(f"pauses: {run.evaluating:.1f} s for evaluation, {run.saver.pauses:.1f} s for saving")
    files = f"{args.select} weights: {paths.best}; results: {paths.results}"
    log.print(f"{files}; {seconds:.0f} s in all")
    log.print(f"curves: tensorboard --logdir logs/{args.name}")


if __name__ == "__main__":
    advice = "give --gradient_accumulation_steps a larger number, or add --grad_checkpointing; "
    advice += "in an evaluation, give a smaller --eval_batch_size"
    sys.exit(run_script("train.py", main, less_memory=advice))
