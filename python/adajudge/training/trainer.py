"""`AdaJudgeTrainer`: transformers' Trainer on preference pairs with the focal Bradley-Terry loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from adajudge.data import ConversationEncoder
from adajudge_kernels import focal_bradley_terry_loss, use_backend

_REMEDIES = "a lower learning_rate, bf16 in place of fp16, or a look at the data of the last steps may help"

# Columns of what is measured for each pair; the log's names for their means.
_MEASURES = (
    "accuracy",
    "margin",
    "router_entropy",
    "view_weight_last",
    "view_weight_mean",
    "view_weight_attention",
)


@dataclass
class AdaJudgeTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` and the numbers of the loss.

    Args:
        gamma: focusing exponent of the focal Bradley-Terry loss, at least 0.
        temperature: tau_bt, above 0.
        entropy_floor: eta, the router entropy in nats below which the penalty sets in.
        entropy_weight: lambda of that penalty.
        remove_unused_columns: False: a data set of pairs has no columns.
        logging_nan_inf_filter: False: the filter hides a loss that is not finite, and waits for the device at
            every step. A loss that is not finite ends the training instead.
    """

    gamma: float = 2.0
    temperature: float = 1.0
    entropy_floor: float = 0.5
    entropy_weight: float = 0.1
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        """Have the loss look at its numbers now, not at the first step."""
        super().__post_init__()
        with use_backend("reference"):
            focal_bradley_terry_loss(torch.empty(0), torch.empty(0), **self.loss_options())

    def loss_options(self) -> dict[str, Any]:
        """The numbers of the loss, by the names of `focal_bradley_terry_loss`."""
        names = ("gamma", "temperature", "entropy_floor", "entropy_weight")
        return {name: getattr(self, name) for name in names}


