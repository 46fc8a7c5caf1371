"""`runner_base`: a run from top to bottom: epochs, the training step, validation, checkpoints.

One epoch is `iters_per_epoch` iterations of an endless loader; an iteration is one micro-batch.
"""

import itertools
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minigpt4.common import start_clock
from minigpt4.common.checkpoint import BEST, amend_card, drop_leftovers, drop_old, read_card, save_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.devices import is_gpu, memory_advice, sum_dtype
from minigpt4.common.dist_utils import Processes, StopRequest, distribute, rng_state, set_rng_state
from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, WeightsError, errors_as
from minigpt4.common.optims import NonFiniteGuard
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.run_log import RunLog
from minigpt4.common.schemas import DatasetConfig
from minigpt4.common.start_clock import phase
from minigpt4.datasets import (
    BadSampleMonitor,
    BaseDataset,
    DevicePrefetcher,
    EvalLoader,
    TrainLoader,
    TrainSource,
    to_device,
)
from minigpt4.models.attention import compile_parts
from minigpt4.models.base_model import DTYPES
from minigpt4.models.feature_cache import FeatureEncoder
from minigpt4.models.fsdp import LocalRows, uneven_inputs
from minigpt4.runners import state
from minigpt4.tasks import BaseTask

log = logging.getLogger(__name__)

Datasets = Mapping[str, Mapping[str, BaseDataset]]
"""Datasets by name and split."""

