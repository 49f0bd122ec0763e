"""What every number of an evaluation is, in words; `metrics.json` carries them.

x is the raw activation of a position at a layer, x_hat what stands in for it, e = x - x_hat.
"""

from pipeline.crosscoder.metrics import DENSE_FRACTION
from pipeline.evaluation.baselines import RIDGE
from pipeline.evaluation.model_diffing import ABSENT_FROM_ERROR, ABSENT_FROM_RECONSTRUCTION, ONLY, SHARED_FROM, SHARED_TO
from pipeline.evaluation.outliers import FEW

_PER_CENT = f"{100 * FEW:g} %"

DEFINITIONS = {
    # -- what is measured
    "contexts": "held-out contexts that the language model reads",
    "tokens": "ids in them, separators counted",
    "positions": "held-out positions that are encoded and replaced: all but position 0 of each context, padding and outliers; "
    "separators count",
    "predictions": "next-token predictions made at replaced positions; the first token of a document is not predicted from the one before",
    "outliers": "positions whose norm is over `norm_limit` in any of the crosscoder's layers. They are left out of every figure but those "
    "named `with_outliers`, of what baselines are fitted on and of what is counted as firing; like position 0 they are never replaced, "
    "and no prediction made at them counts",
    "excluded_positions": "positions of tokens that training left out (`exclude_token_ids`): in no figure, never replaced",
    "norm_limit": "norm at this layer above which a position is an outlier: that of the training where the crosscoder has one "
    "(`limits_from`: training), else `outlier_norm_ratio` times the median over the leading held-out contexts (held_out)",
    "share_of_squared_norm": "share of the outliers in the sum of |x|^2 over all positions, themselves included",
    "share_of_variance": "share of the outliers in the sum of |x - mean|^2, mean and sum over all positions, themselves included",
    "share_of_few": f"share in the sum of |x - mean|^2, outliers left out, of the {_PER_CENT} of the positions that are farthest from the "
    "mean; good to 0.1 %",
    "step": "training steps behind the checkpoint",
    "tokens_trained": "training positions behind the checkpoint",
    # -- sparsity
    "num_features": "size of the dictionary; `dead_fraction` and the like are shares of it",
    "l0": "mean number of features with f > 0 at a position, with the inference activation function (TopK, BatchTopK: their threshold)",
    "l0_as_trained": "the same with TopK and BatchTopK taken over groups of as many held-out positions as a training batch has; null "
    "for others",
    "dead_window_tokens": "training positions without firing after which a feature is dead",
    "dead": "features that did not fire in the last `dead_window_tokens` training tokens",
    "dead_eval": "features that fire on no held-out position",
    "dense": f"features that fire on over {100 * DENSE_FRACTION:.0f} % of the held-out positions",
    # -- reconstruction
    "explained_variance": "1 - sum |e|^2 / sum |x - mean|^2, both sums and the mean over all held-out positions that are no outliers",
    "explained_variance_with_outliers": "the same with sums and mean over all positions, outliers included",
    "fraction_unexplained": "1 - explained_variance",
    "explained_variance_legacy": "mean over positions of 1 - |e|^2 / |x - mean|^2; a position with x = mean is left out",
    "explained_variance_of_residual": "1 - sum |e - mean e|^2 / sum |x - mean|^2: a constant error costs nothing",
    "explained_norm": "1 - sum |e|^2 / sum |x|^2: against predicting zero instead of the mean",
    "best_scalar": "the a for which sum |x - a x_hat|^2 is least: above 1, the reconstruction is shrunk",
    "norm_ratio": "sqrt(sum |x_hat|^2 / sum |x|^2)",
    "median_error": "median |e| / median |x|, each median over positions and good to 0.05 %",
    "mean_squared_error": "mean over positions of |e|^2",
    "joint": "all layers side by side, each divided by sqrt(sum |x - mean|^2), its held-out spread without outliers, so that crosscoders "
    "of different normalization compare. Every layer then has the same share in the denominator of explained_variance, which "
    "is therefore the mean of the layers' own; what is a ratio by position, a median, or of outliers or |x|^2 differs from it",
    "mean_over_layers": "mean of the layers' own values; of replaced activations, the mean over layers of each replaced alone",
    # -- cross-entropy
    "clean_cross_entropy": "cross_entropy of the unchanged model; of several models their mean, beside each one's own. A site is replaced "
    "in the model that it is of, and what is compared with the clean run is that model's",
    "cross_entropy": "mean of -log p(next token) in nats over the counted predictions; head and softmax in float32 whatever the model's "
    "dtype",
    "float32_head": "whether the model's head could be computed in float32; else its logits were taken in its own precision",
    "difference": "cross_entropy minus the clean model's, in nats",
    "kl": "mean over the counted predictions of KL(clean model || changed model), in nats, from the same float32 logits",
    "recovered_against_zero": "(cross-entropy with zeros - cross_entropy) / (cross-entropy with zeros - clean), same layer and "
    "positions replaced",
    "recovered_against_mean": "the same against mean ablation: the held-out mean in place of zeros",
    "split": "positions are divided at random (by `seed`) into as many parts as there are layers, and each part is replaced at a layer of "
    "its own: one run in which every layer's replacement counts. Replacing all layers at every position would hide all but the last. "
    "Of several models (`chat/split`) each one's positions are divided among its own layers",
    # -- what stands in
    "crosscoder": "a layer's activations replaced by their reconstructions, from one encode of all layers of the clean run",
    "dense_path": "the crosscoder's dense path and bias alone, every feature at zero",
    "compared": "another trained crosscoder (`source`), encoded from its own layers, on the same positions; one whose groups each read "
    "and write a single layer is a sparse autoencoder for each, whose L0 is counted over all of them",
    "mean": "the layer's mean over the held-out positions in place of its activations",
    "zero": "zeros in place of a layer's activations",
    "affine": "x_hat = W x_m + b from another layer m (`source`): least squares on the fitting rows with a ridge of "
    f"{RIDGE:g} times the mean variance of a dimension; m is the layer that explains most there",
    "affine_all": "the same from all other layers side by side",
    "other_layer": "another layer's activation of the clean run taken as it is: the layer that explains most on the fitting rows",
    "other_layer_matched": "mean_l + (x_m - mean_m) * sqrt(sum |x_l - mean_l|^2 / sum |x_m - mean_m|^2) for layer m in place of layer l, "
    "means and sums over the fitting rows; the layer that explains most there",
    "pca": "projection on the mean and as many principal directions of the layer, on the fitting rows, as the crosscoder's L0",
    "pca_joint": "the same of all layers side by side, each divided by the root of its spread: as many directions for all together",
    "random_dictionary": "as many random unit vectors over all layers (each divided by the root of its spread) as the crosscoder has "
    "features; the encoder is the decoder's transpose, one threshold gives the crosscoder's L0 on a sample of the fitting rows, and "
    "a factor and an offset a layer are the least-squares ones there",
    "strongest_baseline": "at each layer the baseline that explains most on the fitting rows; mean, zero and compared runs aside",
    "fit_positions": "positions that the baselines were fitted on, outliers left out",
    "fit_sample": "the first of them, on which L0 is matched and the random dictionary fitted",
    "fit_l0": "the crosscoder's L0 on that sample",
    "pca_rank": "its nearest whole number, the rank of pca and pca_joint (at most the width that they stand for)",
    "fitted": "explained variance of a baseline on the rows that it was fitted on",
    "pca_rank_needed": "the least rank at which the layer's principal directions explain as much on the fitting rows as the crosscoder "
    "on the held-out ones",
    "forward_passes": "runs of the language model a batch",
    # -- at other L0s
    "threshold_factor": "what the crosscoder's thresholds are multiplied by, all else as it is; 1 is the crosscoder as it was trained. "
    "L0 and explained variance of each point are of the same held-out positions. There is no other factor where there are no thresholds "
    "(ReLU, gated)",
    # -- what drives features
    "features": "features that fire on the held-out text and that some layer drives; in model_diffing those of the class",
    "fraction": "of a class, its share of the features that fire on the held-out text and write in either model",
    "drop": "share of a feature's activation, summed over its firings, that goes when this layer's mean stands in place of its activation "
    "in the encoder (what fires no more has lost all); mean over features",
    "survives_alone": "share of a feature's firings that are left when only this layer is encoded, the others' means standing in place of "
    "theirs; mean over features",
    "layers_driving": "number of layers that drive a feature: exp of the entropy of its drops over layers (negative ones taken as 0), "
    "from 1 to the number of layers; mean over features",
    "layers_driving_quantiles": "the same: the values below which so many per cent of the features lie",
    "functional_coherence": "(layers_driving - 1) / (number of layers - 1), mean over features; after the idea of Demou et al. 2026 "
    "(arXiv 2605.09438), the formula being this project's own; null for one layer",
    # -- model diffing
    "norm_difference": "(1 + (|d_2| - |d_1|) / max(|d_1|, |d_2|)) / 2 for a feature's decoders d at all sites of the first and of the "
    "second of two models, in the crosscoder's units: 0 where it writes in the first alone, 1 in the second alone (Minder et al. 2025, "
    "arXiv 2504.02922)",
    "model_diffing": "features that fire on the held-out text and write in either of two models, by class: only_<model> (norm_difference "
    f"up to {ONLY:g}, or from {1 - ONLY:g}), shared ({SHARED_FROM:g} to {SHARED_TO:g}), between",
    "beta_error": "the factor b for which sum |y - b f d|^2 is least, f being the feature's activation, d its decoder in the model where "
    "it is stronger, and y = x - x_hat + f d_model, what a model's reconstruction lacks without the feature; in the crosscoder's units, "
    "at the sites that both models have",
    "beta_reconstruction": "the same with y = x_hat",
    "nu_error": "beta_error of the model where the feature is weaker over that of the other: about 0 where the first lacks it (Minder et "
    "al. 2025); of a class, the median over its features",
    "nu_reconstruction": "the same of beta_reconstruction: near 1 where other features write it there",
    "absent": f"features of a class with nu_error below {ABSENT_FROM_ERROR:g} and nu_reconstruction below {ABSENT_FROM_RECONSTRUCTION:g}",
    "layers_by_decoder_norm": "exp of the entropy of a feature's decoder norms over layers, in the crosscoder's units; mean over features: "
    "what decoder norms alone would say",
}
"""Every name in `metrics.json`."""
