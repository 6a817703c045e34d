"""Graph rewrite passes and matching weight transforms for Hugging Face Qwen3.5-family models."""
