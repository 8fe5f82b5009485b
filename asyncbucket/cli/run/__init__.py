"""`asyncbucket run`: a file of requests or prompts in, a file of answers out, under your limits.

From the inside out: `job` says what is to be done, `request` is one line of it, `feed` reads them,
`books` takes a limiter's bookings to disk and back, `output` writes, `ledger` knows which lines are
answered, `send` asks the provider, `tally` counts, `screen` shows it and `report` sums it up; `estimate`
is the dry run. `work` joins them, `command` is what the terminal sees of it, `options` what can be
typed.
"""
