"""How real providers count and answer: a table, `rules.toml`, and no code for any of them.

They judge asyncbucket, so they share nothing with its own profiles. Each names the page that it
follows.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Final, Literal

from asyncbucket.testing.provider.policies import PolicyName


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What one provider does.

    Attributes:
        source: The page that says so.
        reserves: What a call is charged in tokens at admission: the larger of prompt and max_tokens,
            their sum, the prompt alone, or, as only a fake model can know, what the reply will use.
        unlimited_output: What a call without max_tokens is charged for its output.
        settles: Whether the charge is corrected once the reply is done.
        output_counts: How many tokens an output token counts as then.
        counted_in: How a resource is counted, if not as the option `policy` says.
        slices: How many of its headers' limits make up a minute, for each resource.
        headers: The headers about a limit, by its resource; `parts` are which there are.
        reset: How a reset is written: as Go's duration, as a date, or in seconds.
        waits: The headers in which a refusal says how long to wait.
        error: The name of an error's body.
        refusal: The name of the body of a refusal for rate, if that is another.
        refusal_headers: More headers of a refusal.
    """

    source: str
    reserves: Literal["larger", "sum", "prompt", "usage"] = "sum"
    unlimited_output: int = 16
    settles: bool = True
    output_counts: int = 1
    counted_in: Mapping[str, PolicyName] = field(default_factory=dict[str, PolicyName])
    slices: Mapping[str, int] = field(default_factory=dict[str, int])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: tuple[str, ...] = ("limit", "remaining")
    reset: Literal["go", "date", "seconds"] = "seconds"
    waits: tuple[str, ...] = ()
    error: str = "openai"
    refusal: str = ""
    refusal_headers: Mapping[str, str] = field(default_factory=dict[str, str])


RULES: Final[Mapping[str, Rules]] = {
    name: Rules(**rules)
    for name, rules in tomllib.loads(
        files("asyncbucket.testing.provider").joinpath("rules.toml").read_text("utf-8")
    ).items()
}

#: Type and code of an error by its status, at OpenAI, at Anthropic and at Google.
_OPENAI: Final = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "unknown_url"),
    429: ("requests", "rate_limit_exceeded"),
    503: ("server_error", "overloaded"),
}
_ANTHROPIC: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_GOOGLE: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
}
#: What Google calls a quota.
_QUOTAS: Final = {"requests": "RequestsPerMinute", "daily_requests": "RequestsPerDay"}
_GOOGLE_TYPE: Final = "type.googleapis.com/google.rpc"


def error_body(
    form: str,
    status: int,
    message: str,
    *,
    kind: str | None = None,
    code: str | None = None,
    refused_by: str = "",
    wait: int = 0,
) -> Mapping[str, Any]:
    """Return the body of an error in one of the forms that `Rules` name.

    Args:
        form: openai, anthropic, google, google_quota, openrouter or message.
        status: The HTTP status.
        message: For people.
        kind: OpenAI's type; by default that of the status.
        code: OpenAI's code; by default that of the status.
        refused_by: The resource that refuses the call.
        wait: Seconds until it would pass.
    """
    google = {"code": status, "message": message, "status": _GOOGLE.get(status, "INTERNAL")}
    match form:
        case "message":
            return {"message": message}
        case "anthropic":
            error = {"type": _ANTHROPIC.get(status, "api_error"), "message": message}
            details = {"details": {"error_code": code}} if code else {}
            return {"type": "error", "error": {**error, **details}}
        case "google":
            return {"error": google}
        case "google_quota":
            quota = f"Generate{_QUOTAS.get(refused_by, 'ContentInputTokensPerMinute')}PerProject"
            failure = {"@type": f"{_GOOGLE_TYPE}.QuotaFailure", "violations": [{"quotaId": quota}]}
            retry = {"@type": f"{_GOOGLE_TYPE}.RetryInfo", "retryDelay": f"{wait}s"}
            return {"error": {**google, "details": [failure, retry]}}
        case "openrouter":
            metadata = {"error_type": "rate_limit_exceeded"}
            return {"error": {"code": status, "message": message, "metadata": metadata}}
        case _:
            usual_kind, usual_code = _OPENAI.get(status, ("server_error", None))
            what = {"type": kind or usual_kind, "param": None, "code": code or usual_code}
            return {"error": {"message": message, **what}}
