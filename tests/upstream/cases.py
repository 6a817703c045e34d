"""Bugs that peers had, and the test that shows what becomes of each here.

    python tests/upstream/cases.py      writes docs/upstream-cases.md

A row: references, what went wrong, and the tests ("path::name", from tests/), or in words why there is none.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "upstream-cases.md"

HERE = "upstream/test_graph_rewriting.py::test_"
LIVE = "runtime/test_live_weights.py::test_"
PLAN = "passes/weights/test_plan.py::test_"
SCALES = "runtime/layouts/test_scales.py::test_"
FP8 = "runtime/layouts/test_fp8_sources.py::test_"
OPS = "runtime/ops/"
LOAD = "runtime/test_load.py::test_"
CONVERT = "runtime/test_convert.py::test_"
CHECKPOINTS = "upstream/test_checkpoints.py::test_"
RUNNING = "upstream/test_models.py::test_"
KERNELS = "runtime/ops/test_interpreter.py::test_every_kernel_is_its_reference_under_the_interpreter"
FORMULAS = "runtime/layouts/test_formulas.py::test_"

Row = tuple[str, str, str]

GRAPHS: tuple[Row, ...] = (
    (
        "pytorch#99686",
        "split and cat removed though the order differed",
        HERE + "pytorch_99686_a_permuted_cat_is_no_identity",
    ),
    (
        "pytorch#122379",
        "partial and repeated parts of a split",
        HERE + "pytorch_122379_some_parts_of_a_split_and_one_twice",
    ),
    ("pytorch#197080", "a split that does not divide", HERE + "pytorch_197080_a_split_that_does_not_divide"),
    (
        "pytorch#178676",
        "reshape(-1) in a split-cat chain",
        HERE + "pytorch_178676_a_size_of_minus_one_in_a_chain_of_varying_length",
    ),
    (
        "pytorch#174361",
        "a number of the pattern ignored, the scale of attention",
        HERE
        + "pytorch_174361_the_scale_of_attention_is_kept"
        + " "
        + HERE
        + "pytorch_174361_the_scale_of_one_query_is_kept"
        + " "
        + HERE
        + "pytorch_174361_no_number_of_a_formula_is_ignored",
    ),
    (
        "pytorch#111190",
        "no match under dynamic shapes",
        HERE
        + "pytorch_111190_as_many_matches_with_varying_sizes"
        + " "
        + HERE
        + "pytorch_111190_idioms_match_with_varying_sizes_as_with_fixed_ones",
    ),
    (
        "pytorch#136329",
        "another pass came first",
        HERE + "pytorch_136329_products_and_sums_match_in_any_order_of_passes",
    ),
    (
        "pytorch#101124, #130584",
        "a match across a mutation",
        HERE + "pytorch_101124_a_write_between_two_linears_parts_them",
    ),
    (
        "pytorch#132932",
        "a mutating replacement, then a second pass",
        HERE
        + "pytorch_132932_a_write_that_a_pass_puts_in_is_seen_by_the_next"
        + " "
        + HERE
        + "pytorch_132932_a_second_run_sees_the_writes_of_the_first",
    ),
    (
        "torch 2.13 setitem",
        "setitem is not seen as a mutation",
        HERE + "pytorch_101124_a_write_between_two_linears_parts_them",
    ),
    ("pytorch#159613", "cat of cat gives an invalid graph", HERE + "pytorch_159613_a_cat_of_cats"),
    (
        "onnxscript#2880",
        "a match that differs from run to run",
        HERE
        + "onnxscript_2880_a_hundred_runs_give_one_graph"
        + " "
        + HERE
        + "onnxscript_2880_processes_with_other_hashes_give_one_graph",
    ),
    (
        "onnxscript#2841",
        "negative literals fused",
        HERE
        + "onnxscript_2841_signs_of_literals"
        + " "
        + HERE
        + "onnxscript_2841_negative_padding_in_front_of_a_convolution",
    ),
    (
        "onnxscript#2402",
        "partial rotary",
        HERE
        + "onnxscript_2402_rotation_is_found_whole_and_partial"
        + " "
        + HERE
        + "onnxscript_2402_a_rotation_of_a_quarter",
    ),
    (
        "vllm#48671",
        "head geometry of the first layer taken for all",
        HERE
        + "vllm_48671_attention_of_one_width_and_different_heads_each_by_its_own"
        + " "
        + HERE
        + "vllm_48671_two_layers_of_different_heads_each_by_its_own",
    ),
    (
        "vllm#48330",
        "a norm of mixed dtypes matched",
        HERE
        + "vllm_48330_a_norm_in_two_dtypes_keeps_its_arithmetic"
        + " "
        + HERE
        + "vllm_48330_a_sum_and_its_norm_in_several_dtypes",
    ),
    (
        "vllm#41972",
        "a fresh buffer read before it was written",
        HERE
        + "vllm_41972_a_norm_without_a_residual_is_given_none"
        + " "
        + OPS
        + "test_interpreter.py::test_every_kernel_is_its_reference_under_the_interpreter",
    ),
    ("Liger#74", "RMSNorm without the 1.0", HERE + "liger_74_a_weight_of_zero_passes_the_signal"),
    (
        "NeMo-Automodel#2484",
        "A_log must stay fp32",
        CHECKPOINTS + "nemo_automodel_2484_what_is_float32_in_a_bfloat16_file_stays_so",
    ),
    (
        "vllm#41457",
        "uniform quantisation judged across layers",
        CHECKPOINTS + "vllm_41457_layers_are_quantised_each_for_itself",
    ),
    (
        "vllm#47445",
        "bf16 in_proj_ba taken for FP8",
        CHECKPOINTS
        + "vllm_47445_and_prime_rl_2166_plain_rows_beside_fp8_stay_plain"
        + " "
        + SCALES
        + "dtypes_and_scales_that_disagree_are_refused",
    ),
    (
        "vllm#34697",
        "sizes of one family used for another",
        CHECKPOINTS
        + "vllm_34697_each_family_has_the_sizes_of_its_own_projections"
        + " "
        + FORMULAS
        + "the_rows_of_qwen3_next_are_parted_again",
    ),
    (
        "ROCm/ATOM#782",
        "a fused tensor dropped by the loader",
        CHECKPOINTS + "atom_782_a_merged_tensor_fills_its_parts_or_is_missed",
    ),
    (
        "vllm#42803",
        "rows of q moved into k",
        FORMULAS + "every_row_is_where_the_formula_puts_it" + " " + PLAN + "inverse_gives_every_bit_back",
    ),
    (
        "llmman#16, hyprstream#1547",
        "q and gate split flat, not by head",
        FORMULAS + "every_row_is_where_the_formula_puts_it",
    ),
    (
        "TensorRT-LLM#4674",
        "fused and unfused weights both in memory",
        LIVE + "packing_needs_at_most_one_layer_on_top_and_leaves_nothing_behind",
    ),
    (
        "pytorch#103990",
        "frozen weights cannot be updated",
        HERE + "pytorch_103990_weights_may_be_exchanged_and_exchanged_back",
    ),
    (
        "sglang#30761",
        "a derived tensor folded as a constant",
        HERE + "sglang_30761_what_is_derived_is_a_parameter_of_the_result",
    ),
    (
        "vllm#48941, #40390, vllm-ascend#13902, #7473",
        "a derived weight reallocated",
        RUNNING
        + "sglang_39139_weights_go_and_come_back_at_one_address"
        + " "
        + LIVE
        + "packing_again_goes_into_the_same_memory_where_nobody_else_sees_it",
    ),
    (
        "vllm#32710, sglang#23584, TensorRT-LLM#14535",
        "strided views into operators that need dense ones",
        HERE
        + "vllm_32710_strided_parts_are_what_the_next_operator_needs"
        + " "
        + OPS
        + "test_interpreter.py::test_every_kernel_is_its_reference_under_the_interpreter",
    ),
    (
        "vllm-omni#4262",
        "views take SDPA off its fast path",
        HERE + "vllm_omni_4262_attention_is_asked_for_the_same_kernel",
    ),
    (
        "pytorch#130243, #147828, #186850",
        "strides changed at custom operators",
        HERE
        + "pytorch_130243_every_operator_is_held_to_torchs_rules_for_operators"
        + " "
        + OPS
        + "test_interpreter.py::test_every_kernel_is_its_reference_under_the_interpreter",
    ),
    (
        "Rapid-MLX#2159",
        "equal only for few rows",
        HERE + "rapid_mlx_2159_integers_are_equal_for_every_number_of_rows",
    ),
    ("vllm#36329", "few outputs break a kernel", HERE + "vllm_36329_few_outputs"),
    (
        "pytorch#168373",
        "a fresh backend for each compile",
        HERE
        + "pytorch_168373_one_backend_object"
        + " "
        + HERE
        + "pytorch_168373_compiling_anew_with_equal_options_compiles_nothing",
    ),
    (
        "Liger#1470",
        "some norms missed on existing instances",
        "passes/test_families.py::test_0_8b_has_18_gdn_24_mlp_and_6_attention_merges_in_prefill_and_decode",
    ),
)

MODELS: tuple[Row, ...] = (
    (
        "sglang#23051, #23062",
        "one scale for a merged tensor",
        SCALES + "merged_weights_and_scales_are_the_parts",
    ),
    (
        "sglang#21662, #21313",
        "a parameter's loader has no setter",
        CHECKPOINTS + "sglang_21662_what_parameters_carry_is_left_on_them",
    ),
    ("sglang#21698", "incomplete scale overrides", SCALES + "dtypes_and_scales_that_disagree_are_refused"),
    (
        "sglang#18926",
        "block scales of merged projections, mtp prefix",
        SCALES
        + "merged_weights_and_scales_are_the_parts"
        + " "
        + CHECKPOINTS
        + "sglang_18926_scales_of_the_draft_model_are_not_merged_with_the_decoders",
    ),
    (
        "sglang#35719, #38878, #35797",
        "mtp and shared experts dropped",
        CHECKPOINTS + "sglang_35719_and_vllm_52013_the_draft_model_stays_under_its_names",
    ),
    ("sglang#21347, rtp-llm#799", "tied embeddings", LOAD + "a_tied_head_is_there_under_either_name"),
    (
        "sglang#23474, #22057",
        "offloaded and aliased weights",
        "daily/test_life.py::test_offloaded_weights_stay_where_they_are_with_the_reason "
        + HERE
        + "sglang_22057_a_view_of_a_weight_that_the_module_keeps_is_never_stale",
    ),
    (
        "vllm#37444, #37448",
        "a quantised linear has no weight",
        "daily/test_models.py::test_quantised_linears_stay_with_a_reason_and_what_is_beside_them_is_merged",
    ),
    (
        "vllm#35924",
        "few columns under tensor parallelism",
        CHECKPOINTS + "vllm_35924_few_rows_for_each_rank_are_whole_heads_or_refused",
    ),
    (
        "vllm#35287, #48814",
        "quantisation formats",
        "runtime/test_quantization.py::test_a_checkpoint_is_refused_by_the_name_of_its_format",
    ),
    (
        "vllm#51836, ms-swift#9412, #9972",
        "fp32 A_log lost",
        CHECKPOINTS
        + "vllm_51836_float32_parts_of_a_bfloat16_model_are_loaded_without_rounding"
        + " "
        + CHECKPOINTS
        + "nemo_automodel_2484_what_is_float32_in_a_bfloat16_file_stays_so",
    ),
    (
        "vllm#52013",
        "mtp.lm_head renamed",
        CHECKPOINTS + "sglang_35719_and_vllm_52013_the_draft_model_stays_under_its_names",
    ),
    (
        "vllm#41384",
        "PEFT target_parameters dropped",
        RUNNING
        + "vllm_41384_adapters_of_stacked_experts_take_part"
        + " "
        + "daily/test_adapters.py::test_adapters_before_optimize",
    ),
    (
        "transformers#48349",
        "modules left out of FP8 by names with another prefix",
        CHECKPOINTS
        + "transformers_48349_modules_left_out_of_fp8_are_known_under_any_prefix"
        + " "
        + PLAN
        + "bind_follows_the_decoders_prefix",
    ),
    (
        "transformers#44230, #43154",
        "FP8 experts",
        FP8 + "experts_of_a_stack_in_fp8_come_apart_with_their_scales",
    ),
    (
        "transformers#40968",
        "mtp lost on saving",
        CONVERT + "there_and_back_is_byte_equal_and_there_is_the_plan_applied",
    ),
    (
        "ktransformers#1996",
        "FP8 shapes",
        SCALES
        + "merged_weights_and_scales_are_the_parts"
        + " "
        + FP8
        + "a_config_gives_the_plan_of_its_files",
    ),
    (
        "ktransformers#1928",
        "GPTQ",
        "runtime/test_quantization.py::test_a_checkpoint_is_refused_by_the_name_of_its_format",
    ),
    (
        "ModelOpt#1323, #1340, #1382, #1411, #1421, #2011, #2334",
        "scales of fused experts",
        FP8 + "gate_and_up_share_the_one_scale_of_their_expert",
    ),
    (
        "GPTQModel#2694",
        "a prefix mismatch leaves experts random",
        CHECKPOINTS + "gptqmodel_2694_experts_under_another_prefix_are_loaded_or_refused",
    ),
    (
        "FastDeploy#7057, #7410",
        "shards of q and gate, the transpose flag",
        "runtime/layouts/test_fastdeploy.py::test_each_shard_is_turned_by_its_own_layout_alone",
    ),
    (
        "mlx-vlm#815, #816, torchtitan#4373",
        "fused and single experts",
        "runtime/layouts/test_experts.py::test_a_stack_comes_apart_and_together",
    ),
    (
        "tokenspeed#766",
        "FP8 with a fused ba",
        CHECKPOINTS + "vllm_47445_and_prime_rl_2166_plain_rows_beside_fp8_stay_plain",
    ),
    (
        "1Cat-vLLM#428",
        "bitsandbytes shapes",
        "runtime/test_quantization.py::test_a_checkpoint_is_refused_by_the_name_of_its_format",
    ),
    (
        "prime-rl#2166",
        "one row cannot be quantised by blocks",
        CHECKPOINTS + "vllm_47445_and_prime_rl_2166_plain_rows_beside_fp8_stay_plain",
    ),
    (
        "sglang#22312",
        "b and a as strided views",
        OPS
        + "test_gdn_gates.py::test_they_are_those_of_transformers_and_the_switch_rounds_beta_as_eager_does"
        + " "
        + KERNELS,
    ),
    (
        "sglang#20741, #19961",
        "A_log in bf16",
        OPS
        + "test_gdn_gates.py::test_they_are_those_of_transformers_and_the_switch_rounds_beta_as_eager_does",
    ),
    (
        "sglang#38975, #38977, #40362, vllm#53877, #51779, #51797",
        "beta rounded, or not",
        RUNNING
        + "sglang_38975_rates_that_are_not_rounded_keep_the_state"
        + " "
        + OPS
        + "test_gdn_decode.py::test_the_switch_rounds_the_rate_as_eager_does"
        + " "
        + OPS
        + "test_gdn_gates.py::test_they_are_those_of_transformers_and_the_switch_rounds_beta_as_eager_does",
    ),
    (
        "sglang#13081, vllm#28182, vllm-ascend#3571",
        "NaN in padded rows",
        OPS + "test_gated_delta_rule.py::test_tokens_of_zeros_on_the_left_leave_what_follows_as_it_is",
    ),
    (
        "vllm#54146, #54308, #52568",
        "fp16 overflow",
        OPS + "test_gated_delta_rule.py::test_zero_keys_extreme_decays_and_large_values_give_numbers",
    ),
    (
        "vllm#51305, #51370",
        "fp32 inputs of chunk kernels",
        KERNELS + " " + OPS + "test_gated_delta_rule.py::test_output_and_state_are_those_of_transformers",
    ),
    (
        "sglang#19070",
        "partial sums added up twice under tensor parallelism",
        RUNNING + "sglang_19070_what_the_ranks_compute_adds_up_to_the_whole",
    ),
    (
        "vllm#36872",
        "speculative decoding",
        RUNNING
        + "vllm_36872_speculation_over_recurrent_states_is_refused_as_for_the_plain_model"
        + " "
        + "daily/test_generate.py::test_assisted_decoding_with_both_models_optimised_and_with_lookup",
    ),
    (
        "sglang#34421, #34307",
        "ratios 3 and 8",
        "passes/test_layout_chains.py::test_a_grouped_projection_is_rewritten_bit_for_bit"
        + " "
        + OPS
        + "test_gated_delta_rule.py::test_output_and_state_are_those_of_transformers"
        + " "
        + FORMULAS
        + "every_row_is_where_the_formula_puts_it",
    ),
    ("FLA#913, #607", "kernels that read beyond the ends", KERNELS),
    (
        "transformers#46851, #46859",
        "packed documents leak",
        RUNNING
        + "transformers_46851_packed_documents_are_what_the_plain_model_makes_of_them"
        + " "
        + OPS
        + "test_causal_conv1d.py::test_packed_sequences_give_what_each_gives_alone"
        + " "
        + OPS
        + "test_gated_delta_rule.py::test_packed_sequences_give_bit_for_bit_what_each_gives_alone",
    ),
    (
        "transformers#46773",
        "the padding mask skipped at batch 1",
        RUNNING
        + "transformers_46773_padding_of_a_single_sequence_is_masked"
        + " "
        + "daily/test_generate.py::test_prompts_of_several_lengths_padded_on_the_left",
    ),
    (
        "transformers#46441",
        "static cache without linear attention",
        RUNNING
        + "transformers_46441_a_static_cache_starts_anew"
        + " "
        + "runtime/test_optimize.py::test_greedy_tokens_are_those_of_the_plain_model",
    ),
    (
        "FLA#52",
        "wrong under torch.compile",
        OPS
        + "test_gated_delta_rule.py::test_the_operator_keeps_torchs_rules"
        + " "
        + "runtime/test_optimize.py::test_greedy_tokens_are_those_of_the_plain_model",
    ),
    (
        "axolotl#3734",
        "a graph break in the GDN loop",
        RUNNING + "axolotl_3734_a_prompt_and_a_token_are_one_graph_each",
    ),
    (
        "unsloth#6850, #5434, #4688, #5345, peft#3009",
        "optional kernels gate features",
        OPS + "test_interpreter.py::test_the_operators_import_without_triton_and_do_not_import_it",
    ),
    (
        "ms-swift#9325",
        "an FP8 export too small",
        SCALES
        + "quantised_checkpoints_convert_there_and_back"
        + " "
        + CONVERT
        + "progress_counts_every_byte_once",
    ),
)


OTHERS: tuple[Row, ...] = (
    (
        "pytorch#97909, #127173",
        "a functional call computed with the module's own weights",
        HERE + "pytorch_97909_and_127173_a_functional_call_computes_with_the_weights_it_is_given",
    ),
    (
        "pytorch#136662",
        "a write lost under torch.func.grad",
        HERE + "pytorch_136662_writes_under_a_transform_of_functions",
    ),
    (
        "pytorch#120958, #117496",
        "attributes and numbers of the first call used for ever",
        HERE + "pytorch_120958_and_117496_attributes_and_numbers_of_today_are_used",
    ),
    (
        "pytorch#129362",
        "assigned weights not seen",
        LIVE + "the_state_dict_that_was_assigned_is_not_written_to",
    ),
    (
        "transformers#42697",
        "another implementation asked for, the old one run",
        RUNNING + "transformers_42697_another_implementation_is_used_from_the_next_call_on",
    ),
    (
        "transformers#46612",
        "states not reordered with the beams",
        "daily/test_generate.py::test_decoding_strategies_give_the_tokens_of_the_plain_model",
    ),
    (
        "transformers#30351",
        "a static cache that keeps its first prompt",
        RUNNING + "transformers_46441_a_static_cache_starts_anew",
    ),
    (
        "slime#1686, ms-swift#9618",
        "bounds of documents given to the convolution and not to the delta rule",
        OPS + "test_gated_delta_rule.py::test_packed_sequences_give_bit_for_bit_what_each_gives_alone",
    ),
    (
        "maxtext#5295, rtp-llm#829",
        "a convolution that reads padding into the first tokens",
        RUNNING + "transformers_46773_padding_of_a_single_sequence_is_masked",
    ),
    (
        "tokenspeed#80",
        "every rank holds the whole, and the sum counts it twice",
        RUNNING + "sglang_19070_what_the_ranks_compute_adds_up_to_the_whole",
    ),
    (
        "torch.utils.swap_tensors",
        "weights exchanged as a whole",
        LIVE + "parameters_that_torch_swaps_as_a_whole_are_packed_again",
    ),
)


def nodes(where: str) -> list[str]:
    """The tests that a row names."""
    return [word for word in where.split() if "::" in word]


def state(where: str) -> str:
    return (
        "not shown"
        if where.startswith("not shown")
        else "impossible"
        if where.startswith("impossible")
        else "tested"
    )


def page() -> str:
    rows = (*GRAPHS, *MODELS, *OTHERS)
    counts = {
        name: sum(state(where) == name for *_, where in rows)
        for name in ("tested", "impossible", "not shown")
    }
    lines = [
        "# Bugs that peers had",
        "",
        "Each row is a bug of another project and the test here that would fail if we had it. Written by",
        "`python tests/upstream/cases.py` from the list in that file.",
        "",
        f"{len(rows)} rows: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".",
    ]
    groups = (
        ("Graph rewriting", GRAPHS),
        ("Loading, numerics, padding, caches", MODELS),
        ("Compilers, caches, ranks: further ones", OTHERS),
    )
    for title, group in groups:
        lines += ["", f"## {title}", "", "| source | what went wrong | state | test |", "|---|---|---|---|"]
        lines += [
            f"| {ref} | {what} | {state(where)} | {where.replace('::', ' ')} |" for ref, what, where in group
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
