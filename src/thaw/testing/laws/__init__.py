"""The law book, a chapter a file: each class holds the tests of one law, `EngineTests` is all of them."""
