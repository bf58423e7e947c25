"""LLaVA-OneVision: tiles that do not overlap and an overview, SigLIP, an MLP, Qwen2."""
