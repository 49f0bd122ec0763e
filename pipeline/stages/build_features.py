"""features: what each feature of a trained crosscoder is, from one pass over held-out text; a feature store in the run directory.

    features/           the feature store, see `pipeline.features.store`
    features/parts/     what was gathered so far, in parts with a record each; gone when the store is whole

Stopped and started again the stage goes on behind the last whole part, and ends with the same bytes.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from pipeline import records
from pipeline.activations.outliers import OutlierLimits
from pipeline.config.build_features import FeaturesConfig
from pipeline.config.errors import UserError
from pipeline.config.sites import SiteName
from pipeline.config.token_limit import notices, short_of
from pipeline.contexts import Contexts
from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder
from pipeline.crosscoder.metrics import DENSE_FRACTION
from pipeline.evaluation.belonging import check_inputs, find_run
from pipeline.evaluation.held_out import HeldOut, Indices, check_measurable, draw, leading
from pipeline.evaluation.outliers import outlier_limits
from pipeline.features import store
from pipeline.features.best_firings import NUM_PLACES
from pipeline.features.firings import Firings, Kept
from pipeline.features.logit_lens import LogitLens
from pipeline.features.token_text import token_texts
from pipeline.language_models import Models, bind, each, identities, load_models
from pipeline.run import Run
from pipeline.text.tokenizer import load_transformers_tokenizer
from pipeline.tokens import TokenSet

PART_FORMAT = "feature-part/1"


def run(config: FeaturesConfig, run: Run) -> dict[str, Any]:
    """Runs the stage; gives where the store lies and the headline numbers."""
    models = load_models(config)
    trained = load_crosscoder(find_run(config.crosscoder), models.device)
    tokens = TokenSet.open(config.tokens)
    remarks = check_inputs(trained, models, tokens, config)
    if config.check_hashes:
        tokens.check_hashes(run)
    inputs = {"crosscoder": trained.identity, "tokens": tokens.data_id}
    for field, identity in inputs.items():
        run.bind_input(field, identity)
    bind(models, run)
    inputs |= identities(models)
    contexts = Contexts(tokens, config.context_tokens, beginning_of_text_id=trained.provenance.beginning_of_text_id)
    there = int(contexts.lengths.sum())
    for line in [*remarks, *notices(config.max_tokens, there, where=tokens.directory, unit="tokens")]:
        run.say(line)
    texts, remark = texts_of(config, tokens.vocab_size)
    if remark:
        run.say(remark)
    output = run.directory / "features"
    records.claim(output, {"stage": "features", "settings": config.identity(), "inputs": inputs})
    pass_ = _Pass(config, trained, models, contexts, run)
    firings = pass_.gathered(output / "parts")
    lenses = {name: LogitLens(model, tokens.vocab_size) for name, model in each(models).items()}
    for name, lens in lenses.items():
        if lens.unembedding_VD is None:
            run.say(f"{each(models)[name].name} has no unembedding that is one matrix: no promoted and suppressed tokens")
    lens_L = [lenses[SiteName.parse(layer).model] for layer in trained.layers]
    run.say("writing the feature store")
    record = store.write(output, firings, trained, lens_L, store.Reading(contexts, pass_.chosen, texts), config)
    manifest = store.seal(output, record, {**inputs, "layers": trained.layers, **pass_.facts(firings)})
    shutil.rmtree(output / "parts")
    result = headline(firings, record, manifest["data_id"], output)
    run.say(f"{result['features']:,} features over {result['positions']:,} positions, {result['contexts']:,} contexts kept: {output}")
    return result | short_of(config.max_tokens, there) | models.memory_used()


def headline(firings: Firings, record: records.Record, data_id: str, output: Path) -> dict[str, Any]:
    """The stage's result."""
    firings_F, positions = firings.driving.firings_F, firings.num_positions
    return {
        "output": str(output),
        "data_id": data_id,
        "features": record["features"],
        "positions": positions,
        "outliers": firings.num_outliers,
        "contexts": record["contexts"],
        "bytes": sum(described["bytes"] for described in record["files"].values()),
        "dead_eval_fraction": float((firings_F == 0).double().mean()),
        "dense_fraction": float((firings_F.double() / max(positions, 1) > DENSE_FRACTION).double().mean()),
    }


