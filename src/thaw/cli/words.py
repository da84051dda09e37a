"""Numbers as people read them: those of `thaw.tree.words`."""

from thaw.tree.words import age, count, moment, nbytes, plain, seconds

__all__ = ["age", "count", "moment", "nbytes", "plain", "seconds"]
