"""Complete a Python file through the server of ``serve.sh``, and show what drafting brought.

python complete.py FILE.py [--port 8000] [--tokens 128]
"""

from __future__ import annotations

import argparse
import time
import urllib.request
from pathlib import Path

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

#: Characters of the file's end that are sent: 2048 tokens must hold them and the answer.
CONTEXT = 4000


def drafting(address: str) -> dict[str, float]:
    """The server's counters of drafting: request steps, and the tokens they made."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {
        name: sum(s.value for s in samples if s.name == f"vllm:specplus_{name}_total")
        for name in ("request_steps", "output_tokens")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    address = f"http://127.0.0.1:{args.port}"
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    before, start = drafting(address), time.perf_counter()
    answer = client.completions.create(
        model="code",
        prompt=args.file.read_text()[-CONTEXT:],
        max_tokens=args.tokens,
        temperature=0,
    )
    seconds = time.perf_counter() - start
    after = drafting(address)
    print(answer.choices[0].text)
    steps = after["request_steps"] - before["request_steps"]
    tokens = after["output_tokens"] - before["output_tokens"]
    print(
        f"# {answer.usage.completion_tokens} tokens in {seconds:.2f} s, "
        f"{tokens / max(steps, 1):.2f} tokens per step"
    )


if __name__ == "__main__":
    main()
