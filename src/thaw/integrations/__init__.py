"""thaw for other people's frameworks: one package each, and one extra that installs what it needs.

Nothing in the library imports them, and importing this package imports none of the frameworks.
"""
