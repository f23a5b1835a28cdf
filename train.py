"""Fine-tune a Vision Transformer. The file is one run, read from top to bottom.

flags -> checkpoint -> data -> VisionTransformer -> train loop <-> evaluation -> results
"""

import sys
import time
from argparse import Namespace
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data_flags import train_data_options
from data_utils import Data, check_source, load_data
from evaluate import evaluate_model, results_header
from flags import check_same_run, lock_run, parse_flags
from models import checkpoints
from models.configs import CONFIGS, DEFAULT_MODEL, config_name
from models.cpu import use_cpu_kernels
from models.errors import RunError, UserError
from models.modeling import VisionTransformer
from models.state_dict import Checkpoint, Metadata, load
from models.zoo import resolve_checkpoint
from utils import dist_util, figures, hardware, metrics
from utils.augment import Augmentation
from utils.balance import cross_entropy
from utils.checkpoint import RunPaths, RunState, adopt_best, read_run, restore_run, save_run
from utils.cli import run_script
from utils.files import atomic_write
from utils.image_cache import new_cache
from utils.optimizer import build_optimizer
from utils.precision import Precision, build_precision
from utils.run_log import RunLog
from utils.scheduler import learning_rate
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
    preview: figures.AttentionPreview | None  # on rank 0
    start_time: float  # moved back by the time of earlier sessions of a resumed run


def main(argv: list[str] | None = None) -> None:
    rank, _, world_size = dist_util.launcher_env()
    args = parse_flags(argv, world_size)
    paths = RunPaths(args.output_dir, args.name)
    with lock_run(args) if rank == 0 else nullcontext():
        run = build_run(args, paths)
        # No file of a run is changed before this: a refused command leaves all as it was.
        if args.overwrite and run.log.main:
            paths.delete()  # so that nothing resumes from the old run's files
        if args.resume is not None:
            adopt_best(paths.resumed(args.resume), paths, run.state, run.log.print)
        run.log.open_tensorboard(Path("logs") / args.name, run.state.step + 1, vars(args))
        with closing(run.log), closing(StopRequest()) as stop_request:
            try:
                train(run, stop_request)
            except (UserError, RunError) as error:
                # With several processes the others are still inside the step: no save then.
                if isinstance(error, UserError) and world_size == 1 and run.state.step:
                    save(run)
                saved = f"; --resume continues from {paths.last}" if paths.last.exists() else ""
                skip = " (--skip_unreadable leaves it out)" if isinstance(error, UserError) else ""
                kind = type(error) if world_size == 1 else RunError  # which every rank prints
                raise kind(f"{error}{skip}; after step {run.state.step}{saved}") from error
            finish(run)


def build_run(args: Namespace, paths: RunPaths) -> Run:
    """Build a run from its flags: resumed, on pre-trained weights, or from scratch."""
    check_source(args.dataset, Path(args.data_dir), args.val_fraction)  # before a download
    if args.deterministic:
        hardware.compute_the_same_bits()
    saved, state, config, weights = None, RunState(select_by=args.select_by), None, None
    if args.resume is not None:
        source = paths.resumed(args.resume)
        saved, state, config = read_run(source)
        check_same_run(args, source, saved["flags"])
    start = time.monotonic() - state.seconds
    device = dist_util.init(args.local_rank, args.timeout)
    hardware.keep_freed_memory(device)
    log = RunLog(dist_util.is_main())
    log.print(f"device: {dist_util.describe_device(device)}")
    if saved is None and args.pretrained_dir != "none":
        file = resolve_checkpoint(args.pretrained_dir, args.model_type, offline=args.offline)
        weights = checkpoints.read(file, args.model_type, args.img_size, progress=log.main)
    options = train_data_options(args, log, saved, weights)
    data = dist_util.from_main(lambda: load_data(args.dataset, **options))
    log.print(f"data: {data}")
    model = use_cpu_kernels(build_model(args, config, weights, len(data.classes), log).to(device))
    levels = (args.fp16, args.bf16, args.fp16_opt_level, args.loss_scale)
    precision = build_precision(model, device, *levels, log=log.print)
    hyper = (args.optimizer, args.learning_rate, args.weight_decay)
    optimizer = build_optimizer(precision, *hyper, apex=args.apex)
    if saved is not None:
        restore_run(source, saved, precision, optimizer, data.fingerprint)
        log.print(f"resumed: {source}, after step {state.step} of {args.num_steps}")
    elif args.warmup_steps >= args.num_steps:
        log.print(f"note: --warmup_steps {args.warmup_steps} >= --num_steps {args.num_steps}")
    preview = figures.AttentionPreview(data.val, model.img_size, device) if log.main else None
    return Run(args, paths, state, data, model, precision, optimizer, device, log, preview, start)


