"""Train the reference model from random weights, inside a budget of minutes, resumable.

Run ``python -m export.reference.train --work /tmp/reference --minutes 60``; ``python -m export.reference`` does the
same and then measures the result.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from edge_agent.contract.task import TaskSpec, load_task
from export.reference.checkpoint import save_checkpoint
from export.reference.cues import CueHeads
from export.reference.evaluate import TASK_FILE, Accuracy, TorchDecider, compare
from export.reference.examples import Batch, Encoder, batches, canonical_answer, shard
from export.reference.forward import hidden_states
from export.reference.generator import generate
from export.reference.tokenizer import EOS, PAD, load_tokenizer, save_tokenizer, train_tokenizer
from export.smaller.rounding import int4_weights

log = logging.getLogger(__name__)

_CUE_SHARE = 1.5


@dataclass(frozen=True)
class Shape:
    """The network's shape; every matrix dimension is a multiple of 32, the quantisation block."""

    hidden: int = 256
    layers: int = 5
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 32
    intermediate: int = 704
    positions: int = 512


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        minutes: budget of training time; the learning rate reaches zero at its end.
        steps: stop after this many steps instead (for tests), or None.
        tokens: tokens a batch.
        peak_rate: highest learning rate.
        warmup: share of the budget for linear warm-up.
        int4_from: from this share of the budget on, the forward pass sees INT4 weights; above 1 never.
        weight_decay: AdamW weight decay of matrices.
        seed: of weights, events and batch order.
        tokenizer_events: events of the training split that the tokenizer is trained on.
        validation_events: events measured at every checkpoint.
        checkpoint_s: seconds between checkpoints.
        threads: row groups computed at the same time, one thread each.
    """

    minutes: float = 60.0
    steps: int | None = None
    tokens: int = 2304
    peak_rate: float = 1.5e-3
    warmup: float = 0.03
    int4_from: float = 0.7
    weight_decay: float = 0.05
    seed: int = 7
    tokenizer_events: int = 40_000
    validation_events: int = 120
    checkpoint_s: float = 300.0
    threads: int = 2


def build_model(shape: Shape, vocabulary_size: int, *, seed: int, eos_id: int, pad_id: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings."""
    torch.manual_seed(seed)
    configuration = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(configuration)


