"""The launch lines of well-known recipes, and what the contract says of those we refuse."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.contract import launches
from vllm_specplus.capabilities import Need
from vllm_specplus.engine import needs

ROOT = Path(__file__).parents[2]
LINES = json.loads((Path(__file__).parent / "launch_lines.json").read_text())
TABLE = json.loads((ROOT / "docs" / "compatibility.json").read_text())
SUBJECT = "speculative method 'token_recycling' does not work with "
OURS = {"method": "token_recycling"}


def unnamed(answer: str) -> list[str]:
    """Parts of a refusal that are no sentence of the contract with something to do."""
    parts = answer.removeprefix("ValueError: ").split("; " + SUBJECT)
    parts = [parts[0].removeprefix(SUBJECT), *parts[1:]] if SUBJECT in answer else parts
    known = [re.escape(need.what) + r"( \(.*?\))?: \S.*" for need in Need]
    return [part for part in parts if not any(re.fullmatch(each, part) for each in known)]


def test_what_is_no_sentence_of_the_contract_is_noticed():
    assert unnamed("ValueError: " + SUBJECT + "a quantized KV cache (x): do this") == []
    assert unnamed("ValueError: " + SUBJECT + "a quantized KV cache (x)")
    assert unnamed("ValueError: " + SUBJECT + "something else (x): do this")
    assert unnamed("RuntimeError: out of luck")


def test_the_table_has_every_line():
    keys = ("recipe", "model", "line")
    assert [{key: row[key] for key in keys} for row in TABLE] == LINES
    assert len(TABLE) >= 60
    assert sum(row["plain"] is None for row in TABLE) >= 60


#: vLLM's own, of any speculation beside LoRA with a budget of tokens for fewer drafts.
FEWER_DRAFTS = "Consider increasing max_num_batched_tokens or decreasing num_speculative_tokens"


def test_every_refusal_of_ours_alone_is_named_with_a_remedy():
    refused = [row for row in TABLE if row["plain"] is None and row["ours"] is not None]
    assert refused
    named = [row for row in refused if FEWER_DRAFTS not in row["ours"]]
    assert [row for row in named if unnamed(row["ours"])] == []
    assert all("--enable-lora" in row["line"] for row in refused if row not in named)


def test_no_line_is_refused_because_a_parser_is_named():
    """vLLM fills ``reasoning_config`` by itself whenever one is."""
    of_parsers = [row for row in TABLE if "-parser" in row["line"] and row["plain"] is None]
    assert len(of_parsers) > 10
    for row in of_parsers:
        if row["ours"] is not None:
            assert "reasoning" not in row["ours"]
    assert any("--reasoning-parser" in row["line"] and row["ours"] is None for row in of_parsers)


def test_the_page_is_the_tables():
    path = ROOT / "scripts" / "compatibility.py"
    spec = importlib.util.spec_from_file_location("compatibility", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "compatibility.md").read_text()
    # The sentence that names vLLM's version depends on what is installed.
    version = re.compile(r"build of vLLM \S+?,")
    assert version.sub("", module.page(TABLE)) == version.sub("", written)


@pytest.mark.engine
def test_a_slice_of_the_table_holds(tmp_path):
    """Reasoning parsers, connectors that vLLM makes itself, and what no argument tells."""
    cases = [
        ("qwen3", "--reasoning-parser qwen3 --tensor-parallel-size 2", None),
        ("qwen3", "--kv-offloading-size 1", "a KV connector"),
        ("qwen3", "--kv-cache-dtype turboquant_k8v4", "a quantized KV cache"),
        ("qwen3", "--kv-cache-dtype fp8", None),
        ("qwen3", "--enable-lora --max-num-seqs 16 --max-num-batched-tokens 4096", None),
        ("gemma2", "--disable-sliding-window", None),
        ("bloom", "", None),
        ("gpt_oss", "--reasoning-parser openai_gptoss", None),
        ("mistral_window", "", None),
        ("mistral_window", "--disable-sliding-window", None),
        ("deepseek_v3", "", None),
        ("deepseek_v3", "--kv-cache-dtype fp8", "an FP8 KV cache"),
        ("qwen3_next", "", "recurrent layers"),
    ]
    plain = launches.outcomes([(model, line, None) for model, line, _ in cases], tmp_path)
    assert plain == [None] * len(cases)
    ours = launches.outcomes([(model, line, OURS) for model, line, _ in cases], tmp_path)
    for (model, line, words), answer in zip(cases, ours, strict=True):
        if words is None:
            assert answer is None, (model, line)
        else:
            assert words in answer, (model, line)
            assert unnamed(answer) == []


#: Arguments of engines that a draft has nothing to do with, or that the engine serves.
HARMLESS = """
_api_process_count _api_process_rank additional_config aggregate_engine_logging all2all_backend
allow_deprecated_quantization allowed_local_media_path allowed_media_domains aux_output_config
block_size code_revision collect_detailed_traces compilation_config config_format convert
cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params
cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets data_parallel_address
data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
default_mm_loras device_ids disable_cascade_attn disable_chunked_mm_input
disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats
disable_nccl_for_dp_synchronization disable_sliding_window distributed_executor_backend
distributed_timeout_seconds download_dir dp_sync_interval dtype ec_manager_config
ec_transfer_config elastic_ep_max_dp_size enable_chunked_prefill enable_cumem_allocator
enable_ep_weight_filter enable_eplb enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp
enable_layerwise_nvtx_tracing enable_logging_iteration_details
enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint enable_mfu_metrics
enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras
enable_nccl_comm_suspend enable_prefix_caching enable_shm_tensor_arena enable_sleep_mode
enable_tower_connector_lora enforce_eager engram_config eplb_config expert_placement_strategy
fail_on_environ_validation fault_tolerance_config fully_sharded_loras gdn_prefill_backend
generation_config gpu_memory_utilization hf_config_path hf_overrides hf_token ignore_patterns
interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode jit_monitor_verbose
kda_decode_backend kda_prefill_backend kernel_config kv_cache_dtype_skip_layers
kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample kv_events_config
kv_offloading_backend language_model_only limit_mm_per_prompt linear_backend load_format
log_config_file log_level logging_config logits_processors logprobs_mode
long_prefill_token_threshold long_prefill_token_threshold_adaptive lora_dtype lora_target_modules
mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds
mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr master_port max_cpu_loras
max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_lora_rank max_loras max_model_len
max_num_active_seqs max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers media_io_kwargs
mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode
mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type
mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc model
model_class_overrides model_impl model_loader_extra_config model_weights moe_backend nnodes
node_rank num_gpu_blocks_override numa_bind numa_bind_cpus numa_bind_nodes offload_backend
offload_group_size offload_num_in_group offload_params offload_prefetch_step optimization_level
otlp_traces_endpoint override_generation_config per_request_spec_decode_metrics performance_mode
pooler_config prefill_schedule_interval prefix_cache_retention_interval prefix_caching_hash_algo
prefix_match_unit profiler_config pt_load_map_location quantization quantization_config
ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin
renderer_num_workers replayssm_buffer_len revision runner safetensors_load_strategy
safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_reserve_full_isl
scheduling_policy seed served_model_name show_hidden_metrics_for_version shutdown_timeout
skip_mm_profiling skip_tokenizer_init sleep_mode_offload_cudagraph sleep_preserve_parameter_names
sparse_indexer_topk_backend spec_method spec_model spec_tokens specialize_active_lora
speculative_config stream_interval structured_outputs_config swa_bounded_replay tokenizer
tokenizer_mode tokenizer_revision tokens_only trust_remote_code use_fp64_gumbel use_replayssm
use_tqdm_on_load video_pruning_method watermark weight_transfer_config worker_extension_cls
"""


def test_every_argument_of_vllm_has_been_thought_of():
    """A new one is either a need (``needs.GIVEN``, ``needs.SIZES``) or goes to the list above."""
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    ours = {*needs.GIVEN, *needs.SIZES, *needs.READ}
    assert ours <= fields
    assert fields - ours == set(HARMLESS.split())
