"""One engine in a fresh process: reads a job (JSON) and writes what came out.

``python -m tests.engine.child JOB OUT``; see ``harness.run`` for the fields.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time

from tests.engine import hostile, sessions
from vllm_specplus.testing.engine import (
    counters_of,
    generate,
    metrics_of,
    prompt_of,
    requests_of,
    sampling_params,
)


def sabotage(kind: str) -> None:
    """Break one part of the engine on purpose; the tests must notice."""
    import numpy as np

    from vllm_specplus.engine.runner import TreeRunnerMixin
    from vllm_specplus.samplers import lossless

    if kind == "no_compaction":
        TreeRunnerMixin._compact = lambda self, step: None
    elif kind == "chains":
        # As of structured output: block heads draft their most probable tokens.
        from vllm_specplus.proposers.block_tree import BlockTree

        propose = BlockTree.propose

        def chains(self, step):
            step.chain_only[:] = True
            return propose(self, step)

        BlockTree.propose = chains
    elif kind == "no_depth":
        from vllm_specplus.engine import batch

        batch.row_depths = lambda parents, starts: (
            np.arange(len(parents)) - np.repeat(starts[:-1], np.diff(starts))
        ).astype(np.int32)
    elif kind == "first_draft_wins":
        # A wrong acceptance rule: the root's first child is taken as it is.
        right = lossless.accept

        def accept(rows, sampled):
            sampled = sampled.copy()
            for first, end in zip(rows.starts[:-1], rows.starts[1:], strict=False):
                if end - first > 1:
                    sampled[first] = rows.tokens[first + 1]
            return right(rows, sampled)

        lossless.accept = accept
    elif kind == "no_guard":
        from vllm_specplus.engine.scheduler import GuardedScheduler

        GuardedScheduler._trim_drafts = lambda self: None
    elif kind in ("fixed_prices", "dear_looks"):
        # Decisions that do not depend on the machine's mood: 3 % of a step per row, and 5 % per
        # pass of a draft; looking at a step is free, or takes a tenth of one.
        from vllm_specplus.control.controller import Controller
        from vllm_specplus.control.cost import StepCost

        StepCost.observe = lambda self, shape, seconds: self.predict_step(shape)
        StepCost.predict = lambda self, rows, requests, context, prompt_rows=0, tree=False: (
            0.01 + 0.0003 * (np.asarray(rows) + 0 * np.asarray(tree))  # of the shape of both
        )

        def drafting_took(self, max_nodes, seconds):
            if self._levels is not None:
                self.prices.drafting.seconds = 0.0005

        Controller.drafting_took = drafting_took
        look = 0.001 if kind == "dear_looks" else 0.0
        Controller.looked = lambda self, seconds, nodes: self._looks.looked(look, nodes)
        took = Controller.step_took
        Controller.step_took = lambda self, shape, seconds, drafting=0.0: (
            self.cost and took(self, shape, self.cost.predict_step(shape))
        )
    elif kind == "q_not_renormalised":
        # The rule for draws with replacement on draws without.
        from vllm_specplus.samplers.sampled import WithoutReplacement

        WithoutReplacement.renormalises = False
    elif kind == "foreign_draft_probs":
        # Nodes are judged by distributions they were not drawn from.
        from vllm_specplus.engine.row_sampling import RuleSampler

        right_judge = RuleSampler.judge_rows

        def judge_rows(self, logits, metadata, rows, penalties, draft_probs, *rest):
            draft_probs.q = draft_probs.q.roll(1, 0)
            return right_judge(self, logits, metadata, rows, penalties, draft_probs, *rest)

        RuleSampler.judge_rows = judge_rows
    elif kind == "found_as_drawn":
        # What was looked up is judged by the draft's distribution, like its drawn siblings.
        from vllm_specplus.drafting.trees import Fusion

        right_fuse = Fusion.fuse

        def fuse(self, drafts, step, possible=None):
            batch = right_fuse(self, drafts, step, possible)
            if batch.drawn_from is not None:
                tree = np.repeat(np.arange(len(batch.counts)), batch.counts)
                first_draws = {}
                for i, above in enumerate(zip(tree, batch.parents, strict=True)):
                    batch.drawn_from[i] = first_draws.setdefault(above, batch.drawn_from[i])
            return batch

        Fusion.fuse = fuse
    elif kind == "nan_logits":
        # The target breaks for texts that begin with token 7, from their 30th token on.
        from vllm_specplus.engine.runner import TreeRunnerMixin

        right_sample = TreeRunnerMixin._sample

        def sample(self, logits, spec_decode_metadata):
            batch = self.batch
            bad = (batch.texts[: len(batch.request_ids), 0] == 7) & (batch.num_tokens >= 30)
            if self._step is not None:
                logits[np.repeat(bad, np.diff(self._step.rows.starts))] = float("nan")
            return right_sample(self, logits, spec_decode_metadata)

        TreeRunnerMixin._sample = sample
    elif kind == "no_native_kernels":
        from vllm_specplus.kernels import native

        native._load = lambda: "no compiler"
    else:
        raise ValueError(kind)


def load_plugin() -> None:
    import tests.engine.drafters  # registers the test methods
    import tests.engine.drawn_weights  # noqa: F401  and a way to load models
    from vllm_specplus.plugin import register

    register()


def abort(llm, requests, steps: int) -> None:
    """Start the requests, and abort all of them after so many steps."""
    names = [f"aborted-{i}" for i in range(len(requests))]
    for name, (prompt, fields) in zip(names, requests, strict=True):
        llm.llm_engine.add_request(name, prompt_of(prompt), sampling_params(fields))
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(names)


def main(job_path: str, out_path: str) -> None:
    with open(job_path) as f:
        job = json.load(f)
    load_plugin()
    if "mrope" in job["engine"]["model"]:
        from vllm import ModelRegistry

        ModelRegistry.register_model("MRopeTextForCausalLM", "tests.engine.mrope_model:MRopeText")
    if job["engine"].get("reasoning_parser") == "first_sentence":
        import tests.engine.reasoning_parser  # noqa: F401  registers it
    if job.get("sabotage") == "unchecked_launch":
        # As if the model's config told nothing: what is left are the checks after load.
        from vllm_specplus.engine import needs

        needs.check_launch = lambda *args: None
        job["sabotage"] = None
    from vllm import LLM

    if job["engine"].get("distributed_executor_backend") == "ray":
        import ray

        # A cluster of this process, gone with it; the two GPUs are only numbers to Ray.
        ray.init("local", num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    llm = LLM(**job["engine"])
    if job.get("sabotage"):
        sabotage(job["sabotage"])
    result, owners, counted, drafted = [], [], [], []
    for batch in job["batches"]:
        time.sleep(batch.get("pause", 0))
        if batch.get("renew"):
            assert llm.reset_prefix_cache()
            assert all(llm.collective_rpc("renew_drafts"))
        if "weights" in batch:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": batch["weights"]})
            assert llm.reset_prefix_cache()
        if "control" in batch:
            (answer,) = llm.collective_rpc("control_speculation", args=(batch["control"],))
            assert answer.items() >= batch["control"].items(), answer
        if batch.get("await_rebuild"):
            _await_rebuild(llm)
        if batch.keys() & {"await_rebuild", "kill_owner_at", "stop_owner_at", "end_process"}:
            owners.append(llm.collective_rpc(_owners)[0])
        if "end_process" in batch:
            end = (batch["end_process"], signal.SIGTERM)
            llm.collective_rpc(_signal_at_draft, args=(*end, batch["end_at"]))
        for key, number in (("kill_owner_at", signal.SIGKILL), ("stop_owner_at", signal.SIGSTOP)):
            if key in batch:
                end = (owners[-1][0], number)
                llm.collective_rpc(_signal_at_draft, args=(*end, batch[key]))
        if "fail_at" in batch:
            llm.collective_rpc(_fail_at, args=(batch["fail_at"],))
        if "apart_at" in batch:
            llm.collective_rpc(_part_at, args=(batch["apart_at"],))
        if "abort_after" in batch:
            abort(llm, batch["requests"], batch["abort_after"])
            continue
        if batch.get("truncate"):
            os.truncate(batch["truncate"], 8)
        if "hostile" in batch:
            result.append(hostile.serve(llm, batch["steady"], batch["hostile"], batch["seed"]))
            continue
        if "sessions" in batch:
            result.append(sessions.serve(llm, batch["sessions"]))
            continue
        result.append(generate(llm, requests_of(batch), batch.get("adapters")))
        counted.append(llm.collective_rpc(counters_of)[0])
        drafts = metrics_of(llm).get("spec_decode_num_draft_tokens")
        drafted.append(getattr(drafts, "value", None))
    runners = llm.collective_rpc(counters_of)
    slots = llm.collective_rpc(_slots)[0]
    metrics = metrics_of(llm)
    trims = getattr(metrics.get("specplus_memory_guard_trims"), "value", None)
    preemptions = getattr(metrics.get("num_preemptions"), "value", None)
    accepted = getattr(metrics.get("spec_decode_num_accepted_tokens_per_pos"), "values", None)
    llm.llm_engine.engine_core.shutdown()
    with open(out_path, "w") as f:
        json.dump(
            {
                "batches": result,
                "counters": runners[0],
                "counted": counted,
                "ranks": runners,
                "owners": owners,
                "slots": slots,
                "preemptions": preemptions,
                "trims": trims,
                "accepted_per_position": accepted,
                "drafted": drafted,
            },
            f,
        )


def _signal_at_draft(worker, pid, number, draft):
    """Sends the signal when the draft of that number, from 1, is asked for: in the middle of a
    batch, however fast the machine is."""
    proposer, drafts = worker.model_runner.drafter.proposer, itertools.count(1)
    propose = proposer.propose

    def signalled(step):
        if next(drafts) == draft:
            os.kill(pid, number)
        return propose(step)

    proposer.propose = signalled


def _fail_at(worker, numbers):
    """On the rank that drafts, drafts of these numbers, from 1, fail: by turns before their first
    pass, and in its attention."""
    if not worker.model_runner.drafter._first_rank:
        return
    executor, drafts = worker.model_runner.drafter.proposer._executor, itertools.count(1)
    begin = executor.begin

    def lost(*arguments):
        raise RuntimeError("planted within a pass")

    def failing(*arguments):
        number = next(drafts)
        if number in numbers[::2]:
            raise RuntimeError("planted before a pass")
        if number not in numbers:
            return begin(*arguments)
        executor.cache.write = lost
        try:
            return begin(*arguments)
        finally:
            del executor.cache.write

    executor.begin = failing


def _part_at(worker, number):
    """On the rank that drafts, a layer of the target fails in the passes of that draft, from 1."""
    if not worker.model_runner.drafter._first_rank:
        return
    executor, drafts = worker.model_runner.drafter.proposer._executor, itertools.count(1)
    begin = executor.begin

    def lost(*arguments):
        raise RuntimeError("planted in a layer of the target")

    def failing(*arguments):
        if next(drafts) == number:
            executor.model.mlp = lost
        return begin(*arguments)

    executor.begin = failing


def _await_rebuild(llm):
    deadline = time.monotonic() + 300
    while not llm.collective_rpc(counters_of)[0]["draft_group_rebuilds"]:
        assert time.monotonic() < deadline, "the owners were not started anew"
        time.sleep(0.2)


def _owners(worker):
    proposer = worker.model_runner.drafter.proposer
    return getattr(proposer, "_placement", proposer).pids()


def _slots(worker):
    """Of a model of latents: hashes of its buffers, how many there are and how many are free."""
    import hashlib

    slots = getattr(worker.model_runner, "slots", None)
    if slots is None:
        return None
    bare = [tensor.cpu().numpy().tobytes() for tensor in slots.tensors()]
    bare += [slots.drafted.tobytes(), repr(slots.seeds).encode()]
    return {
        "hashes": [hashlib.sha256(each).hexdigest() for each in bare],
        "slots": len(slots), "free": sorted(slots._free),
    }  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
