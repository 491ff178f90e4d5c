from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.datastores import NumberTokenizer, build_datastore
from tests.model_configs import target
from vllm_specplus import plugin, speculative_config
from vllm_specplus.config import parse


def test_defaults():
    config = parse({"method": "token_recycling"})
    assert config.model_dump() == {
        "method": "token_recycling", "num_speculative_tokens": 32, "tree": "best_first",
        "top_k": 8, "pair_keys": True, "match_context": True, "seed_from_prompt": False,
        "max_memory_mb": 256,
        "load_matrix": None, "save_matrix": None,
        "control": {
            "policy": "goodput", "mode": "on", "objective": "latency", "tpot_ms": None,
            "ttft_ms": None, "cost_file": None,
        },
        "acceptance": {"rule": "lossless"}, "memory": None, "allow_lossy": False,
    }  # fmt: skip


@pytest.mark.parametrize("raw", [{"method": "medusa"}, {}, {"method": None}])
def test_an_unknown_method_is_told_what_there_is(raw):
    with pytest.raises(
        ValueError, match=r"unknown method .*; vllm-specplus has block_tree, cspd, draft_tree, "
    ):
        parse(raw)


def test_a_config_is_not_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        parse({"method": "token_recycling"}).top_k = 4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"treee": 1}, "unknown key 'treee', did you mean 'tree'? (allowed: method, num_sp"),
        ({"num_speculative_tokens": "16"}, "'num_speculative_tokens' is '16': input should be"),
        ({"num_speculative_tokens": 4.0}, "'num_speculative_tokens' is 4.0: input should be"),
        ({"num_speculative_tokens": True}, "'num_speculative_tokens' is True: input should be"),
        ({"num_speculative_tokens": None}, "'num_speculative_tokens' is None: input should be"),
        ({"top_k": 0}, "'top_k' is 0: input should be greater than or equal to 1"),
        ({"top_k": 17}, "'top_k' is 17: input should be less than or equal to 16"),
        ({"seed_from_prompt": "yes"}, "'seed_from_prompt' is 'yes': input should be a valid bool"),
        ({"load_matrix": 3}, "'load_matrix' is 3: input should be a valid string"),
        ({"tree": "2.2.2", "match_context": True}, "cannot use match_context"),
        ({"num_speculative_tokens": 0}, "greater than or equal to 1"),
        ({"num_speculative_tokens": 81}, "less than or equal to 80"),
        ({"pair_keys": 1}, "'pair_keys' is 1: input should be a valid boolean"),
        ({"tree": "3.3.3"}, "'best_first' or '2.2.2'"),
        ({"tree": "2.2.2", "pair_keys": True}, "cannot use pair_keys"),
        ({"tree": "2.2.2", "top_k": 4}, "set top_k to 8 or more"),
        ({"load_matrix": "/nowhere/m"}, "load_matrix '/nowhere/m' is not a file"),
        ({"save_matrix": "/nowhere/m"}, "is in a folder that does not exist"),
        ({"control": "goodput"}, "'control' is 'goodput': input should be a valid dict"),
        ({"control": {"threshold": 0.5}}, "unknown key 'control.threshold' (policy 'goodput' "),
        ({"control": {"tpot_ms": 30.0}}, "'tpot_ms' is a target: set 'objective' to \"slo\""),
        ({"control": {"objective": "fast"}}, "'latency', 'throughput' or 'slo'"),
        ({"control": {"policy": "best"}}, "unknown control policy 'best' (allowed: goodput,"),
        ({"control": {"policy": "fixed"}}, "set num_speculative_tokens"),
        ({"control": {"policy": "threshold", "threshold": 1.0}}, "'control.threshold' is 1.0: "),
        (
            {"control": {"policy": "goodput", "threshold": 0.5}},
            "unknown key 'control.threshold' (policy 'goodput' allows: policy, mode, objective, "
            "tpot_ms, ttft_ms, cost_file)",
        ),
        ({"control": {"policy": "goodput", "cost_file": "/nowhere/c"}}, "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(keys, words):
    with pytest.raises(ValueError, match="speculative_config for 'token_recycling'") as error:
        parse({"method": "token_recycling", **keys})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"method": "rest"}, "for 'rest': 'datastore' is missing"),
        (
            {"method": "rest", "datastore": "/nowhere"},
            "'/nowhere' is not a datastore (no file",
        ),
        ({"method": "suffix_tree", "max_depth": 1}, "'max_depth' is 1: input should be greater"),
        ({"method": "rasd", "sources": []}, "'sources' is []: list should have at least 1 item"),
        (
            {"method": "rasd", "sources": ["ngram"]},
            "holds 'ngram' (allowed: block_tree, draft_tree, eagle_tree",
        ),
        ({"method": "rasd", "sources": ["rasd"]}, "holds 'rasd' (allowed: block_tree, draft_tree"),
        ({"method": "rasd", "sources": [{"top_k": 3}]}, "'sources' holds {'top_k': 3}"),
        ({"method": "rasd", "sources": ["rest"]}, "for 'rest': 'datastore' is missing"),
        ({"method": "rasd", "sources": ["suffix_tree"] * 2}, "names 'suffix_tree' twice"),
        (
            {"method": "rasd", "sources": [{"method": "token_recycling", "topk": 3}]},
            "for 'token_recycling': unknown key 'topk'",
        ),
        (
            {"method": "rasd", "sources": [{"method": "suffix_tree", "control": {}}]},
            "'suffix_tree' has a 'control' of its own: set it once, for 'rasd'",
        ),
        (
            {"method": "rasd", "sources": ["suffix_tree"], "prune": 0.1},
            "goes by what a draft model thinks",
        ),
    ],
)
def test_mistakes_of_retrieval(raw, words):
    with pytest.raises(ValueError, match="speculative_config for") as error:
        parse(raw)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_get_the_common_budget():
    config = parse({"method": "rasd", "num_speculative_tokens": 20})
    assert [m.method for m in config.members()] == ["token_recycling", "suffix_tree"]
    assert {m.num_speculative_tokens for m in config.members()} == {20}
    assert not config.members()[0].match_context  # the suffix tree matches
    alone = parse({"method": "rasd", "sources": ["token_recycling"]})
    assert alone.members()[0].match_context