def step_loss(model: LlamaForCausalLM, heads: CueHeads, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of one batch, summed over rows.

    The head runs only where a loss is wanted: 4096 logits for every prompt token would cost as much as two layers.

    Returns:
        Weighted cross entropy of the answer's tokens, and the auxiliary heads' cross entropy.
    """
    # Right padding needs no mask: causal attention never looks there. All (rows, length - 1, hidden).
    inputs, final = hidden_states(model, batch.ids[:, :-1])
    weights = batch.weights[:, 1:]  # (rows, length - 1)
    wanted = weights > 0
    logits = model.lm_head(final[wanted]).float()  # (answer tokens, vocabulary)
    losses = torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][wanted], reduction="none")
    return (losses * weights[wanted]).sum(), heads(inputs, batch)


def rate_at(progress: float, training: Training) -> float:
    """Learning rate at ``progress`` (0..1) of the budget: linear warm-up, then cosine to zero."""
    if progress < training.warmup:
        return training.peak_rate * progress / training.warmup
    rest = (progress - training.warmup) / (1 - training.warmup)
    return training.peak_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))


def reference_tokenizer(task: TaskSpec, training: Training) -> Tokenizer:
    """The tokenizer, trained on rendered events and answers of the training split."""

    def texts() -> Iterator[str]:
        yield from [task.prompt.prefix] * 200  # often enough for its words to become single tokens
        for labelled in islice(generate("train", training.seed), training.tokenizer_events):
            yield task.render(labelled.event)
            yield canonical_answer(labelled.decision)

    return train_tokenizer(texts())


class Trainer:
    """One training run in a work folder: ``state.pt`` to resume from, ``checkpoint/`` to use.

    Args:
        work: folder of the run.
        shape, training: what to train and how.
        task_file: the task.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        work: Path,
        shape: Shape,
        training: Training,
        *,
        task_file: Path = TASK_FILE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpoint = work / "checkpoint"
        self._state_file = work / "state.pt"
        self._training = training
        self._clock = clock
        self._task = load_task(task_file)
        if not (self.checkpoint / "tokenizer.json").exists():
            save_tokenizer(reference_tokenizer(self._task, training), self.checkpoint)
        self._tokenizer = load_tokenizer(self.checkpoint)
        self._encoder = Encoder(self._tokenizer, self._task)
        self._pad_id = int(self._tokenizer.token_to_id(PAD))
        self.model = build_model(
            shape,
            self._tokenizer.get_vocab_size(),
            seed=training.seed,
            eos_id=int(self._tokenizer.token_to_id(EOS)),
            pad_id=self._pad_id,
        )
        self._heads = CueHeads(shape.hidden)
        self._parameters = [*self.model.parameters(), *self._heads.parameters()]
        matrices = [p for p in self._parameters if p.dim() >= 2]
        vectors = [p for p in self._parameters if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.98),
        )
        # One thread a row group instead of all threads in every operation: a step meets at one barrier, not at a
        # thousand, which on shared cores is the difference between 1,000 and 10,000 tokens/s.
        torch.set_num_threads(1)
        self._map = map if training.threads == 1 else ThreadPoolExecutor(training.threads).map
        self._step = 0
        self._shard = 0
        self._elapsed_s = 0.0
        self._validation = list(islice(generate("validation", training.seed), training.validation_events))
        self._resume()

    def run(self) -> Accuracy:
        """Train until the budget is spent, save the checkpoint and return its validation accuracy."""
        parameters = sum(p.numel() for p in self.model.parameters())
        log.info("model of %.2f M parameters, vocabulary %d", parameters / 1e6, self._tokenizer.get_vocab_size())
        saved_s = logged_s = self._elapsed_s
        seen_tokens, window_loss, window_steps = 0, 0.0, 0
        for batch in self._batches():
            started = self._clock()
            loss = self._update(batch)
            self._elapsed_s += self._clock() - started
            seen_tokens += batch.ids.numel()
            window_loss, window_steps = window_loss + loss, window_steps + 1
            if self._elapsed_s - logged_s >= 15:
                log.info(
                    "step %d  %4.1f min  loss %.4f  %.0f tokens/s  rate %.2e",
                    self._step,
                    self._elapsed_s / 60,
                    window_loss / window_steps,
                    seen_tokens / (self._elapsed_s - logged_s),
                    self._rate(),
                )
                logged_s, seen_tokens, window_loss, window_steps = self._elapsed_s, 0, 0.0, 0
            if self._elapsed_s - saved_s >= self._training.checkpoint_s:
                self._save()
                self._log_accuracy(self.validate())
                saved_s = self._elapsed_s
            if self._progress() >= 1:
                break
        self._save()
        accuracy = self.validate()
        self._log_accuracy(accuracy)
        return accuracy

    def validate(self) -> Accuracy:
        """Accuracy on the validation split, decoded as on the device (and with its weights, once INT4 has begun)."""
        self.model.eval()
        decider = TorchDecider(self.model, self._encoder, self._task, self._tokenizer)
        with self._deployed_weights():
            answers = decider.decide_all(self._validation)
        self.model.train()
        return compare(answers, [labelled.decision for labelled in self._validation])

    def _batches(self) -> Iterator[Batch]:
        while True:
            # Every shard is new, so the model never sees an event twice and cannot learn rows by heart.
            seed = self._training.seed * 1_000_003 + self._shard
            self._shard += 1
            examples = shard(self._encoder, "train", seed)
            yield from batches(examples, random.Random(seed), tokens=self._training.tokens, pad_id=self._pad_id)

    def _progress(self) -> float:
        if self._training.steps is not None:
            return self._step / self._training.steps
        return self._elapsed_s / (self._training.minutes * 60)

    def _rate(self) -> float:
        return rate_at(self._progress(), self._training)

    def _deployed_weights(self) -> AbstractContextManager[None]:
        return int4_weights(self.model) if self._progress() >= self._training.int4_from else nullcontext()

    def _update(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        parts = [batch.part(index, self._training.threads) for index in range(self._training.threads)]
        weight, rows = float(batch.weights.sum()), len(batch.ids)
        with self._deployed_weights():
            results = list(self._map(lambda part: self._gradients(part, weight, rows), parts))
        for parameter, *gradients in zip(self._parameters, *(gradients for _, gradients in results), strict=True):
            parameter.grad = torch.stack(gradients).sum(dim=0)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._step += 1
        return sum(loss for loss, _ in results)

    def _gradients(self, part: Batch, weight: float, rows: int) -> tuple[float, tuple[torch.Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the cache would be shared by threads
            answer, cues = step_loss(self.model, self._heads, part)
            loss = answer / weight
            total = loss + _CUE_SHARE * cues / rows
        return float(loss.detach()), torch.autograd.grad(total, self._parameters)

    def _save(self) -> None:
        save_checkpoint(self.model, self.checkpoint)
        state = {
            "model": self.model.state_dict(),
            "heads": self._heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
            "shard": self._shard,
            "elapsed_s": self._elapsed_s,
        }
        temporary = self._state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._state_file)

    def _resume(self) -> None:
        if not self._state_file.exists():
            return
        state = torch.load(self._state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        # The shard under way is dropped, not repeated: fresh events are cheap.
        self._step, self._shard, self._elapsed_s = state["step"], state["shard"], state["elapsed_s"]
        log.info("resumed at step %d, %.1f min", self._step, self._elapsed_s / 60)

    @staticmethod
    def _log_accuracy(accuracy: Accuracy) -> None:
        fields = "  ".join(f"{name} {share:.3f}" for name, share in accuracy.fields.items())
        log.info("validation: %s  exact %.3f", fields, accuracy.exact)


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description="Train the reference model from random weights.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run; an old run there is resumed")
    parser.add_argument("--minutes", type=float, default=Training.minutes)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--rate", type=float, default=Training.peak_rate)
    parser.add_argument("--tokens", type=int, default=Training.tokens)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments.work.mkdir(parents=True, exist_ok=True)
    training = Training(
        minutes=arguments.minutes, seed=arguments.seed, peak_rate=arguments.rate, tokens=arguments.tokens
    )
    Trainer(arguments.work, Shape(layers=arguments.layers), training).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
