"""LLaVA-1.5 and LLaVA-NeXT: one crop or the tiles of anyres, CLIP, an MLP, Llama or Mistral."""