ADAM_EPS = 1e-8
TOKEN_UNIT = 1024
"""Losses are weighted by tokens / TOKEN_UNIT until the tokens of the whole update are known; about 1 in practice,
so that fp16 gradients keep their range, and a power of two, so that nothing is rounded."""
SHOWN_CAPTIONS = 2
OUT_OF_MEMORY = (
    "The GPU's memory is full. train.py --check says what fits: a smaller batch_size with more "
    "run.accum_grad_iters, model.llm_grad_checkpoint: True, model.llm_precision: nf4, or run.parallel: fsdp."
)


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains `model` on `datasets` as `cfg.run` says, or with `run.evaluate` evaluates it.

    With `accum_loss: mean` an update follows the mean loss over all supervised tokens of its micro-batches on all
    ranks, however they are cut; with `sum` the mean losses of the micro-batches are added and averaged over ranks, with
    `mean_of_means` averaged over both.

    Args:
        cfg: the typed configuration.
        job_id: name of the run's folder in `output_dir`, which is there.
        model: on the device of `processes`.
        datasets: what `task.build_datasets` returned.
    """

    def __init__(
        self, cfg: Config, job_id: str, task: BaseTask, model: nn.Module, datasets: Datasets, processes: Processes
    ) -> None:
        self.cfg, self.run, self.task, self.model = cfg, cfg.run, task, model.train()
        self.processes, self.device = processes, processes.device
        folder = RunFolder.existing(Path(cfg.run.output_dir) / job_id)
        self.folder = folder.path
        if self.run.compile:
            compile_parts(self.model)
        self.features = FeatureEncoder(self.model) if self.run.feature_cache else None
        self.valid_monitor = self._bad_sample_monitor()
        self.test_loaders = {split: self.build_eval_loaders(datasets, [split]) for split in self.run.test_splits}
        self.run_log = RunLog(self.run, folder, processes, cfg.merged)
        self.position = state.Position()
        if self.run.evaluate:
            return
        self.rows = LocalRows(self.model.trainable_parameters())
        self.parameters: dict[str, nn.Parameter] = self.rows.parameters
        if not self.parameters:
            raise ConfigError("model.train: everything is frozen; there is nothing to train")
        self.optimizer = torch.optim.AdamW(
            self.rows.groups(self.model.get_optimizer_params(self.run.weight_decay)),
            lr=self.run.init_lr,
            betas=(0.9, self.run.beta2),
            eps=ADAM_EPS,
            fused=True,  # the implementation that can skip an update without asking the host
        )
        self.optimizer.register_step_pre_hook(lambda optimizer, *_: setattr(optimizer, "found_inf", self.skips))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.run.amp and self.run.amp_dtype == "fp16")
        self.wrapped_model = distribute(self.model, processes, self.parameters)
        self.guard = NonFiniteGuard(self.folder, self.run.max_nonfinite_steps, processes.rank)
        self.schedule = registry.get_lr_scheduler_class(self.run.lr_sched)(
            optimizer=self.optimizer,
            max_epoch=self.run.max_epoch,
            iters_per_epoch=self.run.iters_per_epoch,
            min_lr=self.run.min_lr,
            init_lr=self.run.init_lr,
            warmup_steps=self.run.warmup_steps,
            warmup_start_lr=self.run.warmup_lr,
            decay_rate=self.run.lr_decay_rate,
            warmup_ratio=self.run.warmup_ratio,
            accum_grad_iters=self.run.accum_grad_iters,
        )
        self.loader = self.build_train_loader(datasets)
        self.valid_loaders = self.build_eval_loaders(datasets, self.run.valid_splits)
        self._start_update()

    # Training

    def train(self) -> bool:
        """Run to the last epoch; False if a signal asked to save and stop before."""
        self.model.made_with()  # for the cards, of the files as they are now
        self.resume()
        self._announce()
        try:
            with StopRequest() as stop, memory_advice(OUT_OF_MEMORY):
                while self.position.epoch < self.run.max_epoch:
                    if not self.train_epoch(stop):
                        return False
                    self.position = state.Position(self.position.epoch + 1, 0, self.position.best)
                    self.save_checkpoint(self._epoch_name())
                    self.validate()
                    if self.processes.any(bool(stop)) and self.position.epoch < self.run.max_epoch:
                        return False
                return self._test_at_the_end(stop)
        finally:
            self.loader.close()
            self.run_log.close()

    def train_epoch(self, stop: StopRequest) -> bool:
        """The iterations of this epoch that are left; False if any rank was asked to stop."""
        run, epoch, batches = self.run, self.position.epoch, iter(self.loader)
        log.info("Start training epoch %d, %d iters per inner epoch.", epoch, run.iters_per_epoch)
        with self.run_log.epoch(epoch, run.iters_per_epoch, first=self.position.iteration) as epoch_log:
            for iteration in range(self.position.iteration, run.iters_per_epoch):
                with epoch_log.waiting_for_data(), phase(start_clock.FIRST_BATCH):
                    samples = next(batches)
                with phase(start_clock.FIRST_STEP):
                    loss = self.train_step(epoch, iteration, samples)
                    epoch_log.step(loss, self.optimizer.param_groups[0]["lr"], num_samples=len(samples["image_id"]))
                if start := start_clock.finish():
                    log.info(start)
                if iteration + 1 == run.iters_per_epoch:
                    break  # the epoch has a checkpoint of its own

                done = self.iterations_done
                stopping = self.processes.any(bool(stop))
                if stopping or (run.save_every_iters and done % run.save_every_iters == 0):
                    self.save_checkpoint(f"checkpoint_iter_{done}.pth")
                if stopping:
                    log.warning("Stopped by a signal after %d iterations; run.resume_ckpt_path=auto goes on", done)
                    return False
        self.guard.flush()
        return True

    def train_step(self, epoch: int, iteration: int, samples: dict[str, Any]) -> Tensor:
        """Forward and backward on one micro-batch, and the optimizer's step where it completes an update; the mean loss
        over the micro-batch's targets, a scalar on the device.

        An update that is not finite on any rank, or has targets on none, is skipped on all. Nothing here waits for a
        GPU except the guard, which reads the flags of the update before.
        """
        run = self.run
        samples = self.features.complete_batch(samples) if self.features else samples
        self.schedule.step(epoch, iteration)
        # With the published sum, the rest of an epoch waits for the next one.
        epoch_ends = run.accum_loss != "sum" and iteration + 1 == run.iters_per_epoch
        sync_gradients = epoch_ends or (iteration + 1) % run.accum_grad_iters == 0

        # Ranks exchange gradients only in the micro-batch that completes the update.
        accumulates_alone = self.processes.world_size > 1 and not sync_gradients
        with self.wrapped_model.no_sync() if accumulates_alone else nullcontext():
            with self.autocast():
                output = self.task.train_step(self.wrapped_model, samples)
            loss, num_tokens = output["loss"], output["num_tokens"]
            detached = loss.detach()
            weights = {"mean": num_tokens / TOKEN_UNIT, "sum": 1.0, "mean_of_means": 1 / run.accum_grad_iters}
            weight = weights[run.accum_loss]
            # NaN if the loss is not finite, else 0: such a loss can have a finite gradient, and every rank must skip it
            poison = detached - detached
            self.scaler.scale(loss * (weight + poison)).backward()
        self.rows.take_gradients()
        self.num_tokens += num_tokens
        self.bad_losses += (~detached.isfinite()).float()
        self.image_ids += samples.get("image_id") or []

        if sync_gradients:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            if len(gradients) < len(self.parameters):
                state.require_adapters_trained(self.parameters)
            self.scaler.unscale_(self.optimizer)
            tokens = torch.full((), float(self.num_tokens), device=self.device)  # from a number it would wait
            if self.processes.world_size > 1:
                dist.all_reduce(tokens)
            if run.accum_loss == "mean":
                # From the ranks' averaged, TOKEN_UNIT-weighted sums to the mean over all tokens of the update.
                torch._foreach_mul_(gradients, TOKEN_UNIT * self.processes.world_size / tokens.clamp(min=1))
            norm = self.rows.total_norm()
            if run.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), run.max_grad_norm, norm)
            # The same on all ranks, for they have the same gradients; the fused step reads it, as it does a scaler's.
            self.skips = (~norm.isfinite() | (tokens == 0)).float()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.guard.watch(self.skips > 0, self.bad_losses > 0, tokens == 0, self.image_ids)
            self.optimizer.zero_grad(set_to_none=True)
            self.rows.give_gradients()
            self._start_update()
        self.position.iteration = iteration + 1
        return detached

    def _start_update(self) -> None:
        self.num_tokens = 0
        self.bad_losses = torch.zeros((), device=self.device)
        self.image_ids: list[Any] = []

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.run.amp_dtype], enabled=self.run.amp)

    # Validation and test

    def validate(self) -> None:
        """Validate the epoch that has just been saved, note the loss in its card, and keep it if it is the best."""
        if not self.valid_loaders:
            return
        epoch = self.position.epoch - 1
        self.valid_monitor.at = {"epoch": epoch}
        before = rng_state()  # a run that goes on from the checkpoint must not depend on whether this was done
        loss, scores, shown = self.eval_epoch(self.valid_loaders)
        set_rng_state(before)
        self.run_log.validation(epoch, loss, shown, **scores)
        best = self.position.best
        if math.isfinite(loss) and (best is None or loss < best):
            self.position.best = loss
            self.save_checkpoint(BEST)
        if self.processes.is_main:
            amend_card(self.folder / self._epoch_name(), valid_loss=loss, **scores)

    @torch.no_grad()
    def eval_epoch(self, loaders: list[EvalLoader]) -> tuple[float, dict[str, float], list[str]]:
        """Run all loaders once, each sample on one rank; every rank must call it.

        The mean loss over all targets (nats a token), metrics of `run.valid_captions` captions over all ranks by name,
        and lines `image_id: caption` to show.
        """
        self.model.eval()
        scored, world_size = self.run.valid_captions, self.processes.world_size
        wanted = -(-scored // world_size) if scored else SHOWN_CAPTIONS if self.processes.is_main else 0
        # Sum of losses over tokens, and number of tokens.
        totals = torch.zeros(2, dtype=sum_dtype(self.device), device=self.device)
        said: list[tuple[str, str, str]] = []  # image_id, caption, reference
        with uneven_inputs(self.model.llama_model):
            for batch in itertools.chain.from_iterable(loaders):
                samples = to_device(batch, self.device)
                samples = self.features.complete_batch(samples) if self.features else samples
                with self.autocast():
                    output = self.task.valid_step(self.model, samples)
                    left = wanted - len(said)
                    if left > 0 and "answer" in samples:
                        captions = self.task.caption(self.model, samples["image"][:left])
                        said += zip(samples["image_id"], captions, samples["answer"], strict=False)
                loss, tokens = output["loss"].to(totals.dtype), output["num_tokens"]
                totals += torch.stack([loss * tokens, totals.new_full((), float(tokens))])
        self.model.train()
        loss = (self.processes.sum(totals)[0] / totals[1]).item()
        gathered = self.processes.gather(said) if scored else None
        scores = self.processes.broadcast(self.task.score(itertools.chain(*gathered)) if gathered else {})
        return loss, scores, [f"{image_id}: {caption}" for image_id, caption, _ in said[:SHOWN_CAPTIONS]]

    def evaluate(self) -> None:
        """Measure the loaded weights, those of `run.resume_ckpt_path` if it is set, on `run.test_splits`."""
        path = Path(self.run.resume_ckpt_path) if self.run.resume_ckpt_path else None
        if path is not None:
            self.position = state.load_weights(path, self.model)
        source = path or getattr(self.cfg.model, "ckpt", None) or "a model that was never trained (no model.ckpt)"
        log.info("Evaluating %s on %s", source, ", ".join(self.test_loaders))
        self.run_log.begin(self.position.epoch, self.position.iteration, path)
        try:
            with memory_advice(OUT_OF_MEMORY):
                self._test(self.position)
        finally:
            self.run_log.close()

    def _test_at_the_end(self, stop: StopRequest) -> bool:
        """`evaluate` after the last epoch, on the best where epochs are validated; False if asked to stop before.

        The card of the checkpoint holds the result, so that a run that is started once more does not do it again.
        """
        if not self.test_loaders:
            return True
        if self.processes.any(bool(stop)):
            return False
        best = self.folder / BEST
        path = best if self.valid_loaders and best.is_file() else self.folder / self._epoch_name()
        if self.processes.broadcast(self.test_loaders.keys() <= (read_card(path) or {}).get("tested", {}).keys()):
            log.info("%s was evaluated on %s before", path, ", ".join(self.test_loaders))
            return True
        position = state.load_weights(path, self.model) if path == best else self.position
        log.info("Evaluating %s on %s", path, ", ".join(self.test_loaders))
        results = self._test(position)
        if self.processes.is_main:
            amend_card(path, tested=results)
        return True

    def _test(self, position: state.Position) -> dict[str, dict[str, float]]:
        """Loss and scores by split, also written to the log as those of this position's last epoch."""
        results = {}
        for split, loaders in self.test_loaders.items():
            loss, scores, shown = self.eval_epoch(loaders)
            self.run_log.validation(position.epoch - 1, loss, shown, split, self.position.epoch - 1, **scores)
            results[split] = {"loss": loss, **scores}
        return results

    # Checkpoints

    def _epoch_name(self) -> str:
        return f"checkpoint_{self.position.epoch - 1}.pth"

    @property
    def iterations_done(self) -> int:
        return self.position.epoch * self.run.iters_per_epoch + self.position.iteration

    def save_checkpoint(self, name: str) -> None:
        """Every rank must call it; rank 0 writes, and all ranks stop together if it could not."""
        self.guard.flush()
        ranks = self.processes.gather(state.rank_state(self))
        content = state.content(self, ranks) if self.processes.is_main or self.rows else {}
        failure: MiniGPT4Error | None = None
        if self.processes.is_main:
            try:
                save_checkpoint(self.folder / name, content, state.card(self))
                log.info("Saved %s", self.folder / name)
                drop_old(self.folder, self.run.keep_last)
            except MiniGPT4Error as error:
                failure = error
        if self.processes.any(failure is not None):
            raise failure or RunError(f"rank 0 could not save {name}")

    def resume(self) -> None:
        """Go on from `run.resume_ckpt_path`, if it is set; WeightsError for a file that does not fit."""
        if self.processes.is_main:
            drop_leftovers(self.folder)
        if not self.run.resume_ckpt_path:
            self.run_log.begin()
            return
        path = Path(self.run.resume_ckpt_path)
        with phase(start_clock.CHECKPOINT), errors_as(WeightsError, f"{path}: a run cannot go on from it"):
            ranks = state.resume(path, self)
        # Was the epoch of this checkpoint of this run saved, but not validated to the end?
        at_epoch = self.position.iteration == 0 and self.position.epoch > 0
        repeats = at_epoch and path.parent == self.folder and "valid_loss" not in (read_card(path) or {})
        validated = self.position.epoch - repeats
        self.run_log.begin(self.position.epoch, self.position.iteration, path, validated)
        if self.processes.is_main:
            state.drop_later_lines(self.folder, ranks, validated)
        self.processes.barrier()  # nobody writes before that
        best = (read_card(path.parent / BEST) or {}).get("best_loss")
        if best is not None and (self.position.best is None or best < self.position.best):
            self.position.best = best
        if repeats:
            self.validate()
        log.info("Going on from %s at epoch %d, iteration %d", path, self.position.epoch, self.position.iteration)

    # Parts that a subclass may build in another way

    def build_train_loader(self, datasets: Datasets) -> DevicePrefetcher:
        """Endless batches of the training splits on the device, mixed by `sample_ratio`."""
        run, processes = self.run, self.processes
        sources = [
            TrainSource(dataset, own.batch_size or run.batch_size_train, own.sample_ratio, own.group_by_modality_length)
            for dataset, own in self._chosen(datasets, run.train_splits)
        ]
        loader = TrainLoader(
            sources,
            num_workers=run.num_workers,
            seed=run.seed,
            ledger=self._bad_sample_monitor(),
            rank=processes.rank,
            world_size=processes.world_size,
            pin_memory=is_gpu(self.device),
        )
        return DevicePrefetcher(loader, self.device)

    def build_eval_loaders(self, datasets: Datasets, splits: list[str]) -> list[EvalLoader]:
        """One finite loader for each dataset and each of these splits."""
        run = self.run
        ranks = (self.processes.rank, self.processes.world_size) if run.use_dist_eval_sampler else (0, 1)
        return [
            EvalLoader(
                dataset,
                run.batch_size_eval or section.batch_size or run.batch_size_train,
                num_workers=run.num_workers,
                ledger=self.valid_monitor,
                rank=ranks[0],
                world_size=ranks[1],
            )
            for dataset, section in self._chosen(datasets, splits)
        ]

    def _chosen(self, datasets: Datasets, splits: list[str]) -> list[tuple[BaseDataset, DatasetConfig]]:
        sections = self.cfg.datasets.items()
        return [(datasets[name][at], section) for name, section in sections for at in splits if at in datasets[name]]

    def _bad_sample_monitor(self) -> BadSampleMonitor:
        run = self.run
        limits = {"max_share": run.max_bad_share, "max_in_a_row": run.max_bad_in_a_row}
        return BadSampleMonitor(self.folder, **limits, rank=self.processes.rank)

    # The log's first lines

    def _announce(self) -> None:
        run, iterations = self.run, self.run.max_epoch * self.run.iters_per_epoch
        log.info("number of trainable parameters: %d", sum(self.rows.like(p).numel() for p in self.parameters.values()))
        updates = run.max_epoch * math.ceil(run.iters_per_epoch / run.accum_grad_iters)
        if run.accum_loss == "sum":  # what is left at the end makes no update
            updates = iterations // run.accum_grad_iters
        size = self.cfg.batch_size() * self.processes.world_size * run.accum_grad_iters
        samples = min(updates * size, iterations * size // run.accum_grad_iters)
        times = "x" if samples == updates * size else "x up to"
        log.info("%s steps %s %d = %s samples", f"{updates:,}", times, size, f"{samples:,}")

        if any(p.dtype == torch.float16 for p in self.model.parameters()) and not self.scaler.is_enabled():
            text = "The frozen model computes in fp16 without gradient scaler: small gradients are lost. Set %s"
            log.warning(text, "run.amp: True with amp_dtype: fp16, or model.llm_precision and vit_precision: bf16")
        if any(p.dtype == torch.bfloat16 for p in self.parameters.values()):
            text = "The LLM is trained in bf16: an update below 1/512 of its weight is lost. model.llm_precision: fp32"
            log.warning("%s with run.amp: True and amp_dtype: bf16 keeps it, for twice the memory", text)
        log.info("Start training")
