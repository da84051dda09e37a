"""Starting, finding and ending a repository's engine server: what `thaw up` and `thaw down` do, for any program."""
