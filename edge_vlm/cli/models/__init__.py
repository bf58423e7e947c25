"""Commands about bundles: use, info, verify, cache."""
