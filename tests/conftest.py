"""What every test may rely on."""

import os

# Set before anything that reads them is imported: no test reaches beyond this machine, and none
# depends on the key, the proxy or the terminal of the person who runs it.
OUTSIDE = (
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "OPENAI_API_BASE",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
)
for name in OUTSIDE:
    for spelling in (name, name.lower()):
        _ = os.environ.pop(spelling, None)
os.environ["NO_PROXY"] = "*"
os.environ["COLUMNS"] = "80"
