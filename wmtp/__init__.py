"""Weighted multi-token prediction losses: pure functions of tensors.

    labels ─▶ targets ─┐                     signals ─▶ scores ─▶ weights ─┐
                       ├─▶ cross entropy of every head at every position ──┼─▶ loss
    logits, or hidden states + unembedding ─┘                              ┘

This page is the list of the public names, in the order of that flow; modules are in ``wmtp.nn``.
"""

from wmtp import nn as nn
from wmtp.combine import combine_weights as combine_weights
from wmtp.controls import random_matched_weights as random_matched_weights
from wmtp.controls import shuffled_weights as shuffled_weights
from wmtp.critic import lambda_returns as lambda_returns
from wmtp.critic import pairwise_ranking_loss as pairwise_ranking_loss
from wmtp.critic import value_loss as value_loss
from wmtp.cross_entropy import mtp_ce_loss as mtp_ce_loss
from wmtp.cross_entropy import token_nll as token_nll
from wmtp.denominators import weighted_mean as weighted_mean
from wmtp.linear_cross_entropy import linear_mtp_ce_loss as linear_mtp_ce_loss
from wmtp.linear_cross_entropy import linear_token_nll as linear_token_nll
from wmtp.loss import MTPLossStats as MTPLossStats
from wmtp.loss import linear_weighted_mtp_loss as linear_weighted_mtp_loss
from wmtp.loss import linear_weighted_mtp_loss_and_stats as linear_weighted_mtp_loss_and_stats
from wmtp.loss import weighted_mtp_loss as weighted_mtp_loss
from wmtp.loss import weighted_mtp_loss_and_stats as weighted_mtp_loss_and_stats
from wmtp.methods import critic_delta_weights as critic_delta_weights
from wmtp.methods import dft_weights as dft_weights
from wmtp.methods import el2n_weights as el2n_weights
from wmtp.methods import entropy_weights as entropy_weights
from wmtp.methods import focal_weights as focal_weights
from wmtp.methods import group_relative_weights as group_relative_weights
from wmtp.methods import rho1_weights as rho1_weights
from wmtp.nn import LinearWeightedMTPLoss as LinearWeightedMTPLoss
from wmtp.nn import MTPHeads as MTPHeads
from wmtp.nn import ValueHead as ValueHead
from wmtp.nn import WeightedMTPLoss as WeightedMTPLoss
from wmtp.normalize import normalize_weights as normalize_weights
from wmtp.row_local import RowLocalWeights as RowLocalWeights
from wmtp.scores import el2n as el2n
from wmtp.scores import excess_loss as excess_loss
from wmtp.scores import gae as gae
from wmtp.scores import group_advantages as group_advantages
from wmtp.scores import predictive_entropy as predictive_entropy
from wmtp.scores import target_probability as target_probability
from wmtp.scores import td_deltas as td_deltas
from wmtp.statistics import WeightStatistics as WeightStatistics
from wmtp.statistics import check_weights as check_weights
from wmtp.statistics import weight_statistics as weight_statistics
from wmtp.targets import align_to_heads as align_to_heads
from wmtp.targets import mtp_targets as mtp_targets
from wmtp.weights import exp_weights as exp_weights
from wmtp.weights import score_weights as score_weights
from wmtp.weights import softmax_weights as softmax_weights
from wmtp.weights import span_weights as span_weights
from wmtp.weights import top_k_weights as top_k_weights
from wmtp.whitening import WhiteningStatistics as WhiteningStatistics
from wmtp.whitening import update_statistics as update_statistics


__version__ = "0.1.0"

__all__ = [
    # targets
    "align_to_heads",
    "mtp_targets",
    # cross entropy
    "mtp_ce_loss",
    "linear_mtp_ce_loss",
    "token_nll",
    "linear_token_nll",
    # scores
    "excess_loss",
    "td_deltas",
    "gae",
    "group_advantages",
    "target_probability",
    "predictive_entropy",
    "el2n",
    # weights
    "normalize_weights",
    "softmax_weights",
    "top_k_weights",
    "exp_weights",
    "rho1_weights",
    "critic_delta_weights",
    "dft_weights",
    "focal_weights",
    "entropy_weights",
    "el2n_weights",
    "group_relative_weights",
    "RowLocalWeights",
    "score_weights",
    "span_weights",
    "combine_weights",
    "shuffled_weights",
    "random_matched_weights",
    "WhiteningStatistics",
    "update_statistics",
    # loss
    "weighted_mtp_loss",
    "linear_weighted_mtp_loss",
    "weighted_mtp_loss_and_stats",
    "linear_weighted_mtp_loss_and_stats",
    "weighted_mean",
    "MTPLossStats",
    # critic
    "lambda_returns",
    "value_loss",
    "pairwise_ranking_loss",
    # watching
    "weight_statistics",
    "check_weights",
    "WeightStatistics",
    # modules
    "nn",
    "MTPHeads",
    "ValueHead",
    "WeightedMTPLoss",
    "LinearWeightedMTPLoss",
]
