"""LLaVA-OneVision: SigLIP, an MLP, Qwen2."""
