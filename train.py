"""Fine-tune a Vision Transformer: the story of one run, told downward.

flags -> config -> model <- weights <- .npz
      -> data -> train() <-> evaluate() -> checkpoint, TensorBoard, console
"""

import sys
import time
from argparse import Namespace
from contextlib import closing, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from building import (
    build_model,
    build_optimizer,
    build_precision,
    make_deterministic,
    read_weights,
    variant_of,
)  # fmt: skip
from data_utils import Data, check_source, load_data
from evaluation import (
    at_least_float32,
    evaluate,
    evaluate_only,
    outcome_on,
    results_head,
)
from flags import parse_flags
from models.configs import ViTConfig
from models.download import DownloadError
from models.modeling import VisionTransformer
from models.structure import WeightsError
from run_files import check_same_run, name_held, report_path, results_path
from utils import compiling, dist_util, figures, run_state
from utils.allocator import keep_freed_memory
from utils.checkpoint import (
    CheckpointError,
    load_model,
    model_record,
    save_atomic,
)
from utils.cli import FlagError
from utils.dist_util import LaunchError
from utils.files import SaveError
from utils.precision import NonFiniteError, Precision
from utils.report import confusion, forget_report, summary, write_results
from utils.run_log import RunLog
from utils.run_state import RunState
from utils.scheduler import learning_rate
from utils.seeds import named_seed
from utils.shell import complain, ending, open_streams, printable
from utils.signals import NOTHING, SAVE, Interrupted, Requests
from utils.stream import Augmentation, DataError, EvalStream, Slice, TrainStream

USER_ERRORS = (  # exit 2
    FlagError, LaunchError, DownloadError, WeightsError, CheckpointError, DataError,
)  # fmt: skip
FAILURES = (NonFiniteError, SaveError)  # exit 1
MORE_MEMORY = (
    "give --gradient_accumulation_steps a larger number, add --grad_checkpointing, or lower "
    "--eval_batch_size"
)


