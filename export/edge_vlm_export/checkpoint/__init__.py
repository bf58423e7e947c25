"""What a checkpoint's folder holds: tensors, settings files, tokenizer, hub downloads."""
