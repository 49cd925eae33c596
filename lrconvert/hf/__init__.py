"""lrconvert inside transformers: factorized models that `from_pretrained` loads and `save_pretrained` writes."""
