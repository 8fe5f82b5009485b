"""Try again what failed for a while, and only that; stamina does the looping and the sleeping.

What is decided here, for each failed attempt:

1. *Is it worth it?* `classify` looks at the error, whoever's it is, without importing its library:
   time-outs, lost connections, 408, 409, 429 and 5xx are; other 4xx and an exhausted quota aren't.
2. *For whom?* A 429 speaks to all users of the limiter, so all pause, by the rule of
   `asyncbucket.http.refusals`: the refusals of one wave make one pause, which doubles from wave to
   wave where the server names none.
3. *When?* As the server says, plus up to a tenth; else an exponential back-off, of which a random
   part between a half and the whole is waited. Never past the deadline, never over `max_wait`: a
   longer wait is no back-off, and the call fails at once.
4. *May we?* A retry budget ends what an outage would multiply; see `RetryBudget`.

Each attempt acquires anew: during a back-off a call holds no slot and no tokens. The last error of
the provider is what the user sees, the same object, with a note that says how often it was tried.

`policy` is what a user sets, `retrier` what follows for one model, `trial` the story of one call, and
`again` all that stamina gets to see of it.
"""

from asyncbucket.http.failures import Verdict, classify
from asyncbucket.retry.policy import Retry, RetryBudget
from asyncbucket.retry.retrier import Retrier
from asyncbucket.retry.trial import Sent

__all__ = ["Retrier", "Retry", "RetryBudget", "Sent", "Verdict", "classify"]
