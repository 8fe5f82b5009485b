"""What a server's answers tell of its limits: meters that are corrected from outside.

`pause` is a refusal, `headroom` what replies say is left, `others` what that tells of other programs
on the same key, `slices` of a server that counts by the second, and `adaptive` what latency and
refusals tell of a server that says nothing.
"""
