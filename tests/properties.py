"""The register of properties: what holds, which test searches for a counterexample, of which names.

`python -m tests.properties` prints it as a table. `test_properties.py` checks that every test in it
exists and is driven by Hypothesis, and that every public name has a property.
"""

# ruff: noqa: E501

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple


class Property(NamedTuple):
    """`test` is `file::function`; `functions` are names of `wmtp.__all__`."""

    name: str
    test: str
    functions: tuple[str, ...]


CE = ("mtp_ce_loss", "linear_mtp_ce_loss")
LOSS = ("weighted_mtp_loss", "linear_weighted_mtp_loss")
STATS = ("weighted_mtp_loss_and_stats", "linear_weighted_mtp_loss_and_stats", "MTPLossStats")
EVERY_LOSS = (*CE, *LOSS)
# The weightings that every property of a weighted loss is searched with.
WEIGHED = (*EVERY_LOSS, "RowLocalWeights")
NLL = ("token_nll", "linear_token_nll")
OF_CE = ("dft_weights", "focal_weights")
SCORED = ("softmax_weights", "top_k_weights", "exp_weights", "score_weights", "entropy_weights",
          "el2n_weights", *OF_CE)  # fmt: skip
CONTROLS = ("shuffled_weights", "random_matched_weights")
RUNNING = ("update_statistics", "WhiteningStatistics")
WATCHED = ("weight_statistics", "WeightStatistics")
CRITIC = ("td_deltas", "gae")
LOGIT_SCORES = ("target_probability", "predictive_entropy", "el2n")


def _here(test: str, name: str, *functions: str) -> Property:
    return Property(name, f"test_properties::test_{test}", functions)


def _in(file: str, test: str, name: str, *functions: str) -> Property:
    return Property(name, f"test_{file}::test_{test}", functions)


