"""InternVL2.5 and InternVL3: InternViT, an MLP, Qwen2 or InternLM2."""
