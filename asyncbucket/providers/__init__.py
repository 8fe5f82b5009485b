"""What is known of providers: what a request costs there, what replies and refusals say.

`profiles` has the providers themselves; `request` measures what a request asks for, and `forecast`
how long a reply will be; `usage` finds what a call did cost; `headers` and `learn` read what is
left, and `errors` and `refusals` what a failure means. Nothing here sends or retries anything.
"""
