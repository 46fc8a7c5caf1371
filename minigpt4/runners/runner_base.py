"""`runner_base`: the loop of a run, from building to the last checkpoint, in order.

One epoch is `iters_per_epoch` iterations of an endless loader; an iteration is one micro-batch.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.checkpoint import (
    BEST,
    amend_card,
    copy_weights,
    drop_leftovers,
    drop_old,
    read_card,
    save_checkpoint,
)
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes, StopRequest, rng_state, set_rng_state
from minigpt4.common.errors import MiniGPT4Error, RunError, WeightsError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.run_log import RunLog
from minigpt4.common.start_clock import CHECKPOINT, FIRST_BATCH, FIRST_STEP, phase
from minigpt4.datasets import BadSampleMonitor, BaseDataset, DevicePrefetcher, EvalLoader, TrainLoader, TrainSource
from minigpt4.models.attention import compile_parts
from minigpt4.models.feature_cache import FeatureEncoder
from minigpt4.runners import state
from minigpt4.runners.updates import NonFiniteGuard, Updater
from minigpt4.runners.validation import Validation, validate
from minigpt4.tasks import BaseTask

log = logging.getLogger(__name__)


# Numbers of a run in few words, for the log.


def millions(number: int) -> str:
    """`5.12 M`, and small numbers as they are."""
    return f"{number / 1e6:.4g} M" if number >= 1_000_000 else f"{number:,}"


def counts(parameters: Mapping[str, nn.Parameter]) -> str:
    """`llama_proj 3,149,824`: parameters by the first part of their names."""
    found: dict[str, int] = {}
    for name, parameter in parameters.items():
        part = name.split(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return ", ".join(f"{part} {count:,}" for part, count in found.items())


Datasets = Mapping[str, Mapping[str, BaseDataset]]
"""Datasets by name and split."""

OUT_OF_MEMORY = (
    "The GPU's memory is full. train.py --check says what fits: a smaller batch_size with more "
    "run.accum_grad_iters, model.llm_grad_checkpoint: True, model.llm_precision: nf4, or run.parallel: fsdp."
)
CUDA_STOP_INTERVAL = 10
"""Iterations between two looks at the stop flag on GPUs, where a look waits for the queue."""


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains `model` on `datasets` as `cfg.run` says, or with `run.evaluate` evaluates it.

    Args:
        cfg: the typed configuration.
        job_id: name of the run's folder in `output_dir`.
        task: what a step is.
        model: on the device of `processes`.
        datasets: what `task.build_datasets` returned.
        processes: this process among the run's.
    """

    def __init__(
        self, cfg: Config, job_id: str, task: BaseTask, model: nn.Module, datasets: Datasets, processes: Processes
    ) -> None:
        self.cfg, self.run, self.task = cfg, cfg.run, task
        self.processes = processes
        folder = RunFolder.existing(Path(cfg.run.output_dir) / job_id)
        self.folder = folder.path
        self.model = model.train()
        if self.run.compile:
            compile_parts(self.model)
        self.features = FeatureEncoder(self.model)
        self.valid_ledger = self._ledger()
        self.test_loaders = {split: self.build_eval_loaders(datasets, [split]) for split in self.run.test_splits}
        self.run_log = RunLog(self.run, folder, processes, cfg.merged)
        self.position = state.Position()
        if self.run.evaluate:
            return
        finite = NonFiniteGuard(self.folder, self.run.max_nonfinite_steps, processes.rank)
        self.updater = Updater(self.model, self.run, processes, finite, task.train_step)
        self.schedule = self.build_schedule()
        self.loader = self.build_train_loader(datasets)
        self.valid_loaders = self.build_eval_loaders(datasets, self.run.valid_splits)

    # The loop

    def train(self) -> bool:
        """Run to the last epoch; False if a signal asked to save and stop before."""
        self.model.made_with()  # for the cards, of the files as they are now
        self.resume()
        self._announce()
        try:
            with StopRequest() as stop, _memory_advice():
                return self._train_epochs(stop) and self._test_at_the_end(stop)
        finally:
            self.loader.close()
            self.run_log.close()

    def _train_epochs(self, stop: StopRequest) -> bool:
        while self.position.epoch < self.run.max_epoch:
            if not self._train_epoch(stop):
                return False
            self.position = state.Position(self.position.epoch + 1, 0, self.position.best)
            self._save(self._epoch_name())
            self._validate()
            if self.processes.any(bool(stop)) and self.position.epoch < self.run.max_epoch:
                return False
        return True

    def _train_epoch(self, stop: StopRequest) -> bool:
        """The iterations of this epoch that are left; False if the run was asked to stop."""
        epoch, iterations, batches = self.position.epoch, self.run.iters_per_epoch, iter(self.loader)
        log.info("Start training epoch %d, %d iters per inner epoch.", epoch, iterations)
        with self.run_log.epoch(epoch, iterations, first=self.position.iteration) as epoch_log:
            for iteration in range(self.position.iteration, iterations):
                with epoch_log.waiting_for_data(), phase(FIRST_BATCH):
                    samples = next(batches)
                with phase(FIRST_STEP):
                    loss = self._iterate(epoch, iteration, samples)
                    epoch_log.step(loss, self._rate(), num_samples=len(samples["image_id"]))
                self.run_log.started_up()
                if iteration + 1 < iterations and not self._save_and_go_on(stop):
                    return False
        self.updater.finite.flush()
        return True

    def _iterate(self, epoch: int, iteration: int, samples: dict[str, Any]) -> torch.Tensor:
        """Train on a batch; its loss, on the device."""
        samples = self.features.complete_batch(samples)
        self.schedule.step(epoch, iteration)
        closes = self._sync_gradients(iteration)
        loss = self.updater.backward(samples, sync_gradients=closes)
        if closes:
            self.updater.update()
        self.position.iteration = iteration + 1
        return loss

    def _rate(self) -> float:
        return self.updater.optimizer.param_groups[0]["lr"]

    def _sync_gradients(self, iteration: int) -> bool:
        """Every `accum_grad_iters` iterations; with the published sum the rest of an epoch waits for the next."""
        last = self.run.accum_loss == "mean" and iteration + 1 == self.run.iters_per_epoch
        return last or (iteration + 1) % self.run.accum_grad_iters == 0

    # Validation

    def _validate(self) -> None:
        """Validate the epoch that has just been saved, note the loss in its card, and keep it if it is the best."""
        if not self.valid_loaders:
            return
        self.valid_ledger.at = {"epoch": self.position.epoch - 1}
        before = rng_state()  # a run that goes on from the checkpoint must not depend on whether this was done
        result = self._validated(self.valid_loaders)
        set_rng_state(before)
        self.run_log.validation(self.position.epoch - 1, result.loss, result.shown, **result.scores)
        best = self.position.best
        if math.isfinite(result.loss) and (best is None or result.loss < best):
            self.position.best = result.loss
            self._save(BEST)
        if self.processes.is_main:
            amend_card(self.folder / self._epoch_name(), valid_loss=result.loss, **result.scores)

    def _validated(self, loaders: list[EvalLoader]) -> Validation:
        return validate(self.model, self.task, loaders, self.run, self.processes, self.features)

    def _epoch_name(self) -> str:
        return f"checkpoint_{self.position.epoch - 1}.pth"

    # Test splits

    def evaluate(self) -> None:
        """Measure the loaded weights, those of `run.resume_ckpt_path` if it is set, on `run.test_splits`."""
        path = Path(self.run.resume_ckpt_path) if self.run.resume_ckpt_path else None
        if path is not None:
            self.position = state.load_weights(path, self.model)
        source = path or getattr(self.cfg.model, "ckpt", None)
        if source is None:
            log.warning("Neither model.ckpt nor run.resume_ckpt_path is set: what is evaluated was never trained")
        log.info("Evaluating %s on %s", source or "the model", ", ".join(self.test_loaders))
        self.run_log.begin(self.position.epoch, self.position.iteration, path)
        try:
            with _memory_advice():
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
            result = self._validated(loaders)
            epoch, after = position.epoch - 1, self.position.epoch - 1
            self.run_log.validation(epoch, result.loss, result.shown, split, after, **result.scores)
            results[split] = {"loss": result.loss, **result.scores}
        return results

    # Checkpoints

    def _save_and_go_on(self, stop: StopRequest) -> bool:
        """Between two iterations: save if it is time or if any rank was asked to stop; False to stop."""
        done = self._iterations_done()
        looks = self.processes.device.type != "cuda" or done % CUDA_STOP_INTERVAL == 0
        asked = looks and self.processes.any(bool(stop))
        every = self.run.save_every_iters
        if asked or (every and done % every == 0):
            self._save(f"checkpoint_iter_{done}.pth")
        if asked:
            log.warning("Stopped by a signal after %d iterations; run.resume_ckpt_path=auto goes on from here", done)
        return not asked

    def _iterations_done(self) -> int:
        return self.position.epoch * self.run.iters_per_epoch + self.position.iteration

    def _save(self, name: str) -> None:
        """Every rank must call it; rank 0 writes, and all ranks stop together if it could not."""
        self.updater.finite.flush()
        ranks = self.processes.gather(self._rank_state())
        failure: MiniGPT4Error | None = None
        if self.processes.is_main:
            try:
                self._write(name, ranks)
            except MiniGPT4Error as error:
                failure = error
        if self.processes.any(failure is not None):
            raise failure or RunError(f"rank 0 could not save {name}")

    def _rank_state(self) -> dict[str, Any]:
        return {
            "rng": rng_state(),
            "data": self.loader.state_dict(),
            "pending": self.updater.pending_state(),
            "finite": self.updater.finite.state_dict(),
            "log": self.run_log.state_dict(),
        }

    def _write(self, name: str, ranks: list[Any]) -> None:
        config, facts = self.cfg.merged, self.run_log.facts()
        content = state.content(self.model, self.updater.state(), config, self.position, ranks)
        card = state.card(
            self.model,
            config,
            self.position,
            self._iterations_done(),
            job_name=self.run.job_name,
            run_number=facts.get("number", 0),
            run_started=facts.get("started", ""),
        )
        save_checkpoint(self.folder / name, content, card)
        log.info("Saved %s", self.folder / name)
        drop_old(self.folder, self.run.keep_last)

    def resume(self) -> None:
        """Go on from `run.resume_ckpt_path`, if it is set."""
        if self.processes.is_main:
            drop_leftovers(self.folder)
        if not self.run.resume_ckpt_path:
            self.run_log.begin()
            return
        path, processes = Path(self.run.resume_ckpt_path), self.processes
        own = {**self.updater.state(), "rank": self._rank_state()}
        with phase(CHECKPOINT), errors_as(WeightsError, f"{path}: a run cannot go on from it"):
            resumed = state.resume(path, self.model, own, processes.rank, processes.world_size)
            self._take_up(resumed)
        repeats = self._validation_was_cut_off(path)
        validated = self.position.epoch - repeats
        self.run_log.begin(self.position.epoch, self.position.iteration, path, validated)
        if processes.is_main:
            state.drop_later_lines(self.folder, resumed, validated)
        processes.barrier()  # nobody writes before that
        best = (read_card(path.parent / BEST) or {}).get("best_loss")
        if best is not None and (self.position.best is None or best < self.position.best):
            self.position.best = best
        if repeats:
            self._validate()
        log.info("Going on from %s at epoch %d, iteration %d", path, self.position.epoch, self.position.iteration)

    def _take_up(self, resumed: state.Resumed) -> None:
        self.updater.load_state(resumed.optimizer, resumed.scaler)
        self.position = resumed.position
        if resumed.data is not None:
            self.loader.load_state_dict(resumed.data)
        if resumed.rank is not None:
            self.updater.load_pending(resumed.rank["pending"])
            self.updater.finite.load_state_dict(resumed.rank["finite"])
            self.run_log.load_state_dict(resumed.rank["log"])
            set_rng_state(resumed.rank["rng"])
        copy_weights(self.updater.parameters, resumed.weights)

    def _validation_was_cut_off(self, path: Path) -> bool:
        """Whether the epoch of this checkpoint of this run was saved, but not validated to the end."""
        at_epoch = self.position.iteration == 0 and self.position.epoch > 0
        return at_epoch and path.parent == self.folder and "valid_loss" not in (read_card(path) or {})

    def _announce(self) -> None:
        """What is trained, and on how much."""
        run, names = self.run, self.updater.parameters
        log.info("number of trainable parameters: %d", sum(p.numel() for p in names.values()))
        log.info("Trained: %s", counts(names))
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        log.info("Frozen: %s", counts(frozen) or "nothing")
        updates, size = self._updates(), self.cfg.batch_size() * self.processes.world_size * run.accum_grad_iters
        samples = min(updates * size, run.max_epoch * run.iters_per_epoch * size // run.accum_grad_iters)
        times = "x" if samples == updates * size else "x up to"
        log.info("%s steps %s %d = %s samples", f"{updates:,}", times, size, millions(samples))
        if self._lacks_scaler():
            log.warning(
                "The frozen model computes in fp16, but no gradient scaler is active: small gradients are lost. Set "
                "run.amp: True with amp_dtype: fp16, or model.llm_precision and vit_precision: bf16"
            )
        log.info("Start training")

    def _lacks_scaler(self) -> bool:
        """Whether gradients pass 16-bit floats of small range without being scaled."""
        half = any(p.dtype == torch.float16 for p in self.model.parameters())
        return half and not self.updater.scaler.is_enabled()

    def _updates(self) -> int:
        """Optimizer steps of the whole run; with the published sum what is left at its end makes none."""
        run = self.run
        if run.accum_loss == "sum":
            return run.max_epoch * run.iters_per_epoch // run.accum_grad_iters
        return run.max_epoch * math.ceil(run.iters_per_epoch / run.accum_grad_iters)

    # Parts that a subclass may build in another way

    def build_train_loader(self, datasets: Datasets) -> DevicePrefetcher:
        """Endless batches of the training splits on the device, mixed by `sample_ratio`."""
        run, processes = self.run, self.processes
        sources = [
            TrainSource(own[split], section.batch_size or run.batch_size_train, section.sample_ratio)
            for name, section in self.cfg.datasets.items()
            for own in (datasets[name],)
            for split in run.train_splits
            if split in own
        ]
        loader = TrainLoader(
            sources,
            num_workers=run.num_workers,
            seed=run.seed,
            ledger=self._ledger(),
            rank=processes.rank,
            world_size=processes.world_size,
            pin_memory=processes.device.type == "cuda",
        )
        return DevicePrefetcher(loader, processes.device)

    def build_eval_loaders(self, datasets: Datasets, splits: list[str]) -> list[EvalLoader]:
        """One finite loader for each dataset and each of these splits."""
        run, processes = self.run, self.processes
        shared = run.use_dist_eval_sampler
        return [
            EvalLoader(
                datasets[name][split],
                run.batch_size_eval or section.batch_size or run.batch_size_train,
                num_workers=run.num_workers,
                ledger=self.valid_ledger,
                rank=processes.rank if shared else 0,
                world_size=processes.world_size if shared else 1,
            )
            for name, section in self.cfg.datasets.items()
            for split in splits
            if split in datasets[name]
        ]

    def _ledger(self) -> BadSampleMonitor:
        run = self.run
        return BadSampleMonitor(
            self.folder, max_share=run.max_bad_share, max_in_a_row=run.max_bad_in_a_row, rank=self.processes.rank
        )

    def build_schedule(self) -> Any:
        """The schedule that `run.lr_sched` names."""
        run = self.run
        return registry.get_lr_scheduler_class(run.lr_sched)(
            optimizer=self.updater.optimizer,
            max_epoch=run.max_epoch,
            iters_per_epoch=run.iters_per_epoch,
            min_lr=run.min_lr,
            init_lr=run.init_lr,
            warmup_steps=run.warmup_steps,
            warmup_start_lr=run.warmup_lr,
            decay_rate=run.lr_decay_rate,
        )


@contextmanager
def _memory_advice() -> Iterator[None]:
    """A GPU whose memory is full is a RunError that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{error}\n{OUT_OF_MEMORY}") from error
