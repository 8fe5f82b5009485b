"""A reverse proxy that paces: programs in any language share one limit by changing a base URL.

It is `Limiter.transport` with a server in front. So costs, learning, retries and pauses are those of
`asyncbucket.http`; here is only what a server adds. Started by `asyncbucket proxy`. Needs
`pip install "asyncbucket[proxy]"`.

From the inside out: `error_replies` says how an error looks in the provider's format, `caller_terms` on
which terms a call waits, and whose key it brings; `app` passes calls on, `options` reads what is to be
done, `serving` does it until a signal ends it.
"""

from importlib.util import find_spec

if not all(map(find_spec, ("httpx", "prometheus_client", "starlette", "uvicorn"))):
    raise ImportError(
        'the proxy needs httpx, prometheus_client, starlette and uvicorn: pip install "asyncbucket[proxy]"'
    )