def build_model(args, config, pretrained, num_classes: int, log: RunLog) -> VisionTransformer:
    """A model with a head of zeros, by a resumed run's `config`, a Checkpoint, or new."""
    if pretrained:
        dropout = CONFIGS[name].dropout_rate if (name := config_name(pretrained.config)) else 0.0
        config = replace(pretrained.config, representation_size=None, dropout_rate=dropout)
    config = config or CONFIGS[args.model_type or DEFAULT_MODEL]
    if args.dropout_rate is not None or args.freeze == "backbone":
        config = replace(config, dropout_rate=args.dropout_rate or 0.0)
    torch.manual_seed(named_seed(args.seed, "init"))
    options = {"zero_head": True, "in_channels": args.in_channels}
    model = VisionTransformer(config, args.img_size, num_classes, **options)
    model.transformer.encoder.grad_checkpointing = args.grad_checkpointing
    origin = "from scratch" if args.resume is None else "resumed"
    if pretrained:
        with checkpoints.naming(args.pretrained_dir):
            report = load(model, pretrained)
        origin = f"from {args.pretrained_dir}: {report}"
    log.print(f"model: {config_name(config)} {origin}")
    if args.freeze == "backbone":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        log.print("the backbone is frozen: only the head trains")
    return model


def train(run: Run, stop_request: StopRequest) -> None:
    """Make the steps that are left; log, save and evaluate on the way."""
    args, state, log, size = run.args, run.state, run.log, run.model.img_size
    shard = Shard(dist_util.rank(), dist_util.world_size(), args.gradient_accumulation_steps)
    loading = {"shard": shard, "device": run.device, "num_workers": args.num_workers}
    loading["cache"] = new_cache(args.cache)
    crops = (args.augmentation, size, args.crop_min_area)
    augment = Augmentation(*crops, args.mixup, args.cutmix, args.flip)
    drawing = {"seed": args.seed, "batch_size": args.train_batch_size, "balance": args.balance}
    stream = TrainStream(run.data.train, augment, **drawing, **loading)
    val_stream = EvalStream(run.data.val, size, batch_size=args.eval_batch_size, **loading)
    model = DistributedDataParallel(run.model) if shard.world_size > 1 else run.model
    if hardware.should_compile(args.compile, run.device.type, args.num_steps):
        log.print("compiling the training step: the first step takes a minute or two")
        model = torch.compile(model, dynamic=False)  # evaluation uses run.model, which stays eager

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == args.num_steps

    def save_or_stop_if_asked() -> None:
        request = dist_util.all_reduce_max(stop_request.pending)
        if request:
            save(run)
            stop_request.saved()
        if request > SAVE:  # a request to stop
            bar.close()
            advice = f"saved in {run.paths.last}: the same command with --resume continues"
            raise Interrupted(request, advice)

    if state.last_evaluation < state.step and due(args.eval_every):
        evaluate_and_keep_best(run, val_stream)  # the save was made before it
    losses, window_start = [], time.monotonic()
    bar = log.bar(total=args.num_steps, initial=state.step, desc="train", unit="step")
    for micro_batches in stream.steps(state.step, args.num_steps):
        if state.step == 0 and log.main:
            images, _ = stream.prepare(micro_batches[0])
            log.image("train/augmented", figures.augmented_batch(images), 0)
        lr = set_lr(run)
        loss, grad_norm, stepped = update(run, model, stream, micro_batches)
        while not stepped:  # it overflowed in float16: retry at half the loss scale
            state.retried += 1
            loss, grad_norm, stepped = update(run, model, stream, micro_batches)
        losses.append(loss)  # it stays on the device: reading it would wait for the step
        state.step += 1
        bar.update()

        if due(args.log_every):
            log_training(run, stream, bar, losses, lr, grad_norm, time.monotonic() - window_start)
            losses, window_start = [], time.monotonic()
        pause_start = time.monotonic()
        if due(args.save_every):
            save(run)
        save_or_stop_if_asked()
        if due(args.eval_every):
            evaluate_and_keep_best(run, val_stream)
            save_or_stop_if_asked()
        window_start += time.monotonic() - pause_start  # the speed shown is that of training
    bar.close()


def set_lr(run: Run) -> float:
    args, step = run.args, run.state.step
    schedule = {"warmup": args.warmup_steps, "decay": args.decay_type}
    lr = learning_rate(step, base=args.learning_rate, total=args.num_steps, **schedule)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def update(run: Run, model, stream: TrainStream, micro_batches) -> tuple[Tensor, Tensor, bool]:
    """Make one optimizer step: (mean loss of this process, gradient norm, whether it was made)."""
    args, precision, loss_sum = run.args, run.precision, 0.0
    for i, micro_batch in enumerate(micro_batches):
        images, labels = stream.prepare(micro_batch)
        number = dist_util.rank() * len(micro_batches) + i  # of the micro-batch in the step
        torch.manual_seed(named_seed(args.seed, "dropout", run.state.step, number))
        # Processes average their gradients after the last micro-batch. At O2, float32 copies of
        # the weights collect the gradients of every micro-batch: each is averaged.
        sync = i + 1 == len(micro_batches) or precision.has_masters
        with nullcontext() if sync or dist_util.world_size() == 1 else model.no_sync():
            with precision.autocast():
                logits = model(images.to(precision.model_dtype))
            logits = metrics.at_least_float32(logits)
            loss = cross_entropy(logits, labels, stream.class_weights, args.label_smoothing)
            loss = loss / len(micro_batches)
            precision.backward(loss)
        loss_sum = loss_sum + loss.detach()
    grad_norm, stepped = precision.step(run.optimizer, args.max_grad_norm)
    return loss_sum, grad_norm, stepped


