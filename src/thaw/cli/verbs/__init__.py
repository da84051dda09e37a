"""One module a verb, each with its `command`. `thaw.cli.app` imports the one that is run."""
