"""A reasoning parser for a text model that does not reason: its first sentence is the reasoning.

Importing this module registers it: vLLM's ``reasoning_parser_plugin`` is for servers.
"""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("first_sentence")
class FirstSentence(BaseThinkingReasoningParser):
    @property
    def start_token(self) -> str:
        return "<repo_name>"

    @property
    def end_token(self) -> str:
        return "."
