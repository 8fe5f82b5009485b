"""What a call is charged when it is admitted, before anyone knows how long its reply will be.

- `"openai"`: the larger of `max_tokens` and the estimate of the prompt. OpenAI: "your rate limit is
  calculated as the maximum of max_tokens and the estimated number of tokens based on the character
  count of your request" (platform.openai.com/docs/guides/rate-limits, read in 2025).
- `"azure"`: the estimate of the prompt plus `max_tokens` (times `best_of`, which is 1 here).
- `"usage"`: what the reply will report as its total. No provider can do that at admission; the
  fake model knows its reply beforehand. For tests in which estimate and usage must agree.

The estimate of a prompt is a token for every four characters of its texts, tools and response
format, rounded up. Without `max_tokens` the output counts as `default_max_tokens`. Embeddings cost
their input under every rule.
"""

from asyncbucket.testing.provider.model import Reply
from asyncbucket.testing.provider.prompt import Prompt
from asyncbucket.testing.provider.settings import ChargeRule


def charge(rule: ChargeRule, prompt: Prompt, reply: Reply, *, default_max_tokens: int) -> int:
    """Return the tokens that `rule` charges for a call."""
    if rule == "usage":
        return reply.total_tokens
    output = default_max_tokens if prompt.max_tokens is None else prompt.max_tokens
    return prompt.tokens + output if rule == "azure" else max(prompt.tokens, output)