@dataclass
class Run:
    """What the functions below share. Only `state` changes."""

    args: Namespace
    model: VisionTransformer
    precision: Precision
    optimizer: torch.optim.Optimizer
    data: Data
    device: torch.device
    log: RunLog
    state: RunState
    requests: Requests
    start_time: float  # as if the run had never been interrupted

    @property
    def best_path(self) -> Path:
        return Path(self.args.output_dir) / f"{self.args.name}_checkpoint.bin"

    @property
    def last_path(self) -> Path:
        return Path(self.args.output_dir) / f"{self.args.name}_last.pt"

    def not_finite(self, what: str, update: int, rate: float) -> NonFiniteError:
        good = f"; the last good checkpoint is {self.last_path}" if self.last_path.exists() else ""
        return NonFiniteError(f"{what} at update {update} (rate {rate:.3g}): try a "
                              f"lower --learning_rate, or another precision{good}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    start_time = time.monotonic()
    rank, _, world = dist_util.launched(-1)
    args = parse_flags(argv, world)
    if args.deterministic:
        make_deterministic()
    if args.eval_only:
        evaluate_only(args)
        return
    with name_held(args, rank == 0):  # before any file of the run is read
        fine_tune(args, start_time)


def fine_tune(args, start_time: float) -> None:
    """Build all that a run is made of, then follow it to its end."""
    check_source(args.dataset, Path(args.data_dir), args.val_fraction)  # before any download
    saved, state, config = read_saved(args)
    device = dist_util.start(args.local_rank, args.timeout)
    keep_freed_memory(device)
    pretrained = None if saved else read_weights(args)
    log = RunLog(dist_util.rank() == 0)
    log.say(f"device: {dist_util.described(device)}")
    data = dist_util.main_first(
        lambda: load_data(
            args.dataset,
            args.data_dir,
            val_fraction=args.val_fraction,
            seed=args.seed,
            channels=args.in_channels,
            skip_unreadable=args.skip_unreadable,
            offline=args.offline,
            progress=log.main,
            say=log.say,
        )
    )
    log.say(f"data: {data.source}; {data.counts}")
    model = build_model(args, pretrained, config, len(data.classes), log).to(device)
    del pretrained  # as large as the model
    precision = build_precision(args, model, device, log)
    optimizer = build_optimizer(args, precision, device)
    resumed = saved is not None
    if resumed:
        run_state.restore(resume_path(args), saved, precision, optimizer, data.facts)
        log.say(f"resumed: {resume_path(args)}, after update {state.step} of {args.num_steps}")
    elif args.warmup_steps >= args.num_steps:
        log.say(f"note: --warmup_steps {args.warmup_steps} is not below --num_steps "
                f"{args.num_steps}: the rate never reaches {args.learning_rate}")  # fmt: skip

    del saved  # as large as the model and its optimizer

    requests = Requests(dist_util.world())
    run = Run(args, model, precision, optimizer, data, device, log, state, requests,
              start_time - state.seconds)  # fmt: skip
    with closing(requests), closing(log):
        log.open_curves(Path("logs") / args.name, first_step=state.step + 1)
        if args.overwrite:
            forget_results(run)
        flags = "\n".join(f"    --{flag} {value}" for flag, value in vars(args).items())
        log.text("flags", printable(flags))
        if resumed:
            find_best(run)
        try:
            train(run)
        except DataError as error:  # an image, perhaps, that is broken behind its head
            # Alone it can save; of several, the others are still inside the update.
            alone = dist_util.world() == 1
            if alone and state.step and isfinite(precision.weight_norm()):
                state.window_loss, state.window_updates = 0.0, 0  # of unlogged updates
                save_last(run)
            elif not run.last_path.exists():
                raise
            raise DataError(f"{error}; the run is saved in {run.last_path}: mend the data, then "
                            "the same command with --resume goes on") from None  # fmt: skip
        log.hyperparameters(vars(args), {"final/best_accuracy": state.best_accuracy,
                                         "final/last_accuracy": state.last_accuracy})  # fmt: skip
        finish(run)


def resume_path(args) -> Path:
    """The file that --resume names, or the run's own last save."""
    return Path(args.resume or Path(args.output_dir) / f"{args.name}_last.pt")


def read_saved(args) -> tuple[dict | None, RunState, ViTConfig | None]:
    """The saved run that --resume asks for; otherwise a new state."""
    if args.resume is None:
        return None, RunState(), None
    saved, state, config = run_state.read(resume_path(args))
    check_same_run(args, resume_path(args), saved["flags"])
    return saved, state, config


def find_best(run: Run) -> None:
    """A run that goes on needs its best weights too; without them it looks for new ones."""
    if run.state.best_accuracy < 0:
        return
    main = dist_util.rank() == 0
    here = main and run_state.bring_best(resume_path(run.args), run.best_path)
    if not dist_util.highest(int(here)):
        run.log.say(f"note: {run.best_path} is not here, nor the best weights beside the saved "
                    "run: what follows is compared with today's weights")  # fmt: skip
        run.state.best_accuracy, run.state.evaluation_due = -1.0, True


def train(run: Run) -> None:
    """Make the updates that `--num_steps` still asks for; evaluate and save on the way."""
    args, state, log, precision = run.args, run.state, run.log, run.precision
    world, steps, size = dist_util.world(), args.num_steps, run.model.img_size
    part = Slice(dist_util.rank(), world, args.gradient_accumulation_steps)
    placement = {"part": part, "device": run.device, "workers": args.num_workers}
    augmentation = Augmentation(args.augmentation, size, args.crop_min_area, args.mixup,
                                args.cutmix)  # fmt: skip
    stream = TrainStream(run.data.train, augmentation, seed=args.seed, batch=args.train_batch_size,
                         **placement)  # fmt: skip
    held_out = EvalStream(run.data.held_out, size, batch=args.eval_batch_size, **placement)
    shared = DistributedDataParallel(run.model) if world > 1 else run.model
    if compiling.pays(args.compile, run.device.type, steps):
        log.say("compiling the training step: the first update takes a minute or two")
        shared = torch.compile(shared, dynamic=False)  # evaluation's odd last batch stays eager
    watch = figures.Watch(run.data.held_out, size, run.device) if log.main else None
    if state.evaluation_due:
        check_held_out(run, held_out, watch)
        save_last(run)

    losses = torch.full((), state.window_loss, device=run.device)
    window_start, window_first = time.monotonic(), state.step
    bar = log.bar(total=steps, initial=state.step, desc="train", unit="update")
    for micro_batches in stream.updates(state.step, steps):
        rate = learning_rate(state.step, base=args.learning_rate, total=steps,
                             warmup=args.warmup_steps, decay=args.decay_type)  # fmt: skip
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        if state.step == 0 and log.main:  # preparing a micro-batch twice changes nothing
            first, _ = stream.prepare(micro_batches[0])
            log.picture("train/augmented", figures.augmented(first), 0)
        updated = False
        while not updated:  # a skipped update is made again, at half the loss scale
            try:
                loss, norm, updated = update(
                    args, state.step, shared, stream, micro_batches, precision, run.optimizer
                )
            except NonFiniteError as error:
                raise run.not_finite(str(error), state.step + 1, rate) from None
            state.skipped += not updated
        losses += loss
        state.window_updates += 1
        state.step += 1
        bar.update()

        # What follows waits for the device, so it is not done after every update.
        done = state.step
        request = dist_util.highest(run.requests.pending)
        save_now = done % args.save_every == 0 or request > NOTHING
        evaluate_now = done % args.eval_every == 0 or done == steps
        log_now = done % args.log_every == 0 or done == steps
        if not (save_now or evaluate_now or log_now):
            continue
        state.window_loss = dist_util.sum_over_processes(losses.clone()).item() / world
        if not all(map(isfinite, (state.window_loss, norm.item(), precision.weight_norm()))):
            raise run.not_finite(
                "loss, gradients or weights are no longer finite, noticed", done, rate
            )
        if log_now:
            mean_loss = state.window_loss / state.window_updates
            speed = (done - window_first) * args.train_batch_size
            speed /= time.monotonic() - window_start
            log.scalars({"train/loss": mean_loss, "train/lr": rate, "train/grad_norm": norm.item(),
                         "train/images_per_second": speed, "train/loss_scale": precision.scale,
                         "train/skipped_updates": state.skipped}, done)  # fmt: skip
            bar.set_postfix(loss=f"{mean_loss:.4f}", images_s=f"{speed:.1f}")
            log.progress(f"update {done}/{steps}: loss {mean_loss:.4f}, lr {rate:.3g}, "
                         f"{speed:.1f} images/s", last=done == steps)  # fmt: skip
            state.window_loss, state.window_updates = 0.0, 0
            window_start, window_first = time.monotonic(), done
        losses.fill_(state.window_loss)
        pause_start = time.monotonic()
        state.evaluation_due = evaluate_now
        if save_now or evaluate_now:
            save_last(run)  # first: an evaluation may be long, and a kill in it costs nothing
            run.requests.met()
            if request == SAVE:
                log.say(f"saved: {run.last_path}, after update {done}")
        if evaluate_now and request <= SAVE:
            check_held_out(run, held_out, watch)
            request = dist_util.highest(run.requests.pending)
            if done == steps or request > NOTHING:
                save_last(run)
                run.requests.met()
        if request > SAVE:
            bar.close()
            raise Interrupted(request, run.last_path)
        window_start += time.monotonic() - pause_start  # the speed shown is that of training
    bar.close()


def update(args, step: int, model, stream, micro_batches, precision, optimizer):
    """One optimizer update. Returns (mean loss of this process, gradient norm, whether made)."""
    loss_sum = 0.0
    for i, micro in enumerate(micro_batches):
        images, labels = stream.prepare(micro)
        place = dist_util.rank() * len(micro_batches) + i
        torch.manual_seed(named_seed(args.seed, "dropout", step, place))
        # Gradients travel with the last micro-batch; masters collect each as it comes.
        last = i + 1 == len(micro_batches) or precision.has_masters
        with nullcontext() if last or dist_util.world() == 1 else model.no_sync():
            with precision.autocast():
                logits = model(images.to(precision.model_dtype))
            loss = F.cross_entropy(
                at_least_float32(logits), labels, label_smoothing=args.label_smoothing
            )
            loss = loss / len(micro_batches)
            precision.backward(loss)
        loss_sum = loss_sum + loss.detach()
    norm, updated = precision.step(optimizer, args.max_grad_norm)
    return loss_sum, norm, updated


def check_held_out(run: Run, held_out: EvalStream, watch: figures.Watch | None) -> None:
    """Evaluate, log, and keep the weights if they are the best so far."""
    state, name, classes = run.state, run.data.held_out_name, run.data.classes
    outcome = evaluate(run.model, held_out, run.precision, run.log)
    metrics = outcome.metrics
    run.log.scalars({f"{name}/{key}": value for key, value in metrics.items()}, state.step)
    run.log.say(f"update {state.step}: {name} accuracy {metrics['accuracy']:.4f}, "
                f"loss {metrics['loss']:.4f}")  # fmt: skip
    state.evaluation_due, state.last_accuracy = False, metrics["accuracy"]
    if metrics["accuracy"] > state.best_accuracy:
        state.best_accuracy, state.best_step = metrics["accuracy"], state.step
        if dist_util.rank() == 0:
            record = model_record(run.precision.state_dict(), run.model, step=state.step,
                                  variant=variant_of(run.model), classes=run.data.classes,
                                  metrics=metrics)  # fmt: skip
            save_atomic(record, run.best_path)
            forget_report(report_path(run.args))  # which is about weights of before
    # About ten times a run: they take a second, in which a GPU makes ten updates.
    steps = run.args.num_steps
    before = max(0, state.step - run.args.eval_every)
    if watch and 10 * state.step // steps > 10 * before // steps:
        run.log.picture(f"{name}/attention", watch.picture(run.model), state.step)
        if len(classes) <= figures.MOST_CLASSES:
            counts = confusion(outcome, len(classes))
            run.log.picture(f"{name}/confusion", figures.confusion_picture(counts, classes),
                            state.step)  # fmt: skip


def save_last(run: Run) -> None:
    run.state.seconds = time.monotonic() - run.start_time
    if dist_util.rank() == 0:
        run_state.save(run.last_path, run.state, run.precision, run.optimizer,
                       flags=vars(run.args), config=run.model.config,
                       data=run.data.facts)  # fmt: skip


def forget_results(run: Run) -> None:
    """--overwrite: an interrupted new run must not be resumed from the old one's files."""
    if dist_util.rank() == 0:
        for path in (run.last_path, run.best_path, results_path(run.args)):
            path.unlink(missing_ok=True)
        forget_report(report_path(run.args))


def finish(run: Run) -> None:
    """Say how it ended; evaluate the best weights once more, as they lie on the disk, for the
    figures of `results.json`. Where validation images chose them, that is on the test images."""
    args, state, data, log = run.args, run.state, run.data, run.log
    log.say(f"best {data.held_out_name} accuracy {state.best_accuracy:.4f} at update "
            f"{state.best_step}, last {state.last_accuracy:.4f}; {state.skipped} updates "
            "overflowed and were made again")  # fmt: skip
    dist_util.barrier()
    model, _ = load_model(run.best_path)
    images, called = data.final()
    model = model.to(run.device, run.precision.model_dtype)
    outcome = outcome_on(args, model, images, run.precision, run.device, log)
    scores = summary(outcome, data.classes)
    if data.test is not None:
        tags = {"test/accuracy": scores["accuracy"], "test/loss": scores["loss"]}
        log.scalars(tags, state.best_step)
        log.say(f"test accuracy of the best weights {scores['accuracy']:.4f}")
    seconds = time.monotonic() - run.start_time
    if dist_util.rank() == 0:
        keys = ("best_accuracy", "best_step", "last_accuracy", "skipped")
        training = {key: getattr(state, key) for key in keys} | {"seconds": round(seconds, 1)}
        head = results_head(args, run.best_path, variant_of(model), model, data.source, called,
                            images)  # fmt: skip
        write_results(results_path(args), head | {"training": training} | scores)
    log.say(
        f"best weights: {run.best_path}; figures: {results_path(args)}; "
        f"curves: tensorboard --logdir {log.folder}; {seconds:.0f} s in all"
    )


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell: what goes wrong is one line on stderr and an exit status."""
    open_streams()
    failed_alone = False
    try:
        main(argv)
        dist_util.stop()
        return 0
    except Interrupted as stop:
        line, status = str(stop), stop.status
    except (Exception, KeyboardInterrupt) as error:
        failed_alone = True
        if known := ending(error, USER_ERRORS, FAILURES, memory=MORE_MEMORY):
            line, status = known
            dist_util.report(f"train.py: {line}")
        elif dist_util.peer_lost(error):
            why = " ".join(str(error).split())[:200]
            line, status = f"error: another process of this run has died or hangs ({why})", 1
        else:  # a bug: its traceback is the best report
            dist_util.report(f"{type(error).__name__}: {error}")
            dist_util.leave_alone(1, error)
            dist_util.stop()
            raise
    if dist_util.speaks():
        complain(f"train.py: {line}")
    if failed_alone:
        dist_util.leave_alone(status)
    dist_util.stop()
    return status


if __name__ == "__main__":
    sys.exit(run())
