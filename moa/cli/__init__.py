"""The command line: one thin module per command group, put together in `app`."""