def log_training(run: Run, stream, bar, losses: list[Tensor], lr: float, norm: Tensor, seconds):
    run.precision.check_finite()
    args, step = run.args, run.state.step
    loss = dist_util.all_reduce_sum(torch.stack(losses).mean()).item() / dist_util.world_size()
    speed = len(losses) * args.train_batch_size / seconds
    scalars = {"loss": loss, "lr": lr, "grad_norm": norm.item(), "images_per_second": speed}
    scalars |= {"loss_scale": run.precision.scale, "retried_steps": run.state.retried}
    run.log.scalars({f"train/{tag}": value for tag, value in scalars.items()}, step)
    bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{speed:.1f}")
    line = f"step {step}/{args.num_steps}: loss {loss:.4f}, lr {lr:.3g}, {speed:.1f} images/s"
    run.log.progress(line, last=step == args.num_steps)
    stream.waiting.report(seconds, speed, run.log.print)


def evaluate_and_keep_best(run: Run, stream: EvalStream) -> None:
    """Evaluate on the validation set, and save the weights if they are the best so far."""
    run.precision.check_finite()
    state, log, split, classes = run.state, run.log, run.data.val_split, run.data.classes
    predictions = metrics.predict_dataset(run.model, stream, run.precision, log.evaluation_bar)
    scores, by = metrics.summary(predictions, len(classes)), state.select_by
    log.scalars({f"{split}/{name}": score for name, score in scores.items()}, state.step)
    shown = (f"{name} {scores[name]:.4f}" for name in dict.fromkeys(("accuracy", "loss", by)))
    log.print(f"step {state.step}: {split} {', '.join(shown)}")
    if state.add_evaluation(scores):
        save_best(run, scores)
    # Drawing takes about a second, so it is done about ten times in a run.
    total, previous = run.args.num_steps, state.step - run.args.eval_every
    if run.preview and 10 * state.step // total > 10 * previous // total:
        log.image(f"{split}/attention", run.preview.draw(run.model), state.step)
        if len(classes) <= figures.MAX_CLASSES:
            counts = metrics.confusion_counts(predictions, len(classes))
            log.image(f"{split}/confusion", figures.confusion_matrix(counts, classes), state.step)


def finish(run: Run) -> None:
    """Evaluate the best weights on the test images, else the validation set; write results."""
    args, paths, state, data, log = run.args, run.paths, run.state, run.data, run.log
    by, best, last, split = state.select_by, state.best_score, state.last_score, data.val_split
    log.print(f"best {split} {by} {best:.4f} at step {state.best_step}, last {last:.4f}")
    if state.retried:
        log.print(f"{state.retried} steps overflowed and were retried")
    log.hyperparameters(vars(args), {f"final/best_{by}": best, f"final/last_{by}": last})
    dist_util.barrier()  # until rank 0 has written the best weights
    model, _ = checkpoints.open_model(paths.best)
    model = use_cpu_kernels(model.to(run.device, run.precision.model_dtype))
    final, loading = data.final(), (args.eval_batch_size, args.num_workers)
    _, scores = evaluate_model(model, final, run.precision, log, *loading)
    if data.test is not None:
        log.scalars({f"test/{name}": scores[name] for name in metrics.SCORES}, state.best_step)
        log.print(f"test {by} of the best weights {scores[by]:.4f}")
    seconds = round(time.monotonic() - run.start_time, 1)
    if log.main:
        training = {"select_by": by, f"best_{by}": best, "best_step": state.best_step}
        training |= {f"last_{by}": last, "retried": state.retried, "seconds": seconds}
        header = results_header(args.name, paths.best, model, final)
        metrics.write_results(paths.results, header | {"training": training} | scores)
    log.print(f"best weights: {paths.best}; results: {paths.results}; {seconds:.0f} s in all")
    log.print(f"curves: tensorboard --logdir logs/{args.name}")


def save(run: Run) -> None:
    """Save the whole run, from which --resume continues."""
    run.precision.check_finite()
    run.state.seconds = time.monotonic() - run.start_time
    if run.log.main:
        about = {"flags": vars(run.args), "config": asdict(run.model.config)}
        about |= run.data.about
        save_run(run.paths.last, run.state, run.precision, run.optimizer, about)
        run.log.print(f"saved: {run.paths.last}, after step {run.state.step}")


def save_best(run: Run, scores: dict[str, float]) -> None:
    if run.log.main:
        metadata = Metadata(step=run.state.step, metrics=scores, **run.data.train.decoding.stored)
        metadata.img_size, metadata.classes = run.model.img_size, run.data.classes
        state = run.precision.model_state_dict()
        with atomic_write(run.paths.best) as temporary:
            checkpoints.write(temporary, Checkpoint(state, run.model.config, metadata))


if __name__ == "__main__":
    advice = "give --gradient_accumulation_steps a larger number, or add --grad_checkpointing"
    sys.exit(run_script("train.py", main, less_memory=advice))