# fmt: off
PROPERTIES: tuple[Property, ...] = (
    # targets and the index law
    _in("targets", "index_law", "index law", "mtp_targets"),
    _in("targets", "an_int_means_one_to_heads", "offsets: an int is 1 to heads", "mtp_targets"),
    _in("targets", "documents_and_padding_follow_the_oracle", "documents and padding, by loops", "mtp_targets"),
    _in("targets", "packed_equals_separate_documents", "packing: targets", "mtp_targets"),
    _in("targets", "left_and_right_padding_equal_no_padding", "padding: targets", "mtp_targets"),
    _in("targets", "targets_do_not_depend_on_the_layout", "layout: targets", "mtp_targets"),
    _in("targets", "alignment_follows_the_index_law", "index law of weights", "align_to_heads"),
    _in("targets", "the_gradient_of_an_alignment_counts_the_heads_that_look", "alignment: gradient", "align_to_heads"),
    _here("targets_are_the_aligned_labels", "targets are the aligned labels", "mtp_targets", "align_to_heads"),
    # against plain loops
    _in("cross_entropy", "values_follow_the_oracle", "cross entropy, by loops: values", "mtp_ce_loss"),
    _in("cross_entropy", "a_non_uniform_upstream_gradient_is_honoured", "cross entropy, by loops: gradient", "mtp_ce_loss"),
    _in("linear_cross_entropy", "values_and_every_gradient_follow_the_oracle", "linear cross entropy, by loops", "linear_mtp_ce_loss"),
    _in("loss", "loss_and_every_gradient_follow_the_oracle", "loss and gradients, by loops", *LOSS),
    _in("row_local", "dense_and_linear_follow_plain_loops", "row-local weights, by loops", *LOSS, "RowLocalWeights"),
    _in("loss", "statistics_follow_the_oracle", "statistics of the loss, by loops", *STATS),
    _in("denominators", "the_weighted_mean_follows_the_oracle", "weighted mean, by loops", "weighted_mean"),
    _in("cross_entropy", "token_nll_follows_the_oracle", "likelihood of tokens, by loops", "token_nll"),
    _in("linear_cross_entropy", "token_nll_follows_the_oracle", "linear likelihood of tokens, by loops", "linear_token_nll"),
    _in("cross_entropy", "one_head_equals_torchs_cross_entropy", "one head is F.cross_entropy", "mtp_ce_loss"),
    _in("loss", "one_head_with_unit_weights_equals_torchs_cross_entropy", "unit weights are F.cross_entropy", *LOSS),
    # order and symmetry
    _here("renaming_the_vocabulary_renames_the_gradient", "vocabulary permutation", *WEIGHED),
    _here("permuting_the_batch_permutes_the_gradient", "batch equivariance", *WEIGHED),
    _here("permuting_the_positions_permutes_the_gradient", "position equivariance", *WEIGHED),
    _here("permuting_the_heads_permutes_the_gradient", "head equivariance", *WEIGHED),
    _here("only_the_set_of_predictions_matters", "predictions are a set", *WEIGHED),
    _here("a_constant_added_to_a_row_of_logits_changes_no_gradient", "logits shift", *WEIGHED),
    _here("impossible_words_change_nothing", "padded vocabulary", *WEIGHED),
    _here("a_change_of_basis_of_the_hidden_space_turns_the_gradient", "change of basis", "linear_mtp_ce_loss", "linear_weighted_mtp_loss"),
    # additivity
    _here("any_partition_of_the_predictions_adds_up", "any partition adds up", *WEIGHED, *STATS),
    _in("loss", "a_split_batch_with_an_external_normalizer_equals_the_whole", "split batch, external normaliser", *LOSS),
    _here("heads_add_up", "heads add up", *WEIGHED),
    _in("loss", "a_duplicated_head_equals_its_doubled_head_weight", "duplicated head", *LOSS),
    _in("loss", "an_integer_weight_equals_repeating_the_token", "integer weight is repetition", *LOSS),
    _here("a_batch_seen_twice_has_the_same_mean", "repeated batch", *WEIGHED),
    _here("gradients_are_linear_in_the_upstream_gradient", "linear in the upstream gradient", *WEIGHED),
    _here("the_loss_is_linear_in_the_weights", "linear in the weights", *LOSS),
    _here("the_loss_is_linear_in_the_head_weights", "linear in the head weights", *LOSS),
    _here("smoothing_and_z_loss_are_terms_of_a_sum", "affine in smoothing and z-loss", *WEIGHED),
    # denominators
    _here("a_normalizer_is_only_its_number", "normaliser is its number", *LOSS, *STATS),
    _in("loss", "scaling_the_weights_changes_nothing", "scale of the weights", *LOSS),
    _in("loss", "unit_weights_give_the_mean_over_all_valid_predictions", "unit weights are the mean", *LOSS),
    _here("the_loss_is_made_of_its_statistics", "loss from its statistics", *LOSS, *STATS),
    _here("weights_and_their_gradient_are_orthogonal_or_make_the_loss", "Euler's law of the weights", *LOSS),
    _here("the_three_reductions_are_of_the_same_values", "reductions agree", *CE),
    _here("the_loss_is_the_weighted_mean_of_the_cross_entropy", "loss is a weighted mean", *EVERY_LOSS, "weighted_mean"),
    _in("loss", "weight_zero_equals_an_ignored_label", "weight 0 is an ignored label", *LOSS),
    _in("loss", "all_weights_zero_give_zero_and_finite_gradients", "all weights 0", *LOSS),
    _in("loss", "nothing_valid_gives_zero_and_zero_gradients", "nothing valid: losses", *LOSS, *STATS),
    _in("cross_entropy", "nothing_valid_gives_zero_and_zero_gradients", "nothing valid: cross entropy", "mtp_ce_loss"),
    _in("linear_cross_entropy", "nothing_valid_gives_zero_and_zero_gradients", "nothing valid: linear cross entropy", "linear_mtp_ce_loss"),
    # two ways to say the same
    _here("a_head_does_not_know_the_others", "offsets sets", *CE),
    _here("offsets_further_on_are_labels_moved_here", "offsets and moved labels", *LOSS),
    _in("loss", "unshifted_labels_equal_the_targets_made_from_them", "2-D labels equal 3-D labels", *LOSS, "mtp_targets"),
    _in("loss", "pre_shifted_labels_and_weights_take_offsets_from_zero", "pre-shifted labels", *LOSS),
    _in("loss", "token_weights_equal_the_aligned_ones", "token weights equal aligned ones", *LOSS, "align_to_heads"),
    _in("loss", "a_weight_function_sees_the_plain_detached_cross_entropy", "weight function sees plain CE", *LOSS),
    _here("the_ignore_index_may_be_any_number", "any ignore index", *WEIGHED),
    _here("a_softcap_is_a_bound_put_on_the_logits", "softcap by hand", *WEIGHED),
    _here("dense_and_linear_agree_in_loss_statistics_and_every_gradient", "dense equals linear", *WEIGHED, *STATS),
    _here("no_slab_changes_loss_statistics_or_gradient_of_any_weighting", "slab size", *WEIGHED, *STATS),
    _in("loss", "statistics_do_not_change_the_gradient", "statistics change no gradient", *LOSS, *STATS),
    # gradients
    _here("gradients_sum_to_zero_over_the_vocabulary", "softmax gradient rows sum to 0", *WEIGHED),
    _here("hidden_states_and_unembedding_have_the_same_share_in_the_logits", "Euler's law of the product", "linear_mtp_ce_loss", "linear_weighted_mtp_loss"),
    _here("a_prediction_depends_on_its_own_logits_only", "predictions are independent", *CE),
    _in("loss_autograd", "every_subset_of_linear_inputs_that_require_grad", "subsets of gradients: linear", "linear_weighted_mtp_loss"),
    _in("loss_autograd", "every_subset_of_dense_inputs_that_require_grad", "subsets of gradients: dense", "weighted_mtp_loss"),
    _in("loss_autograd", "backward_twice_gives_the_same", "backward twice", *LOSS),
    _in("loss_autograd", "inputs_are_never_written_to", "inputs are not written to", *LOSS),
    _in("loss_autograd", "the_layout_does_not_matter", "layout: losses", *LOSS),
    _here("the_layout_of_the_upstream_gradient_does_not_matter", "layout: upstream gradient", *CE),
    # leaks
    _in("cross_entropy", "mask_equals_removal", "mask equals removal", "mtp_ce_loss"),
    _in("cross_entropy", "junk_at_ignored_places_changes_neither_loss_nor_gradient", "junk in ignored rows: cross entropy", "mtp_ce_loss"),
    _in("linear_cross_entropy", "junk_in_ignored_hidden_rows_changes_neither_loss_nor_gradient", "junk in ignored rows: linear cross entropy", "linear_mtp_ce_loss"),
    _in("cross_entropy", "a_junk_upstream_gradient_at_ignored_places_goes_nowhere", "junk upstream: dense", "mtp_ce_loss"),
    _in("linear_cross_entropy", "a_junk_upstream_gradient_at_ignored_places_goes_nowhere", "junk upstream: linear", "linear_mtp_ce_loss"),
    _in("loss", "junk_at_ignored_places_changes_neither_loss_nor_gradient", "junk in ignored rows: losses", *LOSS),
    _in("denominators", "the_weighted_mean_never_reads_invalid_places", "junk: weighted mean", "weighted_mean"),
    _in("loss", "packed_equals_separate_documents", "packing: losses", *LOSS),
    _in("loss", "left_and_right_padding_equal_no_padding", "padding: losses", *LOSS),
    # likelihoods and scores
    _here("the_likelihood_of_a_prefix_does_not_know_what_follows", "likelihood of a prefix", *NLL, *CE),
    _here("scores_of_the_logits_are_told_by_the_cross_entropy_of_every_word", "scores from cross entropies", *LOGIT_SCORES),
    _in("scores", "scores_of_the_logits_follow_the_oracle", "scores of the logits, by loops", *LOGIT_SCORES),
    _in("scores", "scores_of_the_logits_never_read_ignored_rows", "junk: scores of the logits", *LOGIT_SCORES),
    _in("scores", "excess_loss_follows_the_oracle", "excess loss, by loops", "excess_loss"),
    _in("scores", "deltas_follow_the_oracle", "deltas, by loops", "td_deltas"),
    _in("scores", "advantages_follow_the_oracle", "advantages, by loops", "gae"),
    _in("scores", "deltas_telescope", "deltas telescope", "td_deltas"),
    _in("scores", "advantages_at_lambda_zero_are_deltas", "λ = 0", *CRITIC),
    _here("the_level_of_a_critic_has_no_deltas", "level of a critic", *CRITIC),
    _here("deltas_advantages_and_returns_are_linear", "linear in values and rewards", *CRITIC, "lambda_returns"),
    _in("critic", "returns_are_advantages_plus_the_value_they_started_from", "returns are advantages and values", "lambda_returns", "gae"),
    _here("advantages_know_neither_level_nor_unit_of_a_reward", "level and unit of a reward", "group_advantages"),
    _here("a_ranking_knows_differences_only", "ranking by differences", "pairwise_ranking_loss"),
    _here("a_value_loss_mirrors", "value loss mirrors", "value_loss"),
    _in("critic", "value_loss_and_gradient_follow_the_oracle", "value loss, by loops", "value_loss"),
    _in("critic", "ranking_loss_and_gradients_follow_the_oracle", "ranking, by loops", "pairwise_ranking_loss"),
    # weights
    _here("weights_follow_their_tokens", "weights follow their tokens", *SCORED, "normalize_weights", "rho1_weights"),
    _here("weights_rise_with_their_scores", "weights rise with scores", *SCORED, "normalize_weights", "rho1_weights"),
    _in("weights", "weights_have_mean_one_and_never_read_invalid_places", "mean one, junk", *SCORED, "combine_weights"),
    _in("weights", "weights_are_detached_new_and_blind_to_layout", "weights are detached", *SCORED, "combine_weights"),
    _in("weights", "whitened_weights_ignore_scale_and_shift", "whitening ignores scale and shift", "exp_weights"),
    _in("weights", "top_k_counts_are_exact_under_ties", "top-k counts", "top_k_weights"),
    _here("weights_of_a_probability_are_weights_of_its_cross_entropy", "probabilities and cross entropies", *OF_CE, "normalize_weights", "target_probability"),
    _here("rho1_knows_the_excess_only", "Rho-1 by the excess", "rho1_weights", "excess_loss", "top_k_weights"),
    _here("the_level_of_a_critic_has_no_weight_and_its_unit_none_when_whitened", "level and unit of a critic", "critic_delta_weights"),
    _here("the_order_of_combined_weights_does_not_matter", "order of members", "combine_weights"),
    _here("the_names_of_spans_do_not_matter", "names of spans", "span_weights"),
    _here("sequences_keep_their_weight_in_any_order_and_group_name", "names of groups", "group_relative_weights"),
    _in("normalize", "clip_and_mean_one_both_hold", "clip and mean one", "normalize_weights"),
    _in("normalize", "min_ess_holds", "effective sample size", "normalize_weights"),
    _in("normalize", "the_scale_of_the_weights_does_not_matter", "scale before normalising", "normalize_weights"),
    _in("controls", "shuffled_weights_keep_the_multiset_of_every_sequence_and_head", "multiset of a shuffle", "shuffled_weights"),
    _in("controls", "random_matched_weights_come_from_their_own_sequence_and_head", "support of a draw", "random_matched_weights"),
    _in("controls", "invalid_places_take_no_part", "controls and invalid places", *CONTROLS),
    # watching
    _in("weights", "whitening_statistics_over_splits_equal_the_whole", "whitening over splits", *RUNNING),
    _here("running_statistics_know_no_order_and_follow_unit_and_level", "whitening: order, unit, level", *RUNNING),
    _in("statistics", "statistics_follow_the_oracle", "weight statistics, by loops", *WATCHED),
    _in("statistics", "statistics_never_read_invalid_places", "junk: weight statistics", *WATCHED),
    _here("the_scale_of_the_weights_shows_in_levels_and_not_in_shares", "scale in the statistics", *WATCHED),
    _here("weights_seen_twice_have_the_same_levels", "repetition in the statistics", *WATCHED),
    _here("shuffling_changes_no_statistic", "shuffles in the statistics", *WATCHED, "shuffled_weights"),
    _here("the_gate_refuses_what_the_statistics_show", "gate and statistics", "check_weights", "weight_statistics"),
    # modules
    _here("modules_treat_every_position_alike", "modules and positions", "MTPHeads", "ValueHead"),
    _in("nn", "every_head_starts_as_the_trunk", "heads start as the trunk", "MTPHeads"),
    _here("a_loss_module_has_the_gradients_of_its_function", "modules are their functions", "WeightedMTPLoss", "LinearWeightedMTPLoss", "nn"),
)
# fmt: on


def searched_tests() -> set[str]:
    """`file::function` of every test here that `@given` drives, read from the source."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            called = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
            if any(isinstance(f, ast.Name) and f.id == "given" for f in called):
                found.add(f"{path.stem}::{node.name}")
    return found


def table() -> str:
    """Markdown, in the order of the flow."""
    lines = ["| property | test | of |", "|---|---|---|"]
    for entry in PROPERTIES:
        lines.append(f"| {entry.name} | `{entry.test}` | {', '.join(entry.functions)} |")
    return "\n".join([*lines, "", f"{len(PROPERTIES)} properties"])


if __name__ == "__main__":
    print(table())
