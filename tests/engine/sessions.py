"""Sessions of streaming input in an engine of this process: turns that go on under one request id,
as ``AsyncLLM.generate`` makes them of a stream of ``StreamingInput``."""

from __future__ import annotations

from vllm.sampling_params import RequestOutputKind

from vllm_specplus.testing.engine import counters_of, prompt_of, sampling_params


def serve(llm, sessions: list[list]) -> dict:
    """Serve ``sessions``, lists of turns ``[prompt ids, sampling params]``, next to each other,
    turn by turn. Returns {"ids": [session][turn][n], "nodes": [drafted in each turn]}."""
    texts = [[[] for _ in turns] for turns in sessions]
    nodes, engine = [], llm.llm_engine
    names = [f"session-{i}" for i in range(len(sessions))]
    for turn in range(len(sessions[0])):
        before = _nodes(llm)
        for name, turns in zip(names, sessions, strict=True):
            _add(engine, name, *turns[turn])
        going = set(names)
        while going:
            for out in engine.step():
                (completion,) = out.outputs
                texts[names.index(out.request_id)][turn] += completion.token_ids
                if completion.finish_reason is not None:
                    going.remove(out.request_id)
        nodes.append(_nodes(llm) - before)
    for name in names:
        _add(engine, name, [0], {}, resumable=False)
    while engine.has_unfinished_requests():
        engine.step()
    return {"ids": texts, "nodes": nodes}


def _add(engine, name: str, ids: list[int], fields: dict, resumable: bool = True) -> None:
    params = sampling_params(fields)
    params.output_kind = RequestOutputKind.DELTA
    request = engine.input_processor.process_inputs(
        name, prompt_of(ids), params, supported_tasks=engine.get_supported_tasks(),
        resumable=resumable,
    )  # fmt: skip
    request.external_req_id = name
    engine.output_processor.add_request(request, None, None, 0)
    engine.engine_core.add_request(request)


def _nodes(llm) -> int:
    counters = llm.collective_rpc(counters_of)[0]
    return int(counters["nodes_drafted"]) if counters else 0
