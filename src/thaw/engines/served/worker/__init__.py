"""What an engine's workers do with KV: hold it in host memory, move it to and from packs; tokens by thaw's rules."""
