"""LLaVA-1.5 and LLaVA-NeXT: CLIP, an MLP, Llama or Mistral."""