def texts_of(config: FeaturesConfig, vocab_size: int) -> tuple[list[str], str]:
    """The text of each token, by the tokenizer beside the language model, the first of several; and a sentence where it lacks some."""
    model = next(iter(config.models.values()))
    name = model.model
    try:
        tokenizer = load_transformers_tokenizer(name, model.revision)
    except UserError:
        return [f"<{number}>" for number in range(vocab_size)], f"{name} comes with no tokenizer: tokens are shown by their ids"
    missing = vocab_size - len(tokenizer)
    remark = f"the tokenizer beside {name} lacks {missing:,} of {vocab_size:,} ids: those are shown as numbers" if missing > 0 else ""
    return token_texts(tokenizer, vocab_size), remark


class _Pass:
    """The one pass over the text."""

    def __init__(self, config: FeaturesConfig, trained: TrainedCrosscoder, models: Models, contexts: Contexts, run: Run) -> None:
        self._config, self._trained, self._models, self._contexts, self._run = config, trained, models, contexts, run
        total = int(contexts.lengths.sum())
        (self._drawn,) = draw(contexts.lengths, [total if config.max_tokens is None else min(config.max_tokens, total)], config.seed)
        check_measurable(contexts, self._drawn, config.max_tokens)
        self.chosen: Indices = np.sort(self._drawn)
        if len(self.chosen) * contexts.context_tokens > NUM_PLACES:
            raise UserError(f"max_tokens is {config.max_tokens}, but a feature store numbers at most {NUM_PLACES:,} positions; allow fewer")

    def gathered(self, directory: Path) -> Firings:
        """All parts, made where they are missing, merged in their order."""
        limits: OutlierLimits | None = None
        length = max(1, self._config.part_tokens // self._config.context_tokens)
        starts = range(0, len(self.chosen), length)
        for number, start in enumerate(starts):
            if (directory / f"{number:06d}.json").exists():
                continue
            limits = limits or self._limits()
            self._write_part(directory, f"{number:06d}", range(start, min(start + length, len(self.chosen))), limits)
        self._run.report("read", len(self.chosen), len(self.chosen), unit="contexts", done=True)
        merged = self._firings()
        for number in range(len(starts)):
            record = records.read_shard(directory, f"{number:06d}", PART_FORMAT)
            records.check_hashes(directory, f"{number:06d}", record, self._run.check_stop)
            merged.merge(safetensors.torch.load_file(directory / f"{number:06d}.safetensors"), record["positions"], record["outliers"])
        return merged

    def facts(self, firings: Firings) -> records.Record:
        """What the manifest says of the pass."""
        return {
            "features": self._trained.num_features,
            "positions": firings.num_positions,
            "outliers": firings.num_outliers,
            "context_tokens": self._config.context_tokens,
            "window_tokens": self._config.window_tokens,
            "features_a_group": store.FEATURES_A_GROUP,
        }

    @torch.inference_mode()
    def _write_part(self, directory: Path, stem: str, part: range, limits: OutlierLimits) -> None:
        records.remove_leftovers(directory, stem)
        firings, first = self._firings(), part.start
        for batch in self._held_out(self.chosen[part.start : part.stop]).batches():
            self._run.check_stop()
            self._run.report("read", first, len(self.chosen), unit="contexts")
            acts_BSLD = self._models.activations(batch.tokens_BS, self._trained.layers)
            firings.add(acts_BSLD, batch.replaced_BS, first, limits)
            first += len(batch.tokens_BS)
        with records.atomic_file(directory / f"{stem}.safetensors") as file:
            file.write(safetensors.torch.save(firings.tensors()))
        facts = {"first": part.start, "contexts": len(part), "positions": firings.num_positions, "outliers": firings.num_outliers}
        records.commit_shard(directory, stem, PART_FORMAT, [f"{stem}.safetensors"], facts, {})

    def _firings(self) -> Firings:
        config = self._config
        kept = Kept(config.top_contexts, config.quantiles * config.contexts_per_quantile, config.window_tokens, config.window_after)
        return Firings(self._trained, kept, context_tokens=config.context_tokens, seed=config.seed)

    def _limits(self) -> OutlierLimits:
        few = self._held_out(leading(self._contexts, self._drawn))
        return outlier_limits(self._trained, self._models, few, self._config.outlier_norm_ratio, self._run)

    def _held_out(self, indices: Indices) -> HeldOut:
        excluded = self._trained.provenance.exclude_token_ids
        device = self._models.device
        return HeldOut(self._contexts, indices, batch_contexts=self._config.batch_contexts, device=device, exclude_token_ids=excluded)
