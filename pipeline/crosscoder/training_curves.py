"""The numbers of a row of metrics as TensorBoard curves and histograms: under which tag, and what each is.

TensorBoard sorts by name, so that groups carry a digit: the losses come first, counters last.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import histogram, scalar

CURVES = {
    "1_loss": {
        "loss": "What is trained on: the reconstruction's squared error and all terms, mean over positions since the last row.",
        "loss_reconstruction": "Squared error of the normalized activations, mean over positions since the last row.",
        "loss_*": "This term of the loss with its coefficient, mean over positions since the last row.",
    },
    "2_reconstruction": {
        "explained_variance": "1 - sum |x - x_hat|^2 / sum |x - mean|^2 over the positions since the last row, in normalized units.",
        "median_norm": "Median |x| over the row's last batch, in the language model's units.",
        "median_error_norm": "Median |x - x_hat| over the row's last batch, in the language model's units.",
        "median_error": "Median |x - x_hat| over median |x|, of the row's last batch.",
    },
    "3_sparsity": {
        "l0": "Features that fire at a position, mean since the last row.",
        "recent_l0": "Features that fire at a position, mean over the last l0_window_steps steps.",
        "epoch_l0": "Features that fire at a position, mean over the epoch so far.",
        "dead_features": "Features that fired at none of the last dead_window_tokens training tokens.",
        "dead_fraction": "Dead features as a share of all.",
        "threshold": "BatchTopK's threshold at inference: a running mean of the smallest rank that fired.",
    },
    "4_weights": {
        "encoder_norm": "Norm of a feature's encoder in this layer, mean over features.",
        "decoder_norm": "Norm of a feature's decoder in this layer, mean over features.",
    },
    "5_gradients": {
        "gradient_norm": "Norm of the gradient of all weights together before clipping, mean over steps since the last row.",
        "gradient_clipped_share": "Share of the steps since the last row whose gradient was over the limit.",
        "encoder_gradient_norm": "Norm of the gradient of all encoders in this layer before clipping, in the row's last step.",
        "decoder_gradient_norm": "Norm of the gradient of all decoders in this layer before clipping, in the row's last step.",
    },
    "6_schedules": {
        "learning_rate": "Of the row's last step.",
        "coefficient_*": "The term's coefficient in the row's last step.",
        "k": "Features that fire, as TopK or BatchTopK take them in the row's last step.",
        "bandwidth": "Width of JumpReLU's pseudo-derivative in the row's last step.",
        "layer_mask_rate": "Probability with which a position's layer was masked for the encoder in the row's last step.",
    },
    "7_held_out": {
        "held_out_explained_variance": "Explained variance of positions that training does not see; all layers weigh the same.",
        "held_out_l0": "Features that fire at a held-out position, by the thresholds of inference.",
        "held_out_silent_features": "Features that fire at none of the held-out positions.",
        "held_out_median_norm": "Median |x| of the held-out positions, in the language model's units.",
        "held_out_median_error": "Median |x - x_hat| over median |x| of the held-out positions.",
        "held_out_norm_ratio": "Root of sum |x_hat|^2 / sum |x|^2 over the held-out positions; under 1 the reconstruction shrinks.",
        "held_out_best_scalar": "The factor that best maps x_hat to x on the held-out positions; over 1 the reconstruction shrinks.",
    },
    "8_counters": {
        "tokens": "Positions trained on so far.",
        "epoch": "The pass over the activations that the row's last step lies in, counted from 0.",
        "seconds": "Since this start of the run.",
        "tokens_per_second": "Since the last row.",
        "data_wait_share": "Share of the time since the last row that training waited for activations.",
        "peak_memory_gib": "The most GPU memory that tensors took so far.",
    },
}
"""By group and by the name in a row without `_by_layer`, what the number is; a `*` stands for the name of a term of the loss."""


class Curves:
    """Writes rows to the event files of a run; a tag's first point carries its description."""

    def __init__(self, writer: SummaryWriter, layers: list[str]) -> None:
        self.writer, self.layers = writer, layers
        self._described: set[str] = set()

    def add_row(self, row: Mapping[str, Any]) -> None:
        """A point for each number that is known. `step` is what the points lie over."""
        for name, value in row.items():
            if name == "step":
                continue
            group, description = place_of(name.removesuffix("_by_layer"))
            if not isinstance(value, list):
                self._add(_tag(group, name), value, description, row["step"])
                continue
            for layer, of_layer in zip(self.layers, value, strict=True):
                self._add(f"{_tag(group, name.removesuffix('_by_layer'))}/{layer}", of_layer, f"{description} {layer}.", row["step"])

    def add_histograms(self, histograms: Mapping[str, Tensor], step: int) -> None:
        """Of the values [F, L] of each name, a histogram a layer."""
        for name, values_FL in histograms.items():
            group, description = place_of(name)
            for layer, values_F in zip(self.layers, values_FL.T, strict=True):
                tag = f"{_tag(group, name)}_histogram/{layer}"
                # A fixed number of bins: numpy's "auto" asks for millions where one feature's norm is far from all others.
                summary = histogram(tag, values_F.float().cpu().numpy(), bins=64)  # type: ignore[no-untyped-call]
                self._write(summary, tag, f"Its values over features. {description} {layer}.", step)

    def _add(self, tag: str, value: float | None, description: str, step: int) -> None:
        if value is not None:
            summary = scalar(tag, torch.tensor(value))  # type: ignore[no-untyped-call]
            self._write(summary, tag, description, step)

    def _write(self, summary: Any, tag: str, description: str, step: int) -> None:
        if tag not in self._described:
            self._described.add(tag)
            metadata = summary.value[0].metadata
            metadata.summary_description = description
            metadata.plugin_data.plugin_name = "scalars" if summary.value[0].HasField("simple_value") else "histograms"
        assert self.writer.file_writer is not None, "rows are drawn before the log is closed"
        self.writer.file_writer.add_summary(summary, step)


def place_of(name: str) -> tuple[str, str]:
    """The group and the description of a name in a row. Raises `KeyError` for a number that nobody described."""
    for wanted in (name, f"{name.split('_')[0]}_*"):
        for group, descriptions in CURVES.items():
            if wanted in descriptions:
                return group, descriptions[wanted]
    raise KeyError(f"{name} has no description in {__name__}.CURVES; add one")


def _tag(group: str, name: str) -> str:
    """Without what the group says already: `1_loss/total`, `1_loss/auxk`, `7_held_out/l0`."""
    if name == "loss":
        return f"{group}/total"
    return f"{group}/{name.removeprefix('loss_').removeprefix('held_out_')}"
