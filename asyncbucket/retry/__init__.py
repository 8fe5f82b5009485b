"""Retry what failed temporarily, and only that; stamina does the looping and the sleeping.

What is decided here, for each failed attempt:

1. *Is it worth it?* `classify` looks at the error, from whichever library, without importing that:
   time-outs, lost connections, 408, 409, 429 and 5xx are retried; other 4xx and an exhausted quota
   are not.
2. *Who waits?* A 429 concerns all users of the limiter, so all pause, by the rule of
   `asyncbucket.providers.refusals`: the refusals of one wave make one pause. If the server names no
   time, the pause doubles from wave to wave.
3. *When?* As the server says, plus up to a tenth; otherwise by exponential back-off, of which a
   random part between a half and the whole is waited. Never past the deadline, and never longer
   than `max_wait`: then the call fails at once.
4. *May we?* A retry budget bounds the load that an outage would multiply; see `RetryBudget`.

Each attempt acquires anew: during a back-off a call holds no slot and no tokens. The user sees the
provider's last error, the same object, with a note that says how often the call was tried.

`policy` is what a user sets, `retrier` applies it for one model, `trial` is the story of one call,
and `stamina_loop` is all that stamina gets to see of it.
"""

from asyncbucket.providers.errors import Verdict, classify
from asyncbucket.retry.policy import Retry, RetryBudget
from asyncbucket.retry.retrier import Retrier
from asyncbucket.retry.trial import Sent

__all__ = ["Retrier", "Retry", "RetryBudget", "Sent", "Verdict", "classify"]
