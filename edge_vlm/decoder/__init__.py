"""From ids and embeddings to logits: llama.cpp, its contexts and their KV caches."""