def test_a_datastore_must_fit_the_model(tmp_path):
    store = str(build_datastore(tmp_path / "store", [[1, 2, 3]], 9))
    for raw in (
        {"method": "rest", "datastore": store},
        {"method": "rasd", "sources": [{"method": "rest", "datastore": store}]},
    ):
        config = parse(raw)
        config.check_target(target(NumberTokenizer(9)))
        with pytest.raises(ValueError, match="was built with another tokenizer"):
            config.check_target(target(NumberTokenizer(8)))
        tokens = tmp_path / "store" / "tokens.bin"
        content = tokens.read_bytes()
        tokens.write_bytes(bytes(len(content)))
        with pytest.raises(ValueError, match=r"checksum of tokens\.bin"):
            config.check_target(target(NumberTokenizer(9)))
        tokens.write_bytes(content)


def test_several_mistakes_are_all_told():
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        parse({"method": "token_recycling", "a": 1, "b": 2})


def engine_args(**changes):
    fields = {"speculative_config": None, "spec_method": None, "spec_tokens": None}
    return SimpleNamespace(**fields | changes)


def test_short_flags_are_taken_over():
    args = engine_args(spec_method="token_recycling", spec_tokens=8)
    assert speculative_config.ours(args) == {
        "method": "token_recycling",
        "num_speculative_tokens": 8,
    }
    args = engine_args(spec_method="draft_tree", spec_model="a/draft")
    assert speculative_config.ours(args) == {"method": "draft_tree", "model": "a/draft"}
    args = engine_args(
        speculative_config={"method": "token_recycling", "num-speculative-tokens": 4}, spec_tokens=8
    )
    with pytest.raises(ValueError, match="mutually exclusive"):
        speculative_config.ours(args)


def test_other_methods_are_left_to_vllm():
    assert speculative_config.ours(engine_args()) is None
    assert speculative_config.ours(engine_args(speculative_config={"method": "ngram"})) is None
    assert speculative_config.ours(engine_args(spec_method="ngram", spec_tokens=4)) is None
    twice = {"method": "ngram", "num_speculative_tokens": 4}
    assert speculative_config.ours(engine_args(speculative_config=twice, spec_tokens=8)) is None
    no_method = {"model": "a/draft-model", "num_speculative_tokens": 4}
    assert speculative_config.ours(engine_args(speculative_config=no_method, spec_tokens=8)) is None