class AdaJudgeTrainer(Trainer):
    """Trains a judge (plain or under LoRA) on batches of `adajudge.data.PairCollator`.

    The loss of a batch of N pairs (2N rows, all chosen ones first) is
    ``mean[-w (1-p)^gamma log p] + entropy_weight * mean[max(0, entropy_floor - H(pi))^2]`` with
    ``p = sigmoid((r+ - r-) / temperature)``, see `adajudge_kernels.focal_bradley_terry_loss`. With gradient accumulation the
    loss of a step is the mean over all its pairs, however many each of its batches has.

    Logged beside the loss, for training (over the steps since the last log) and evaluation: accuracy (share of
    pairs with the chosen reward strictly above), margin (mean of r+ - r-), router_entropy (mean H(pi), nats),
    view_weight_last, view_weight_mean, view_weight_attention (mean pi). During training they are summed on the
    device and read once per log.

    With a tokenizer (`processing_class`), its turn boundary and pad token go into the configuration of a judge that
    has none, and it is saved beside every checkpoint: each can be scored at once.

    A log is written wherever a checkpoint is: a resumed run then logs exactly what an uninterrupted one does.

    Raises:
        FloatingPointError: the loss is not finite, or a parameter that is about to be saved.
    """

    args: AdaJudgeTrainingArguments
    loss_is_scaled_for_ga = False  # what compute_loss gives is divided by the number of batches of a step

    def __init__(
        self,
        model: PreTrainedModel,
        args: AdaJudgeTrainingArguments,
        *,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("compute_metrics", self._metrics)
        tokenizer = options.get("processing_class")
        if tokenizer is not None and model.config.turn_boundary is None:
            model.config.turn_boundary = ConversationEncoder(tokenizer).boundary.to_dict()
        if tokenizer is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        super().__init__(model, args, callbacks=[_LogWithCheckpoint(), *(callbacks or [])], **options)
        self._sums: Tensor | None = None  # [number of measures + 1]: sums over pairs, number of pairs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch, and with `return_outputs` the model's output.

        Args:
            model: the judge.
            inputs: of `adajudge.data.PairCollator`.
            return_outputs: give the model's output too.
            num_items_in_batch: pairs of all batches of the step; the loss is then this batch's part in it, times their
                number, by which `Trainer` divides.

        Raises:
            ValueError: an odd number of rows.
        """
        inputs = dict(inputs)
        pair_weight = inputs.pop("pair_weight", None)
        output = model(**inputs)
        chosen, rejected = _sides(output["logits"])
        view_weights = output["view_weights"].float()
        if model.training:
            with torch.no_grad():
                measured = _measure(chosen - rejected, view_weights)
                sums = torch.cat([measured.sum(dim=0), measured.new_tensor([float(measured.shape[0])])])
                self._sums = sums if self._sums is None else self._sums + sums
        loss = self._loss(chosen, rejected, pair_weight, view_weights)
        if num_items_in_batch is not None:
            loss = loss * (len(chosen) * self.current_gradient_accumulation_steps / num_items_in_batch)
        return (loss, output) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int | None]:
        """The batches of a step, and their pairs where there are several batches."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < 2:
            return batches, None
        return batches, sum(_pairs_of(batch) for batch in batches)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """What the metrics are made of: ``[N, 7]`` margin and pi of both sides, and the pair weights ``[N]``.

        No loss: that of all pairs follows from these, exactly, however they were batched and spread.
        """
        inputs = self._prepare_inputs(inputs)
        pair_weight = inputs.pop("pair_weight", None)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        chosen, rejected = _sides(output["logits"])
        margin = chosen - rejected
        columns = torch.cat([margin[:, None], *output["view_weights"].float().chunk(2)], dim=1)
        return None, columns, torch.ones_like(margin) if pair_weight is None else pair_weight

    def _metrics(self, prediction: Any) -> dict[str, float]:
        """Loss and means over all evaluated pairs."""
        columns, pair_weight = (
            torch.from_numpy(array).to(self.args.device)  # where a forced backend can serve them
            for array in (prediction.predictions, prediction.label_ids)
        )
        margin, view_weights = columns[:, 0], torch.cat(columns[:, 1:].chunk(2, dim=1))
        loss = self._loss(margin, torch.zeros_like(margin), pair_weight, view_weights)
        means = _measure(margin, view_weights).double().mean(dim=0).tolist()
        return {"loss": loss.item(), **dict(zip(_MEASURES, means, strict=True))}

    def _loss(
        self, chosen: Tensor, rejected: Tensor, pair_weight: Tensor | None, view_weights: Tensor
    ) -> Tensor:
        return focal_bradley_terry_loss(
            chosen,
            rejected,
            pair_weight=pair_weight,
            view_weights=view_weights,
            **self.args.loss_options(),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the measures since the last log to a log of the training loss."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; {_REMEDIES}"
                )
            if self._sums is not None:
                *sums, pairs = self.accelerator.reduce(self._sums, "sum").tolist()
                logs |= {name: value / pairs for name, value in zip(_MEASURES, sums, strict=True)}
                self._sums = None
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the judge; of a LoRA adapter also the judge's configuration, without which it has no head to fill.

        Raises:
            FloatingPointError: a trained parameter is not finite; nothing is saved.
        """
        model = self.accelerator.unwrap_model(self.model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"{name} is not finite at step {self.state.global_step}; {_REMEDIES}"
                )
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and hasattr(model, "peft_config"):
            model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)


class _LogWithCheckpoint(TrainerCallback):
    """Ends a log's window at each checkpoint; what lies between log and checkpoint would be lost on resuming."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Log where a checkpoint is about to be saved."""
        control.should_log = control.should_log or control.should_save
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """The same at the end of an epoch."""
        return self.on_step_end(args, state, control)


def _pairs_of(batch: Mapping[str, Any]) -> int:
    layout = batch.get("layout")
    tokens = batch["inputs_embeds" if batch.get("input_ids") is None else "input_ids"]
    return (len(tokens) if layout is None else layout.num_sequences) // 2


def _sides(logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[0] % 2:
        raise ValueError(f"{logits.shape[0]} rows came, expected N chosen ones and then N rejected ones")
    chosen, rejected = logits[:, 0].float().chunk(2) if logits.shape[0] else (logits[:, 0], logits[:, 0])
    return chosen, rejected


def _measure(margin: Tensor, view_weights: Tensor) -> Tensor:
    """``[N, 6]`` fp32 from margins ``[N]`` and pi ``[2N, 3]``: what is logged of each pair."""
    entropy = -torch.xlogy(view_weights, view_weights).sum(dim=1)
    router = torch.cat([entropy[:, None], view_weights], dim=1).unflatten(0, (2, -1)).mean(dim=0)  # [N, 4]
    return torch.cat([(margin > 0).float()[:, None], margin[:, None], router], dim=1)
