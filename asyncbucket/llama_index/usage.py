"""What a call did cost in tokens, as LlamaIndex passes it on: it is read as all replies are."""

from asyncbucket.http.usage import Usage, usage_of

__all__ = ["Usage", "usage_of"]
