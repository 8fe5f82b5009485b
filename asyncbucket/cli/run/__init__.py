"""`asyncbucket run`: a file of requests or prompts in, a file of answers out, under your limits.

From the inside out: `job` says what is to be done, `lines` reads what goes in, `answers` is the file
that comes out, `work` sends and writes, `screen` counts and shows; `estimate` is the dry run, and
`options` what can be typed.
"""
