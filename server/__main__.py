"""`python -m server` is `adapterd`."""

from server.cli import main

main()
