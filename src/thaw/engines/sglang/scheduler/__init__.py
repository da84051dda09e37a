"""In SGLang's scheduler process, which is also its worker, once a rank: records, radix cache, KV pool, sampler."""
