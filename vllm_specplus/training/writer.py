"""The process in which vLLM writes texts: ``python -m vllm_specplus.training.writer JOB.json``.

It is apart, so that the engine's memory is free again when training starts. What it has written is
on disk line by line: a job that was ended goes on with what is missing.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_specplus.strict import StrictModel
from vllm_specplus.training.data import Language, Prompt, language_of
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import write_text, writing
from vllm_specplus.training.splits import committed
from vllm_specplus.training.texts import Text, to_line

#: Requests that are sent at once; between them the job can be ended without loss.
CHUNK = 128
#: Requests side by side on a CPU, and memory for their keys and values.
CPU_REQUESTS, CPU_CACHE = 64, 1 << 30
#: Temperatures of the answers, in turn; and of what the target asks itself, with most tokens.
ANSWERS, ASKING, QUESTION_TOKENS = (0.0, 0.6, 1.0), 0.9, 96
#: Seconds between looks at the parent process.
WATCHED = 1.0
#: Characters of the shortest question that is answered.
SHORTEST = 9


class Job(StrictModel):
    """What has to be written."""

    model: str
    """Folder of the target."""
    prompts: str
    """File of :class:`Prompt` rows; if it is missing, the target asks itself ``ask`` questions."""
    out: str
    """File of the texts; those that are in it are not written again."""
    tokens: int
    """Tokens of prompts and answers that are enough."""
    length: int
    """Most tokens of a prompt and its answer."""
    temperatures: tuple[float, ...] = ANSWERS
    ask: int = 0
    seed: int = 0
    ray: bool = False


class Engine:
    """vLLM with a model; lines of requests to lines of answers, also as Ray Data calls it."""

    def __init__(self, model: str, length: int, seed: int):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import torch
        from vllm import LLM

        keys: dict[str, Any] = {"max_model_len": length, "seed": seed, "disable_log_stats": True}
        if not torch.cuda.is_available():
            keys |= {"max_num_seqs": CPU_REQUESTS, "kv_cache_memory_bytes": CPU_CACHE}
        self._llm = LLM(model, **keys)

    def __call__(self, batch: dict[str, Sequence[str]]) -> dict[str, list[str]]:
        """Answers of ``batch["line"]``, requests as :func:`request` writes them, under that key."""
        from vllm import SamplingParams, TokensPrompt

        requests = [json.loads(line) for line in batch["line"]]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=each["tokens"]) for each in requests],
            [
                SamplingParams(temperature=each["temperature"], max_tokens=each["most"])
                for each in requests
            ],
            use_tqdm=False,
        )
        lines = []
        for each, output in zip(requests, outputs, strict=True):
            tokens = (*each["tokens"], *output.outputs[0].token_ids)
            lines.append(to_line(Text(each["id"], tokens, len(each["tokens"]), "target")))
        return {"line": lines}


def request(prompt: Prompt, temperature: float, most: int) -> str:
    """A line that says what is to be written: at most ``most`` tokens behind a prompt."""
    return json.dumps(
        {"id": prompt.id, "tokens": prompt.tokens, "temperature": temperature, "most": most}
    )


class Pen:
    """Whatever writes the answers: one engine in this process, or one for each GPU on Ray."""

    def __init__(self, job: Job):
        self._job = job
        self._engine: Engine | None = None

    def write(self, lines: Sequence[str]) -> Iterator[str]:
        """Answers of requests, chunk by chunk."""
        job = self._job
        if job.ray:
            yield from self._on_ray(lines)
            return
        self._engine = self._engine or Engine(job.model, job.length, job.seed)
        for at in range(0, len(lines), CHUNK):
            yield from self._engine({"line": lines[at : at + CHUNK]})["line"]

    def _on_ray(self, lines: Sequence[str]) -> Iterator[str]:
        import ray

        # Of the module that runs as a program Ray would send the class itself.
        from vllm_specplus.training.writer import Engine

        ray.init(ignore_reinit_error=True, log_to_driver=False)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        data = ray.data.from_items([{"line": line} for line in lines])
        job = self._job
        answers = data.map_batches(
            Engine, fn_constructor_args=(job.model, job.length, job.seed), batch_size=CHUNK,
            concurrency=max(gpus, 1), num_gpus=1 if gpus else 0,
        )  # fmt: skip
        yield from (row["line"] for row in answers.iter_rows())


def ask_itself(job: Job, language: Language, pen: Pen) -> list[Prompt]:
    """Questions that the target makes up behind the user's header of its chat template, as prompts;
    those that are held out are not among them."""
    if language.tokenizer is None or not language.tokenizer.chat_template:
        raise TrainingError(
            f"{job.model} has no chat template, behind which it could ask itself questions: bring "
            f"texts or prompts with --data"
        )
    chat = [{"role": "user", "content": "\0"}]
    header, _, _ = language.tokenizer.apply_chat_template(chat, tokenize=False).partition("\0")
    header_tokens = tuple(language.encode(header))
    asking = [
        request(Prompt(f"asked {i}", header_tokens), ASKING, QUESTION_TOKENS)
        for i in range(job.ask)
    ]
    held_out = committed()
    prompts = []
    for line in pen.write(asking):
        row = json.loads(line)
        own = row["tokens"][row["start"] :]
        question = language.tokenizer.decode(own, skip_special_tokens=True).strip()
        if len(question) < SHORTEST or held_out.holds(question):
            continue
        string = language.prompt([{"role": "user", "content": question}])
        prompts.append(Prompt(row["id"], tuple(language.encode(string))))
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """What :func:`write_prompts` has kept."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Prompt(row["id"], tuple(row["tokens"])) for row in rows]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Keeps prompts in a file, all or none."""
    lines = (json.dumps({"id": each.id, "tokens": each.tokens}) for each in prompts)
    write_text(path, "".join(f"{line}\n" for line in lines))


def whole_lines(path: Path) -> list[dict]:
    """The rows of a file that may end in the middle of one; the file is cut behind the last whole
    one."""
    if not path.exists():
        return []
    found, size = [], 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            found.append(json.loads(line))
            size += len(line)
        file.truncate(size)
    return found


def write(job: Job) -> None:
    """Does a job, or what is left of it."""
    language = language_of(Path(job.model))
    pen, prompts_file, out = Pen(job), Path(job.prompts), Path(job.out)
    if not prompts_file.exists():
        write_prompts(prompts_file, ask_itself(job, language, pen))
    # A file may be sorted by anything: the budget is spent on a sample of all.
    prompts = read_prompts(prompts_file)
    random.Random(job.seed).shuffle(prompts)
    before = whole_lines(out)
    done, spent = {row["id"] for row in before}, sum(len(row["tokens"]) for row in before)
    requests = []
    if spent >= job.tokens:
        return
    for i, prompt in enumerate(prompts):
        most = min(job.length - len(prompt.tokens), job.length // 2)
        if prompt.id not in done and most > 0:
            requests.append(request(prompt, job.temperatures[i % len(job.temperatures)], most))
    for line in pen.write(requests):
        with writing(out), out.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        spent += len(json.loads(line)["tokens"])
        if spent >= job.tokens:
            break


def end_with_parent() -> None:
    """Ends this process when the one is gone that has started it, perhaps killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCHED)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    try:
        write(Job.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except TrainingError as error:
        sys.exit(f"Error: {error}")