def test_the_users_config_is_not_changed():
    config = {"method": "token_recycling"}
    speculative_config.ours(engine_args(speculative_config=config, spec_tokens=8))
    assert config == {"method": "token_recycling"}


def test_config_is_written_out_as_the_user_wrote_it():
    """Defaults made explicit would conflict with the template when parsed again."""
    config = parse({"method": "token_recycling", "num_speculative_tokens": 80, "tree": "2.2.2"})
    assert parse(plugin.worker_config(config)["config"]) == config


def test_the_workers_config_is_the_same_at_every_start():
    """vLLM hashes it to find its compiled graphs: a name made at start would hide them."""
    config = parse({"method": "token_recycling"})
    assert plugin.worker_config(config) == plugin.worker_config(config)


def test_without_a_method_the_front_end_loads_neither_numba_nor_vllm():
    """They take seconds, and every vLLM of the environment loads the plugin."""
    code = (
        "import sys, vllm_specplus.plugin, vllm_specplus.metrics, vllm_specplus.proposers;"
        "import vllm_specplus.control.requests;"
        "from vllm_specplus.registry import method_names; assert 'rasd' in method_names();"
        "bad = {'vllm', 'numba', 'torch'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_of_captions_is_a_local_folder(tmp_path):
    from vllm_specplus.engine.models.serving import CAPTIONS_MODE, ServeCaptions

    model = SimpleNamespace(model=str(tmp_path), enable_prompt_embeds=False)
    with pytest.raises(ValueError, match=r"a folder with model\.safetensors"):
        ServeCaptions.verify_and_update_model_config(model)
    (tmp_path / "model.safetensors").touch()
    ServeCaptions.verify_and_update_model_config(model)
    assert (model.tokenizer_mode, model.enable_prompt_embeds) == (CAPTIONS_MODE, True)


@pytest.fixture
def latents_draft(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(LATENTS | changes))
        return {"method": "cspd", "model": str(tmp_path)}

    return write


LATENTS = {
    "model_type": "causal_latents", "num_classes": 10, "grid_size": 8, "size": 4, "steps": 6,
    "end": 250, "prediction": "velocity",
}  # fmt: skip


def test_latents_are_drafted_by_a_model_of_the_same_latents(latents_draft):
    drafted = target(family="causal_latents", latents=LATENTS)
    config = parse(latents_draft())
    config.check_kind(drafted)
    config.check_target(drafted)
    with pytest.raises(ValueError, match="its 'end' is 100, and the target's is 250"):
        parse(latents_draft(end=100)).check_target(drafted)
    parse(latents_draft(steps=2) | {"steps": 3}).check_target(drafted)
    with pytest.raises(ValueError, match="'steps' is 7, and the target takes 6: lower it"):
        parse(latents_draft() | {"steps": 7}).check_target(drafted)
    with pytest.raises(
        ValueError, match="drafts tokens, and the target generates latents: use cspd"
    ):
        parse({"method": "token_recycling"}).check_kind(drafted)
    with pytest.raises(ValueError, match="drafts latents, and the target, of type"):
        config.check_kind(target())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"verification": "reference"}, "set 'allow_lossy' to true"),
        ({"verification": "paper"}, "verification 'paper' changes what is made"),
        ({"allow_lossy": True}, "for a 'verification' that is not exact: remove it"),
        ({"acceptance": {"rule": "typical"}, "allow_lossy": True}, "have 'verification': use it"),
        ({"model": "/nowhere"}, "'model' '/nowhere' is not a folder with a config.json"),
        ({"prefill": -1}, "'prefill' is -1"),
        ({"window": 4}, "unknown key 'window'"),
    ],
)
def test_mistakes_about_latents(latents_draft, keys, words):
    with pytest.raises(ValueError, match=words):
        parse(latents_draft() | keys)
    assert not parse(latents_draft() | {"verification": "paper", "allow_lossy": True}).lossless
