"""The fake model: cheap, and the same answer to the same prompt.

It calls the first tool once for each question, and answers in text when it sees a result. With
`tool_choice` it does as told. A ReAct prompt gets the same in ReAct's own format. A response format
gets the smallest valid JSON. Any other question is repeated, so that an answer can be matched with
its call.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncbucket.testing.provider.prompt import Prompt, Tool
from asyncbucket.testing.provider.schema import smallest_instance

FILLER = " and so on"
QUOTE = 200
"""How much of a question is repeated."""

_REACT_TOOL = re.compile(
    r"> Tool Name: (?P<name>[^\n]+)\n.*?Tool Args: (?P<args>\{[^\n]*\})", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model says: text, or a call."""

    text: str
    call: ToolCall | None
    truncated: bool
    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


def answer(prompt: Prompt, *, reply_tokens: int = 0) -> Reply:
    """Answer `prompt`; texts are padded to `reply_tokens` and cut at the prompt's `max_tokens`."""
    tool = _tool_to_call(prompt)
    if tool is not None:
        arguments = _arguments(tool.parameters, prompt.question)
        length = _tokens(tool.name + arguments)
        return Reply(
            "",
            ToolCall(tool.name, arguments),
            truncated=False,
            prompt_tokens=prompt.tokens,
            completion_tokens=length,
        )
    text = _text(prompt)
    if prompt.schema is None and len(text) < reply_tokens * 4:
        text = (text + FILLER * reply_tokens)[: reply_tokens * 4]
    max_length = len(text) if prompt.max_tokens is None else prompt.max_tokens * 4
    truncated = len(text) > max_length
    text = text[:max_length]
    return Reply(
        text,
        None,
        truncated=truncated,
        prompt_tokens=prompt.tokens,
        completion_tokens=_tokens(text),
    )


def _tool_to_call(prompt: Prompt) -> Tool | None:
    if not prompt.tools or prompt.forced == "none":
        return None
    if prompt.forced in (None, "required"):
        wanted = prompt.forced == "required" or not prompt.observed
        return prompt.tools[0] if wanted else None
    named = [tool for tool in prompt.tools if tool.name == prompt.forced]
    return named[0] if named else None


def _text(prompt: Prompt) -> str:
    if prompt.schema is not None:
        return json.dumps(smallest_instance(prompt.schema))
    quoted = f"You said: {prompt.question[:QUOTE]}"
    if "Thought:" in prompt.system and "Action:" in prompt.system:
        return _react(prompt, quoted)
    return quoted


def _react(prompt: Prompt, quoted: str) -> str:
    tool = None if prompt.observed else _REACT_TOOL.search(prompt.system)
    if tool is None:
        return f"Thought: I can answer without using any more tools.\nAnswer: {quoted}"
    arguments = _arguments(json.loads(tool["args"]), prompt.question)
    return f"Thought: I need a tool.\nAction: {tool['name'].strip()}\nAction Input: {arguments}"


def _arguments(parameters: Mapping[str, Any], question: str) -> str:
    return json.dumps(smallest_instance(parameters, text=question[:QUOTE] or "text"))


def _tokens(text: str) -> int:
    return max(1, -(-len(text) // 4))
