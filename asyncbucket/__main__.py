"""`python -m asyncbucket` is `asyncbucket`."""

from asyncbucket.cli import main

if __name__ == "__main__":
    main()
